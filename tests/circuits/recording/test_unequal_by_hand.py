"""Pairs of unequal lengths: against runs written out head by head in float64, without a hook, a cache or a batch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import eap_circuits as eap
from eap_circuits.adapters import bind
from eap_circuits.evaluation.check import StayDouble
from eap_circuits.forward import Runner, make_batches
from eap_circuits.graph import Graph
from eap_circuits.recording import less_clean, record_both_sides, record_corrupted_side
from tests.circuits.evaluation.test_faithfulness import random_circuit
from tests.circuits.recording.unequal_pairs import difference, prompts, unequal_pairs


@dataclass
class Parts:
    """What a decoder of one family consists of; x are residual streams [1, T, D]."""

    model: Any

    def embed(self, tokens: Tensor) -> Tensor:
        """Token embeddings and, where positions are learned, those."""
        if self.model.config.model_type == "gpt2":
            return self.model.transformer.wte(tokens) + self.model.transformer.wpe(torch.arange(tokens.shape[1]))
        return self.model.model.embed_tokens(tokens)

    @property
    def layers(self) -> Any:
        gpt2 = self.model.config.model_type == "gpt2"
        return self.model.transformer.h if gpt2 else self.model.model.layers

    def project(self, layer: Any, x: Tensor, site: str, head: int) -> Tensor:
        """A query head's q, k or v, rotated where the model does so: [1, T, K]."""
        c = self.model.config
        dim = c.hidden_size // c.num_attention_heads
        if c.model_type == "gpt2":
            x = layer.ln_1(x) @ layer.attn.c_attn.weight + layer.attn.c_attn.bias
            return x[..., "qkv".index(site) * c.hidden_size + head * dim :][..., :dim]
        rows = head if site == "q" else head // (c.num_attention_heads // c.num_key_value_heads)
        weight = getattr(layer.self_attn, f"{site}_proj").weight[rows * dim : (rows + 1) * dim]
        y = layer.input_layernorm(x) @ weight.T
        if site == "v":
            return y
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        rope = self.model.model.rotary_emb(x, torch.arange(x.shape[1])[None])
        return apply_rotary_pos_emb(y[:, None], y[:, None], *rope)[0][:, 0]

    def head(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, head: int) -> Tensor:
        """What a head writes."""
        dim, length = q.shape[-1], q.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        weights = (q @ k.mT * dim**-0.5).masked_fill(~causal, -torch.inf).softmax(-1)
        columns = slice(head * dim, (head + 1) * dim)
        gpt2 = self.model.config.model_type == "gpt2"
        weight = layer.attn.c_proj.weight[columns] if gpt2 else layer.self_attn.o_proj.weight[:, columns].T
        return weights @ v @ weight

    def constant(self, layer: Any) -> Tensor | float:
        """What attention writes besides its heads."""
        return layer.attn.c_proj.bias if self.model.config.model_type == "gpt2" else 0.0

    def mlp(self, layer: Any, x: Tensor) -> Tensor:
        gpt2 = self.model.config.model_type == "gpt2"
        return layer.mlp(layer.ln_2(x)) if gpt2 else layer.mlp(layer.post_attention_layernorm(x))

    def unembed(self, x: Tensor) -> Tensor:
        """Logits behind the last token, [1, V]."""
        gpt2 = self.model.config.model_type == "gpt2"
        norm = self.model.transformer.ln_f if gpt2 else self.model.model.norm
        return self.model.lm_head(norm(x))[:, -1]


def run(
    model: Any, graph: Graph, x: Tensor, mask: Tensor | None = None, other: list[Tensor] | None = None, added=None
) -> tuple[list[Tensor], Tensor]:
    """(contribution of every sender [1, T, D], logits [1, V]) of a run that starts at x.

    A receiver v reads its own run's contribution of u times mask[u, v] and `other`'s for the rest, and added[v].
    """
    parts, contributions, constants = Parts(model), [x], [torch.zeros_like(x)]
    n_heads = model.config.num_attention_heads

    def read(v: int) -> Tensor:
        total = constants[0]
        for u, own in enumerate(contributions):
            total = total + (own if other is None else other[u] + mask[u, v] * (own - other[u]))
        return total if added is None else total + added[v]

    for index, layer in enumerate(parts.layers):
        written = []
        for h in range(n_heads):
            q, k, v = (parts.project(layer, read(graph.receivers_at(index, site).start + h), site, h) for site in "qkv")
            written.append(parts.head(layer, q, k, v, h))
        contributions += written
        constants[0] = constants[0] + parts.constant(layer)
        contributions.append(parts.mlp(layer, read(graph.receivers_at(index, "mlp").start)))
    return contributions, parts.unembed(read(graph.n_receivers - 1))


def aligned_run(model: Any, graph: Graph, data: eap.PairedDataset, e: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(what the clean run starts at, its contributions, the corrupted run's where they are aligned)."""
    clean, corrupted, π = prompts(data, e)
    embed = Parts(model).embed
    other = [c[:, π] for c in run(model, graph, embed(corrupted))[0]]
    return embed(clean), run(model, graph, embed(clean))[0], other


@pytest.fixture(params=["gpt2", "llama"])
def case(request, make_model):
    model = make_model(str(request.param))
    data = unequal_pairs(3)
    return model, bind(model).graph("query"), data


def test_a_run_written_out_is_the_models(case):
    model, graph, data = case
    with torch.no_grad(), StayDouble():
        for e in range(len(data)):
            for tokens in prompts(data, e)[:2]:
                right = model(input_ids=tokens).logits[:, -1]
                torch.testing.assert_close(run(model, graph, Parts(model).embed(tokens))[1], right)


@pytest.mark.parametrize("reuse_prefix", [True, False])
@pytest.mark.parametrize("together", [True, False])
def test_differences_are_of_aligned_contributions(case, reuse_prefix, together):
    model, graph, data = case
    with torch.no_grad(), StayDouble():
        for batch in make_batches(data, 3, reuse_prefix, torch.device("cpu")):
            runner = Runner(bind(model), graph, batch, every_mlp=True)
            sides = (record_both_sides if together else record_corrupted_side)(runner)
            senders = sides.senders
            if not together:
                senders, _ = less_clean(sides, batch, partial(runner.logits, sides.clean_embeddings))
            found = []
            for nodes in senders.nodes():
                values = (
                    nodes.values if nodes.weight is None else torch.einsum("nhk,hkd->nhd", nodes.values, nodes.weight)
                )
                found += values.unbind(1)
            right = []
            for e in batch.index.tolist():
                _, own, other = aligned_run(model, graph, data, e)
                first = int(data.first_difference[e])
                right.append(torch.stack([(b - a)[0, first:] for a, b in zip(own, other)]))
                # Before, nothing differs.
                assert max(float((b - a)[0, :first].abs().max()) for a, b in zip(own, other)) < 1e-9 if first else True
                corrupted = run(model, graph, Parts(model).embed(prompts(data, e)[1]))[1]
                torch.testing.assert_close(sides.corrupted_logits[batch.index.tolist().index(e)], corrupted[0])
            torch.testing.assert_close(torch.stack(found), torch.cat(right, 1))


@pytest.mark.parametrize("method", ["eap", "eap-ig-inputs", "clean-corrupted"])
def test_scores_are_their_definition(case, method, relative):
    model, graph, data = case
    points = {"eap": [(1.0, 1.0)], "clean-corrupted": [(1.0, 0.5), (0.0, 0.5)]}
    path = points.get(method, [((k + 0.5) / 3, 1 / 3) for k in range(3)])
    with StayDouble():
        found = eap.attribute(model, data, method=method, steps=3, quadrature="midpoint", heads="query").values
        total = torch.zeros(graph.n_senders, graph.n_receivers, dtype=torch.float64)
        for e in range(len(data)):
            with torch.no_grad():
                x, own, other = aligned_run(model, graph, data, e)
            Δ = torch.stack([b - a for a, b in zip(own, other)]).flatten(1)  # [S, T·D]
            for alpha, weight in path:
                added = [torch.zeros_like(x, requires_grad=True) for _ in range(graph.n_receivers)]
                _, logits = run(model, graph, other[0] + alpha * (x - other[0]), added=added)
                gradients = torch.autograd.grad(-difference(data, e, logits), added)
                total += weight * Δ.detach() @ torch.stack(gradients).flatten(1).T
    assert relative(found[graph.edge_mask], (total / len(data))[graph.edge_mask]) < 1e-6


def test_a_circuits_run_is_its_definition(case):
    model, graph, data = case
    circuits = [random_circuit(graph, seed, share) for seed, share in enumerate((0.1, 0.5, 0.95))]
    one = graph.edge_mask.clone()
    one[0, -1] = False  # all but an edge: its receiver reads the sum of all others
    circuits.append(eap.Circuit.from_mask(graph, one))
    with StayDouble(), torch.no_grad():
        results = eap.evaluate(model, circuits, data)
        for e in range(len(data)):
            x, _, other = aligned_run(model, graph, data, e)
            for circuit, result in zip(circuits, results):
                logits = run(model, graph, x, circuit.mask.double(), other)[1]
                assert float(result.values[e]) == pytest.approx(float(difference(data, e, logits)), abs=1e-9)


def test_exact_scores_are_of_circuits_of_all_edges_but_one(case):
    model, graph, data = case
    edges = graph.edge_mask.nonzero()
    edges = edges[torch.randperm(len(edges), generator=torch.Generator().manual_seed(2))[:4]]
    chosen = torch.zeros_like(graph.edge_mask)
    chosen[edges[:, 0], edges[:, 1]] = True
    with StayDouble(), torch.no_grad():
        scores = eap.attribute(model, data, method="exact", heads="query", edges=chosen)
        for u, v in edges.tolist():
            mask = graph.edge_mask.double()
            mask[u, v] = 0
            right = 0.0
            for e in range(len(data)):
                x, _, other = aligned_run(model, graph, data, e)
                values = [difference(data, e, run(model, graph, x, m, other)[1]) for m in (graph.edge_mask * 1.0, mask)]
                right += float(values[0] - values[1]) / len(data)
            assert float(scores.values[u, v]) == pytest.approx(right, rel=1e-5, abs=1e-7)
