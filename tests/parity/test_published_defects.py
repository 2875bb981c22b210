"""Defects of the published EAP-IG package that are not reproduced, each with the right value from first principles."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eap_circuits as eap
from eap_circuits.graph import Graph
from eap_circuits.selfcheck import StayDouble
from tests.circuits.conftest import logit_difference, prompts, random_pairs, tiny_model
from tests.circuits.decoders import Decoder
from tests.circuits.plain_runs import gradients, plain_run


def test_a_mean_is_over_all_tokens_not_the_last():
    """The score of the edge from the last MLP to `logits`: a mean by hand times a gradient by hand."""
    model, data = tiny_model("gpt2"), random_pairs(seed=9, n=4)
    decoder = Decoder(model)
    runs = [plain_run(decoder, decoder.embed(prompts(data, e)[0])) for e in range(len(data))]
    outputs = [run.c[-1].detach() for run in runs]
    assert len({len(y) for y in outputs}) > 1  # prompts of several lengths

    def score(mean):
        losses = [-logit_difference(run.logits, data, e) for e, run in enumerate(runs)]
        slopes = [gradients(loss, run.x[-1:])[0] for loss, run in zip(losses, runs)]
        return sum(float(((mean - y) * g).sum()) for y, g in zip(outputs, slopes)) / len(data)

    found = eap.attribute(model, data, method="eap", ablation="mean")
    value = float(found.values[found.graph.senders.index("m1"), -1])
    assert value == pytest.approx(score(torch.cat(outputs).mean(0)), rel=1e-5)
    last = score(torch.stack([y[-1] for y in outputs]).mean(0))
    assert abs(value - last) > 0.01 * abs(value)


@pytest.mark.parametrize("name", ["gpt-neox", "gptj", "falcon-7b", "phi"])
@torch.no_grad()
def test_an_edge_into_a_parallel_layers_mlp_leaves_its_attention_alone(name):
    """Attention and MLP stand in parallel: what the MLP alone is given cannot reach the attention beside it."""
    model, data = tiny_model(name), random_pairs(seed=9, n=3)
    embed, body = model.get_input_embeddings(), model.base_model
    layer = (body.layers if hasattr(body, "layers") else body.h)[0]
    with StayDouble():
        graph = eap.attribute(model, data[:1], method="eap").graph
        assert graph.parallel
        v = graph.receivers.index("m0")
        mask = torch.zeros_like(graph.edge_mask)
        mask[0, v] = True
        found = eap.attribute(model, data, method="exact", edges=mask)
        norm = getattr(layer, "post_attention_layernorm", None)  # the MLP's own, where it has one
        norm = norm or getattr(layer, "ln_1", None) or layer.input_layernorm
        total = 0.0
        for e in range(len(data)):
            n, (good, bad) = int(data.lengths[e]), data.answers[e]
            clean, corrupted = data.clean[e : e + 1, :n], data.corrupted[e : e + 1, :n]
            own = model(input_ids=clean).logits[0, -1]
            # In layer 0 the MLP alone reads the corrupted prompt's embeddings; the residual stream is the clean one.
            other = norm(embed(corrupted))
            handle = layer.mlp.register_forward_pre_hook(lambda _, args, x=other: (x, *args[1:]))
            moved = model(input_ids=clean).logits[0, -1]
            handle.remove()
            total += float((own[good] - own[bad]) - (moved[good] - moved[bad]))
    assert float(found.values[0, v]) == pytest.approx(total / len(data), rel=1e-5)


@given(
    layers=st.integers(1, 3),
    kv=st.sampled_from((1, 2, 4)),
    parallel=st.booleans(),
    heads=st.sampled_from(("kv", "query")),
    seed=st.integers(0, 10**6),
    share=st.floats(0.01, 1.0),
    how=st.sampled_from(("top", "greedy", "threshold", *["optimal"] * bool(find_spec("scipy")))),
    signed=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_selection_never_adds_an_edge_that_does_not_exist(layers, kv, parallel, heads, seed, share, how, signed):
    """However strong the scores of pairs that are no edges: of later senders, or of a parallel layer's own heads."""
    graph = Graph((4,) * layers, (kv,) * layers, 8, parallel, heads)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(graph.n_senders, graph.n_receivers, generator=generator)
    tempting = torch.where(graph.edge_mask, values, 1e6 * values.sign() if not signed else torch.tensor(1e6))
    n = max(1, int(share * graph.n_edges))
    given_size = {"threshold": 0.5} if how == "threshold" else {"n_edges": n}
    with_them, without = (
        eap.EdgeScores(graph, v).select(how=how, signed=signed, **given_size)
        for v in (tempting, values * graph.edge_mask)
    )
    assert not (with_them.mask & ~graph.edge_mask).any()
    assert torch.equal(with_them.mask, without.mask)
    assert with_them.n_edges == int(with_them.mask.sum()) <= graph.n_edges
