"""Pairs of unequal lengths: the corrupted prompt runs as it is and is read where it is aligned with the clean one.

Checked against runs written out head by head in float64, without a hook, a cache or a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import eap_circuits as eap
from eap_circuits.adapters import bind
from eap_circuits.capture import RecordedRun, Runner, SenderDifferences, make_batches, run_circuits
from eap_circuits.evaluation.check import StayDouble
from eap_circuits.graph import Graph, prune
from eap_circuits.tasks.alignment import align

V = 59


def unequal_pairs(seed: int = 0, n: int = 7) -> eap.PairedDataset:
    """Pairs of which tokens in the middle, at an end or none at all are replaced, put in or left out."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, size: int) -> list[int]:
        return torch.randint(low, high, (size,), generator=generator).tolist()

    clean, corrupted = [], []
    for row in range(n):
        own = integers(0, V, integers(4, 10, 1)[0])
        start = integers(0, len(own), 1)[0]
        stop = min(len(own), start + integers(0, 3, 1)[0])
        put_in = integers(0, V, (2, 1, 0, 3)[row % 4])
        other = [*own[:start], *put_in, *own[stop:]] if row < n - 1 else own
        clean.append(own)
        corrupted.append(other or [1])
    good = torch.randint(V, (n,), generator=generator)

    def padded(rows: list[list[int]]) -> list[list[int]]:
        return [row + [0] * (max(map(len, rows)) - len(row)) for row in rows]

    return eap.PairedDataset.from_tokens(
        padded(clean),
        padded(corrupted),
        list(map(len, clean)),
        torch.stack([good, (good + 3) % V], 1),
        corrupted_lengths=list(map(len, corrupted)),
    )


def prompts(data: eap.PairedDataset, e: int) -> tuple[Tensor, Tensor, list[int]]:
    """(clean [1, n], corrupted [1, m], π) of one pair."""
    lengths = data.lengths if data.corrupted_lengths is None else data.corrupted_lengths
    clean, corrupted = data.clean[e : e + 1, : int(data.lengths[e])], data.corrupted[e : e + 1, : int(lengths[e])]
    return clean, corrupted, align(clean[0].tolist(), corrupted[0].tolist())


def difference(data: eap.PairedDataset, e: int, logits: Tensor) -> Tensor:
    return logits[0, data.answers[e, 0]] - logits[0, data.answers[e, 1]]


def test_the_pairs_are_what_the_tests_are_about():
    data = unequal_pairs(0)
    assert data.corrupted_lengths is not None
    change = data.corrupted_lengths - data.lengths
    assert (change > 0).any() and (change < 0).any() and (change == 0).any()


# The model, written out.


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
            runner = Runner(bind(model), graph, batch)
            senders = SenderDifferences(runner, graph, clean=together)
            if not together:
                runner.logits(senders.clean_embeddings, senders.register_clean)
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
                torch.testing.assert_close(senders.corrupted_logits[batch.index.tolist().index(e)], corrupted[0])
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


def random_circuit(graph: Graph, seed: int, share: float) -> eap.Circuit:
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(graph.n_senders, graph.n_receivers, generator=generator) < share) & graph.edge_mask
    return eap.Circuit.from_mask(graph, prune(graph, mask))


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


# Every way in which families differ.


def test_all_edges_are_the_model_and_none_the_corrupted_run(kind, make_model):
    model, data = make_model(kind), unequal_pairs(4)
    with StayDouble():
        for heads in ("kv", "query"):
            graph = bind(model).graph(heads)
            masks = [graph.edge_mask, torch.zeros_like(graph.edge_mask)]
            circuits = [eap.Circuit.from_mask(graph, mask) for mask in masks]
            kept, ablated = eap.evaluate(model, circuits, data, batch_size=3)
            for e in range(len(data)):
                clean, corrupted, _ = prompts(data, e)
                with torch.no_grad():
                    right = [float(difference(data, e, model(input_ids=x).logits[:, -1])) for x in (clean, corrupted)]
                for result, i in ((kept, 0), (ablated, 1)):
                    assert float(result.values[e]) == pytest.approx(right[i], abs=1e-9)
                assert float(kept.clean_values[e]) == pytest.approx(right[0], abs=1e-9)
                assert float(kept.corrupted_values[e]) == pytest.approx(right[1], abs=1e-9)
            assert kept.faithfulness == pytest.approx(1) and ablated.faithfulness == pytest.approx(0)


def test_both_ends_are_limits(kind, make_model):
    """Edges kept all but wholly, or all but not: every receiver is then summed up from its senders."""
    model, data = make_model(kind), unequal_pairs(4)
    arch = bind(model)
    graph = arch.graph("query")
    with StayDouble(), torch.no_grad():
        for batch in make_batches(data, 4, True, torch.device("cpu")):
            runner = Runner(arch, graph, batch)
            record = RecordedRun(runner, corrupted=True)
            masks = [graph.edge_mask * (1 - 1e-12), graph.edge_mask * 1e-12]
            whole, none = run_circuits(runner, graph, record, masks)
            torch.testing.assert_close(whole, runner.logits(runner.embed(batch.clean)))
            torch.testing.assert_close(none, record.logits)


def test_what_all_senders_differ_by_is_what_the_residual_stream_does(kind, make_model):
    """Learned positions are part of the input's difference: otherwise some of it would be no sender's."""
    model, data = make_model(kind), unequal_pairs(5)
    arch = bind(model)
    streams: dict[int, Tensor] = {}
    with StayDouble(), torch.no_grad():
        for e in range(len(data)):
            (batch,) = make_batches(data[[e]], None, False, torch.device("cpu"))
            senders = SenderDifferences(Runner(arch, arch.graph("query"), batch), arch.graph("query"))
            total = 0
            for nodes in senders.nodes():
                values = (
                    nodes.values if nodes.weight is None else torch.einsum("nhk,hkd->nhd", nodes.values, nodes.weight)
                )
                total = total + values.sum(1)
            for i, tokens in enumerate(prompts(data, e)[:2]):
                handle = arch.final_norm.module.register_forward_pre_hook(
                    lambda _, args, i=i: streams.__setitem__(i, args[0])
                )
                model(input_ids=tokens)
                handle.remove()
            first = int(data.first_difference[e])
            right = (streams[1][:, prompts(data, e)[2]] - streams[0])[0, first:]
            torch.testing.assert_close(total, right, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("settings", [{"batch_size": 1}, {"batch_size": 3}, {"reuse_prefix": False}])
def test_results_do_not_depend_on_batching(kind, settings, make_model, relative):
    model, data = make_model(kind), unequal_pairs(6)
    circuit = random_circuit(bind(model).graph("kv"), 1, 0.6)
    right = eap.attribute(model, data, steps=2, quadrature="left").values
    assert relative(eap.attribute(model, data, steps=2, quadrature="left", **settings).values, right) < 1e-6
    values = eap.evaluate(model, circuit, data).values
    assert relative(eap.evaluate(model, circuit, data, **settings).values, values) < 1e-6


def test_pairs_of_equal_lengths_are_not_changed_by_those_beside_them(make_model, relative):
    model, data = make_model("gpt2"), unequal_pairs(0)
    assert data.corrupted_lengths is not None
    equal = (data.corrupted_lengths == data.lengths).nonzero()[:, 0]
    alone = data[equal]
    assert alone.alignment is None
    graph = bind(model).graph("kv")
    circuit = random_circuit(graph, 2, 0.5)
    found, right = (eap.evaluate(model, circuit, x, batch_size=4).values for x in (data, alone))
    torch.testing.assert_close(found[equal], right)


def test_an_interrupted_run_of_another_alignment_is_another_request(make_model, tmp_path):
    model, file = make_model("gpt2"), tmp_path / "exact.safetensors"
    fields = {"clean": [[1, 2, 3]], "corrupted": [[1, 4, 3]], "lengths": [3], "answers": [[1, 2]]}
    graph = bind(model).graph("kv")
    mask = torch.zeros_like(graph.edge_mask)
    mask[0, -1] = True
    data = [eap.PairedDataset.from_tokens(**fields, alignment=[[0, 0, 2]])]
    data.append(eap.PairedDataset.from_tokens(**fields))
    eap.attribute(model, data[0], method="exact", edges=mask, checkpoint=file)
    with pytest.raises(eap.InputError, match="checkpoint of this model, data and request"):
        eap.attribute(model, data[1], method="exact", edges=mask, checkpoint=file)


def test_prompts_may_end_at_the_models_last_position(make_model):
    """Padding beside a longer suffix reaches further than the model has positions."""
    model = make_model("gpt2")
    clean = torch.randint(V, (2, 48), generator=torch.Generator().manual_seed(0))
    corrupted = clean.clone()
    corrupted[0, 45], corrupted[1, 0] = (clean[0, 45] + 1) % V, (clean[1, 0] + 1) % V
    data = eap.PairedDataset.from_tokens(clean, corrupted, [48, 20], [[1, 2], [3, 4]])
    right = sum(eap.attribute(model, data[[e]], steps=2).values for e in range(2)) / 2
    torch.testing.assert_close(eap.attribute(model, data, steps=2, batch_size=2).values, right)


def test_a_corrupted_prompt_beyond_the_models_positions_is_refused(make_model):
    data = eap.PairedDataset.from_tokens([[1, 2]], [[1] * 49], [2], [[1, 2]], corrupted_lengths=[49])
    with pytest.raises(eap.InputError, match="example 0: expected at most the model's 48 tokens, found 49"):
        eap.attribute(make_model("gpt2"), data)


@pytest.mark.parametrize("rules", [None, "relp", "gim"])
@pytest.mark.parametrize("method", ["eap-ig-activations", "eap-conductance"])
def test_other_paths_do_not_depend_on_batching_either(method, rules, make_model, relative):
    model, data = make_model("llama"), unequal_pairs()
    given = {"method": method, "steps": 2, "rules": rules}
    whole = eap.attribute(model, data, **given, keep="examples")
    single = eap.attribute(model, data, **given, batch_size=1, reuse_prefix=False)
    assert relative(single.values, whole.values) < 1e-6
    assert relative(whole.per_example.mean(0), whole.values) < 1e-6


def test_conductance_of_all_edges_into_the_logits_is_the_difference_of_its_ends(make_model):
    """The path begins at the aligned corrupted embeddings; the edges into the logits count all that is on it."""
    model, data = make_model("llama"), unequal_pairs()
    scores = eap.attribute(model, data, method="eap-conductance", steps=100)
    found = float(scores.values[:, scores.graph.logits_receiver].sum())
    clean = eap.evaluate(model, eap.Circuit.from_mask(scores.graph, scores.graph.edge_mask), data).clean
    assert abs(found - (clean - start_of_path(model, data))) < 1e-2 * abs(clean)


def start_of_path(model: Any, data: eap.PairedDataset) -> float:
    """The metric where the path begins: the clean prompt's places with the embeddings that they are compared with."""
    values = []
    with torch.no_grad():
        for e in range(len(data)):
            clean, corrupted, alignment = prompts(data, e)
            embed = model.get_input_embeddings()
            logits = model(inputs_embeds=embed(corrupted[:, alignment])).logits[:, clean.shape[1] - 1]
            values.append(float(difference(data, e, logits)))
    return sum(values) / len(values)


@pytest.mark.parametrize("ablation", ["zero", "mean", "mean-positional"])
def test_constants_do_not_depend_on_how_long_the_corrupted_prompts_are(ablation, make_model, relative):
    """Only the metric may look at these; here one is longer than every clean prompt."""
    model, data = make_model("gpt2"), unequal_pairs(6)[[0, 1]]
    assert data.corrupted_lengths is not None and data.corrupted_lengths.max() > data.lengths.max()
    same = eap.PairedDataset.from_tokens(data.clean, data.clean, data.lengths, data.answers)
    circuit = random_circuit(bind(model).graph("kv"), 1, 0.6)
    found, right = (eap.attribute(model, x, method="eap", ablation=ablation).values for x in (data, same))
    assert relative(found, right) < 1e-6
    found, right = (eap.evaluate(model, circuit, x, ablation=ablation).values for x in (data, same))
    torch.testing.assert_close(found, right)
