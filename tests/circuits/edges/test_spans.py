"""Spans from first principles: scores, circuits and paths of named parts of prompts, by the runs of plain_runs.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import eap_circuits as eap
from bench.pretended import pretending
from eap_circuits.adapters import bind
from eap_circuits.edges import Graph, Spans, prune
from eap_circuits.selfcheck import StayDouble
from eap_circuits.tasks import spans_in
from tests.circuits.calls.behaviours import answered_pairs, runs, scored_pairs, value
from tests.circuits.conftest import random_circuit, random_pairs
from tests.circuits.decoders import Decoder
from tests.circuits.models import KINDS
from tests.circuits.plain_runs import differences, gradients, of_circuit, plain_run
from tests.circuits.recording.unequal_pairs import unequal_pairs

NAMES = ("a", "b")


def with_spans(data: eap.PairedDataset, seed: int = 0) -> eap.PairedDataset:
    """Any tokens are in one span, in the other, or in none."""
    generator = torch.Generator().manual_seed(seed)
    return replace(data, spans=torch.randint(-1, 2, data.clean.shape, generator=generator), span_names=NAMES)


def span_of_tokens(data: eap.PairedDataset, e: int, t: int) -> Tensor:
    """Of a row of a pair: int64 [T]. An answer's tokens are in the rest."""
    found = torch.full((t,), len(NAMES))
    own = data.spans[e, : int(data.lengths[e])]
    found[: len(own)] = torch.where(own < 0, len(NAMES), own)
    return found


METRICS = {"next_token_loss": scored_pairs, "sequence_logprob_diff": answered_pairs}
CASES = [(kind, [*METRICS][i % 2]) for i, kind in enumerate(KINDS)]


@pytest.mark.parametrize(("kind", "metric"), CASES)
def test_a_spans_score_is_the_sum_over_its_tokens(metric, kind, make_model, relative):
    model, data = make_model(kind), with_spans(METRICS[metric](n=2))
    decoder, right = Decoder(model, "kv"), 0
    with StayDouble():
        scores = eap.attribute(model, data, metric, steps=2, keep="spans")
        for e in range(len(data)):
            rows = runs(decoder, data, e)
            clean = [row[2].logits for row in rows]
            for alpha in (0.5, 1.0):
                points = [plain_run(decoder, torch.lerp(y, x, alpha), scored=at) for x, y, _, _, at in rows]
                loss = -value(metric, data, e, [point.logits for point in points], clean)
                for point, (x, _, own, other, _) in zip(points, rows, strict=True):
                    of = torch.nn.functional.one_hot(span_of_tokens(data, e, len(x)), 3).double()
                    each = torch.einsum("utd,vtd,tp->puv", differences(own, other), gradients(loss, point.x), of)
                    right = right + each / 2 / len(data)
    right = right * scores.graph.edge_mask
    assert relative(scores.per_span, right.float()) < 1e-5
    assert relative(scores.values, right.sum(0).float()) < 1e-5
    assert Spans(**scores.info["spans"]) == spans_in(data)


SETTINGS = [
    {"method": "eap", "rules": "relp"},
    {"method": "eap", "ablation": "mean"},
    {"method": "clean-corrupted", "heads": "query"},
    {"method": "eap-ig-activations", "steps": 2},
    {"method": "eap-conductance", "steps": 2},
    {"method": "eap-ig-inputs", "steps": 3, "batch_size": 1},
    {"method": "eap-ig-inputs", "steps": 3, "reuse_prefix": False},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_spans_add_up_to_position_blind_scores(settings, make_model, relative):
    model, data = make_model("llama"), with_spans(random_pairs(n=5))
    blind = eap.attribute(model, data, **settings)
    scores = eap.attribute(model, data, keep=("spans", "positions", "examples", "neurons"), **settings)
    assert relative(scores.values, blind.values) < 1e-5
    assert relative(scores.per_span.sum(0), scores.values) < 1e-6
    alone = eap.attribute(model, data, keep="spans", **settings)
    assert relative(alone.per_span, scores.per_span) < 1e-6
    by_span = alone.by_span()
    assert by_span.graph.base == alone.graph
    assert relative(by_span.across_spans().values, alone.values) < 1e-6
    # No edge that the graph lacks has a score.
    assert not by_span.values[~by_span.graph.edge_mask].any()
    # Of one pair: sums over the positions of each span.
    one = eap.attribute(model, data[0], keep=("positions", "spans"), **settings)
    of = torch.nn.functional.one_hot(span_of_tokens(data, 0, len(one.per_position)), 3).float()
    assert relative(one.per_span, torch.einsum("tuv,tp->puv", one.per_position, of)) < 1e-5


def test_unequal_lengths_are_by_the_clean_prompts_spans(make_model, relative):
    model, data = make_model("gpt2"), with_spans(unequal_pairs(3))
    scores = eap.attribute(model, data, keep="spans", method="eap")
    assert relative(scores.values, eap.attribute(model, data, method="eap").values) < 1e-5
    assert relative(scores.per_span.sum(0), scores.values) < 1e-6


def cubes(graph: Graph, n: int, seed: int = 0) -> list[Tensor]:
    """Flags [P, S, R] by span, also where nothing follows; some receivers keep all, none, or all at one span."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for share in torch.linspace(0.1, 0.9, n).tolist():
        flags = torch.rand(3, graph.n_senders, graph.n_receivers, generator=generator) < share
        whole = torch.rand(3, 1, graph.n_receivers, generator=generator)
        together = torch.rand(1, 1, graph.n_receivers, generator=generator)
        flags = (flags | (whole < 0.2) | (together < 0.15)) & ~((whole > 0.8) | (together > 0.9))
        found.append(flags & graph.edge_mask)
    return found


def circuit_values(
    model: Any, data: eap.PairedDataset, metric: str, cube: Tensor, heads: str, zero: bool
) -> list[float]:
    """A circuit's metric, from runs in which every token has the mask of its span."""
    decoder, found = Decoder(model, heads), []
    for e in range(len(data)):
        rows, logits = runs(decoder, data, e), []
        for x, _, _, other, scored in rows:
            by_token = cube[span_of_tokens(data, e, len(x))].permute(1, 2, 0)
            ablated = [torch.zeros_like(c) for c in other.c] if zero else other.c
            logits.append(plain_run(decoder, x, of_circuit(by_token, ablated), scored).logits)
        found.append(float(value(metric, data, e, logits, [row[2].logits for row in rows])))
    return found


@pytest.mark.parametrize(("kind", "metric"), [*CASES, ("gpt2", "sequence_logprob_diff"), ("llama", "next_token_loss")])
@torch.no_grad()
def test_a_circuit_by_span_is_run_as_it_is_defined(metric, kind, make_model):
    """Also, pruning changes no run under patching: paths between spans are those on which information moves."""
    model, data = make_model(kind), with_spans(METRICS[metric](n=2))
    with StayDouble():
        for heads, ablation in (("kv", "patching"), ("query", "zero")):
            plain = bind(model).graph(heads)
            graph, masks = plain.with_spans(spans_in(data)), cubes(plain, 2)
            circuits = [eap.Circuit(graph, graph.to_spans(cube)) for cube in masks]
            pruned = [circuit.pruned() for circuit in circuits]
            assert [c.n_edges for c in pruned] < [c.n_edges for c in circuits]
            found = eap.evaluate(model, [*circuits, *pruned], data, metric, ablation=ablation)
            for cube, own, same in zip(masks, found, found[2:]):
                right = circuit_values(model, data, metric, cube, heads, ablation == "zero")
                torch.testing.assert_close(own.values.tolist(), right, rtol=0, atol=1e-8)
                # A node that reads nothing writes what it makes of constants; a norm's scale brings other heads into
                # what a head writes.
                if ablation == "patching" and kind not in ("gemma2", "olmo2"):
                    torch.testing.assert_close(same.values, own.values, rtol=0, atol=1e-8)


@torch.no_grad()
def test_prefixes_batches_and_lengths_change_no_circuit(make_model):
    model = make_model("llama")
    for data in (with_spans(random_pairs(n=3)), with_spans(unequal_pairs(3)[:3])):
        plain = bind(model).graph("kv")
        graph = plain.with_spans(spans_in(data))
        circuits = [eap.Circuit(graph, graph.to_spans(cube)) for cube in cubes(plain, 2)]
        with StayDouble():
            right = eap.evaluate(model, circuits, data)
            for more in ({"reuse_prefix": False}, {"batch_size": 1}, {"memory": "1MiB"}):
                for one, two in zip(right, eap.evaluate(model, circuits, data, **more), strict=True):
                    torch.testing.assert_close(one.values, two.values, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ["bamba", "gpt2", "mamba", "qwen3-next"])
@torch.no_grad()
def test_all_spans_are_the_position_blind_circuit_and_no_path_is_cut(family, make_model):
    """Of any mixer: what is pruned away changed nothing."""
    model, data = make_model(family), with_spans(random_pairs(n=4))
    plain = bind(model).graph("kv")
    graph = plain.with_spans(spans_in(data))
    blind = eap.Circuit(plain, cubes(plain, 3)[1].any(0))
    circuits = [eap.Circuit(graph, graph.to_spans(cube)) for cube in cubes(plain, 3)]
    with StayDouble():
        every = [blind, eap.Circuit(graph, graph.to_spans(blind.mask)), *circuits, *(c.pruned() for c in circuits)]
        values = torch.stack([result.values for result in eap.evaluate(model, every, data)])
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(values[2:5], values[5:], rtol=0, atol=1e-6)


def test_edges_are_those_on_a_path_by_brute_force():
    """Every path from any input to a scored logits, walked by names."""
    yes, no = True, False
    spans = Spans(("a", "b", "rest"), ((yes, no, yes), (yes, yes, yes), (no, no, no)), (no, yes, no))
    graph = Graph((2, 1), (1, 1), 4).with_spans(spans)
    owners = {"a0.h0": ["a0.h0<q>", "a0.h0<k>", "a0.h0<v>"], "a0.h1": ["a0.h1<q>", "a0.h0<k>", "a0.h0<v>"]}
    owners |= {"a1.h0": ["a1.h0<q>", "a1.h0<k>", "a1.h0<v>"], "m0": ["m0"], "m1": ["m1"]}
    generator = torch.Generator().manual_seed(0)

    def on_paths(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
        def walk(node: str, span: str, path: list[tuple[str, str]]) -> None:
            for sender, receiver in edges:
                if sender != f"{node}@{span}":
                    continue
                name, longer = receiver.split("@")[0], [*path, (sender, receiver)]
                if receiver == "logits@b":
                    found.update(longer)
                for follower, inputs in owners.items():
                    for other, sees in zip(spans.names, spans.sees):
                        across = name in inputs and name[-2] in "kv" and sees[spans.names.index(span)]
                        if across or (name in inputs and other == span):
                            walk(follower, other, longer)

        found: set[tuple[str, str]] = set()
        for span in ("a", "b"):
            walk("input", span, [])
        return found

    base = eap.Circuit(graph.base, graph.base.edge_mask).edges
    every = {(f"{u}@{span}", f"{v}@{span}") for u, v in base for span in ("a", "b")}
    assert on_paths(every) == set(eap.Circuit(graph, graph.edge_mask).edges)
    for share in (0.2, 0.4, 0.7):
        mask = graph.edge_mask & (torch.rand(graph.edge_mask.shape, generator=generator) < share)
        circuit = eap.Circuit(graph, mask)
        assert set(circuit.pruned().edges) == on_paths(set(circuit.edges))


def test_masks_by_span_are_changed_one_at_a_time(make_model):
    """As docs/spans.md does."""
    plain = bind(make_model("gpt2")).graph("kv")
    for graph in (plain, plain.with_spans(spans_in(with_spans(random_pairs(n=3))))):
        circuit = random_circuit(graph, 0, 0.5)
        for mask in (circuit.mask, graph.edge_mask):
            kept = mask.clone()
            graph.per_span(mask)[0] = False
            assert torch.equal(mask, kept)


@pytest.mark.parametrize("how", ["top", "greedy", "optimal"])
def test_selected_circuits_are_connected_and_as_large_as_asked(how, make_model):
    data = with_spans(random_pairs(n=3))
    scores = eap.attribute(make_model("gpt2"), data, method="eap", keep="spans").by_span()
    for n in (1, 4, 17):
        circuit = scores.select(n, how, exactly=True)
        assert circuit.n_edges == n
        assert torch.equal(prune(scores.graph, circuit.mask), circuit.mask)
        random = eap.graph.random_circuit(scores.graph, n, seed=n)
        assert random.n_edges == n
        assert torch.equal(prune(scores.graph, random.mask), random.mask)
    nodes = {name.partition("@")[2] for name in circuit.nodes}
    assert nodes <= {*NAMES, "rest"}
    flags = circuit.across_spans()
    assert {(u.split("@")[0], v.split("@")[0]) for u, v in circuit.edges} == set(flags.edges)


def test_a_curve_and_files_by_span(make_model, tmp_path):
    model, data = make_model("gpt2"), with_spans(random_pairs(n=4))
    kept = eap.attribute(model, data, keep="spans")
    scores = kept.by_span()
    curve = eap.faithfulness_curve(model, scores, data, (0.05, 0.3, 1.0), baselines=("random", "complement"))
    assert curve.faithfulness[-1] == pytest.approx(1, abs=1e-6)
    assert curve.n_edges[-1] == scores.graph.n_edges
    circuit = curve.circuits[1]
    for result in (kept, scores, circuit):
        result.save(tmp_path / "file.safetensors")
        assert type(result).load(tmp_path / "file.safetensors") == result
    with pytest.raises(eap.InputError, match="EAP-IG's formats: expected a graph without spans"):
        circuit.save(tmp_path / "file.json")
    assert {node.partition("@")[2] for node in circuit.to_networkx()} <= {*NAMES, "rest"}
    card = eap.faithfulness_card(model, circuit, data, seeds=(0,), most_edges=3)
    assert card.faithfulness == pytest.approx(curve.faithfulness[1])
    checkpoint = tmp_path / "values.safetensors"
    first, again = (eap.evaluate(model, circuit, data, checkpoint=checkpoint) for _ in range(2))
    assert torch.equal(first.values, again.values)


def test_what_does_not_fit_is_refused_in_one_sentence(make_model):
    model, plain = make_model("gpt2"), random_pairs(n=4)
    data = with_spans(plain)
    with pytest.raises(eap.InputError, match="keep: expected data with spans"):
        eap.attribute(model, plain, keep="spans")
    for method in ("exact", "information-flow-routes"):
        with pytest.raises(eap.InputError, match=f"keep: expected .* for method '{method}'"):
            eap.attribute(model, data, method=method, keep="spans")
    blind = eap.attribute(model, data)
    with pytest.raises(eap.InputError, match=r'by_span.*keep="spans"'):
        blind.by_span()
    scores = eap.attribute(model, data, keep="spans").by_span()
    circuit = scores.select(9, exactly=True)
    renamed = replace(data, span_names=("a", "c"))
    everywhere = replace(data, spans=torch.zeros_like(data.spans))
    for other, message in (
        (plain, "data: expected spans a, b, rest, as the circuit has, found none"),
        (renamed, "expected spans a, b, rest, as the circuit has, found a, c, rest"),
    ):
        with pytest.raises(eap.InputError, match=message):
            eap.evaluate(model, circuit, other)
    ends = with_spans(plain[0])
    ends.spans[0] = torch.tensor([0, 1, *[-1] * (ends.spans.shape[1] - 2)])
    early = eap.attribute(model, ends, keep="spans").by_span().select(3, exactly=True)
    with pytest.raises(eap.InputError, match="no scored token in span 'a'"):
        eap.evaluate(model, early, everywhere)
    swapped = replace(ends, spans=torch.where(ends.spans < 0, -1, 1 - ends.spans))
    with pytest.raises(eap.InputError, match="no token of span 'a' behind one of 'b'"):
        eap.evaluate(model, early, swapped)
    with pytest.raises(eap.InputError, match="circuit: expected one without spans"):
        eap.evaluate(model, circuit, data, ablation="optimal")
    with pytest.raises(eap.InputError, match="circuit: expected one without spans"):
        eap.optimal_constants(model, circuit, data)
    with pytest.raises(eap.InputError, match="circuit: expected one of"):
        eap.evaluate(make_model("llama"), circuit, data)
    for wrong in ({"names": ["a"]}, {"names": ["rest", "rest"]}, {"scored": [True]}, {"sees": [[1]]}):
        with pytest.raises(eap.InputError, match="spans: expected"):
            Spans(**{**spans_in(data).to_dict(), **wrong})


def test_on_a_gpu_as_on_the_cpu(make_model, relative):
    """A pretended one: what is sent where, and that masks are read apart."""
    model, data = make_model("llama", torch.float32), with_spans(scored_pairs(n=3))

    def found(model: Any) -> tuple[Tensor, Tensor]:
        scores = eap.attribute(model, data, "next_token_loss", method="eap", keep="spans")
        graph = scores.by_span().graph
        circuits = [eap.Circuit(graph, graph.to_spans(cube)) for cube in cubes(graph.base, 3)]
        results = eap.evaluate(model, circuits, data, "next_token_loss")
        return scores.per_span, torch.stack([result.values for result in results])

    right = found(model)
    with pretending():
        for one, other in zip(found(model.to("cuda")), right, strict=True):
            assert relative(one, other) < 1e-5
