"""Behaviours of more than one next token: every number by hand, from the runs of plain_runs.py in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import pad

import eap_circuits as eap
from eap_circuits.adapters import bind
from eap_circuits.forward import borrowed
from eap_circuits.recording import deviations
from eap_circuits.request import prepare
from eap_circuits.selfcheck import StayDouble
from tests.circuits.calls.behaviours import (
    CASES,
    alone,
    answered_pairs,
    case,
    circuit_values,
    rows_of,
    runs,
    scores_by_hand,
    value,
)
from tests.circuits.conftest import pairs_for, random_circuit, random_edges, random_pairs, tiny_model, watch
from tests.circuits.decoders import Decoder
from tests.circuits.plain_runs import gradients, of_circuit, plain_run
from tests.circuits.recording.unequal_pairs import unequal_pairs


@pytest.mark.parametrize("metric", CASES)
@pytest.mark.parametrize("reuse_prefix", [True, False])
def test_scores_are_their_definition(metric, reuse_prefix, relative):
    model, data = tiny_model("llama"), case(metric)
    with StayDouble():
        found = eap.attribute(
            model, data, metric, steps=2, quadrature="midpoint", batch_size=2, reuse_prefix=reuse_prefix
        )
        right = scores_by_hand(model, data, metric, [0.25, 0.75])
    edges = found.graph.edge_mask
    assert relative(found.values[edges], right[edges]) < 1e-6


@pytest.mark.parametrize("metric", ["next_token_loss", "sequence_logprob_diff"])
def test_scores_are_their_definition_in_every_family(metric, kind, relative):
    model, data = tiny_model(kind), case(metric, 2)
    with StayDouble():
        found = eap.attribute(model, data, metric, method="eap")
        right = scores_by_hand(model, data, metric, [1.0])
    edges = found.graph.edge_mask
    assert relative(found.values[edges], right[edges]) < 1e-6


@pytest.mark.parametrize("metric", CASES)
@torch.no_grad()
def test_circuits_are_their_definition(metric):
    model, data = tiny_model("llama"), case(metric, 2)
    graph = bind(model).graph("kv")
    circuits = [random_circuit(graph, seed, share) for seed, share in ((0, 0.3), (1, 0.7))]
    with StayDouble():
        found = eap.evaluate(model, circuits, data, metric)
        masks = [graph.edge_mask, torch.zeros_like(graph.edge_mask), *(circuit.mask for circuit in circuits)]
        values = [found[0].clean_values, found[0].corrupted_values, *(result.values for result in found)]
        for own, mask in zip(values, masks, strict=True):
            assert own.tolist() == pytest.approx(circuit_values(model, data, metric, mask), abs=1e-9)


@pytest.mark.parametrize("metric", ["kl_divergence", "sequence_logprob_diff"])
@torch.no_grad()
def test_circuits_in_every_family(metric, kind):
    model, data = tiny_model(kind), case(metric, 2)
    circuit = random_circuit(bind(model).graph("query"), 0, 0.6)
    with StayDouble():
        found = eap.evaluate(model, circuit, data, metric)
        right = circuit_values(model, data, metric, circuit.mask, "query")
    assert found.values.tolist() == pytest.approx(right, abs=1e-9)


@pytest.mark.parametrize("metric", ["next_token_loss", "rank", "sequence_logprob"])
@torch.no_grad()
def test_exact_scores_are_their_definition(metric):
    model, data = tiny_model("gpt2"), case(metric, 2)
    graph = bind(model).graph("kv")
    mask = torch.zeros_like(graph.edge_mask)
    mask[tuple(zip(*random_edges(graph, 3)))] = True
    with StayDouble():
        found = eap.attribute(model, data, metric, method="exact", edges=mask)
        for u, v in mask.nonzero().tolist() if metric != "rank" else []:
            without = graph.edge_mask.clone()
            without[u, v] = False
            pairs = zip(*(circuit_values(model, data, metric, each) for each in (graph.edge_mask, without)))
            effect = sum(a - b for a, b in pairs) / len(data)
            assert float(found.values[u, v]) == pytest.approx(effect, abs=1e-8)


def test_scores_are_the_slope_of_the_metric_along_an_edge():
    """By finite differences of circuits' values, of a metric that takes all rows of a pair together."""
    model, data, step = tiny_model("llama"), answered_pairs(n=2), 1e-5
    graph = bind(model).graph("kv")
    with StayDouble():
        found = eap.attribute(model, data, "sequence_logprob_diff", method="eap")
        for u, v in random_edges(graph, 3):
            ends = []
            for sign in (1, -1):
                mask = graph.edge_mask.double()
                mask[u, v] -= sign * step
                with torch.no_grad():
                    ends.append(sum(circuit_values(model, data, "sequence_logprob_diff", mask)) / len(data))
            slope = (ends[1] - ends[0]) / (2 * step)
            assert float(found.values[u, v]) == pytest.approx(slope, abs=1e-6 * float(found.values.abs().max()))


# What must not matter, and what must be as it was.

METHODS = ("eap-ig-inputs", "eap-ig-activations", "clean-corrupted", "eap-conductance", "eap-gp")


@pytest.mark.parametrize("metric", ["kl_divergence", "sequence_logprob_diff"])
def test_results_do_not_depend_on_how_the_work_is_cut(metric, relative, tmp_path):
    model, data = tiny_model("gpt2"), case(metric, 4)
    wide = replace(data, clean=pad(data.clean, (0, 3), value=7), corrupted=pad(data.corrupted, (0, 3)))
    for method in METHODS:
        right = eap.attribute(model, data, metric, method=method, steps=2, keep=("examples", "positions"))
        assert relative(right.per_example.mean(0), right.values) < 1e-6
        assert relative(right.per_position.sum(0), right.values) < 1e-6
        cut: dict[str, Any] = {"method": method, "steps": 2, "batch_size": 1, "reuse_prefix": False}
        assert relative(eap.attribute(model, wide, metric, **cut).values, right.values) < 1e-6
    circuit = right.select(30)
    curve = eap.faithfulness_curve(model, right, data, (0.2, 1.0), metric=metric, baselines=("complement",))
    assert curve.faithfulness[-1] == pytest.approx(1)
    result = eap.evaluate(model, circuit, data, metric)
    for part in (wide, data[[0, 1, 2, 3]]):
        again = eap.evaluate(model, circuit, part, metric, batch_size=3, reuse_prefix=False)
        assert again.values.tolist() == pytest.approx(result.values.tolist(), abs=1e-9)
    path = tmp_path / "data.safetensors"
    data.save(path)
    stored = eap.PairedDataset.from_file(path)
    assert eap.evaluate(model, circuit, stored, metric).values.tolist() == result.values.tolist()


@pytest.mark.parametrize("whole", [True, False])
@torch.no_grad()
def test_pairs_of_unequal_lengths_are_scored_where_they_are_aligned(whole):
    model, data = tiny_model("gpt2"), unequal_pairs(n=3)
    metric, decoder = "sequence_logprob" if whole else "next_token_loss", Decoder(model, "kv")
    if whole:
        data = replace(data, answers=answered_pairs(n=3).answers, variants=None)
    else:
        data = replace(data, scored=torch.stack([data.lengths - 3, data.lengths - 2], 1))
        data = replace(data, scored_weights=torch.ones(3, 2))
    circuit = random_circuit(bind(model).graph("kv"), 0, 0.5)
    with StayDouble():
        results = [eap.evaluate(model, circuit, data, metric, reuse_prefix=n > 1, batch_size=n) for n in (1, 3)]
        for e in range(3):
            clean, corrupted = [], []
            for own, other, scored, _ in rows_of(data, e):
                n, m = int(data.lengths[e]), int(data.corrupted_lengths[e])
                there = [int(data.alignment[e, p]) if p < n else p - n + m for p in scored]
                clean.append(plain_run(decoder, decoder.embed(own), scored=scored).logits)
                corrupted.append(plain_run(decoder, decoder.embed(other), scored=there).logits)
            for result in results:
                assert float(result.clean_values[e]) == pytest.approx(float(value(metric, data, e, clean, clean)))
                assert float(result.corrupted_values[e]) == pytest.approx(
                    float(value(metric, data, e, corrupted, clean))
                )
    assert results[0].values.tolist() == pytest.approx(results[1].values.tolist(), abs=1e-9)


def test_the_last_position_alone_gives_the_same_bits():
    model, data = tiny_model("llama"), random_pairs()
    last = replace(data, scored=data.lengths[:, None] - 1)
    for metric in ("logit_diff", "kl_divergence"):
        one, other = (eap.attribute(model, each, metric, steps=2).values for each in (data, last))
        assert torch.equal(one, other)


@pytest.mark.parametrize("metric", ["kl_divergence", "sequence_logprob"])
def test_logits_are_computed_only_where_they_are_scored(metric, monkeypatch):
    """Of every copy of the prompts that runs; and the last layer's MLP runs there only."""
    model, data = tiny_model("llama"), case(metric, 2)
    rows = [row for e in range(len(data)) for row in rows_of(data, e)]
    scored, seen = sum(len(row[2]) for row in rows), {"head": set(), "mlp": set()}
    modules = {"head": model.lm_head, "mlp": model.model.layers[-1].mlp}
    for name, module in modules.items():
        watch(module, lambda y, *_, name=name: seen[name].add(y.shape[:2].numel()))
    for _ in range(2):  # a first call looks at one prompt besides
        [each.clear() for each in seen.values()]
        eap.attribute(model, data, metric, method="eap", batch_size=2, reuse_prefix=False)
    # Both prompts run together, or one after the other.
    assert seen["head"] <= {scored, 2 * scored} and seen["mlp"] <= {scored, 2 * scored}


@pytest.mark.parametrize("metric", ["kl_divergence", "sequence_logprob_diff"])
def test_a_single_token_is_what_it_was(metric, relative):
    """Answers of one token in the layout of several give what the answer's logits give."""
    model, data = tiny_model("llama"), random_pairs()
    whole = replace(data, answers=data.answers[..., None, None], variants=None)
    plain = "logit_diff" if metric == "sequence_logprob_diff" else metric
    one, other = (eap.attribute(model, d, m, steps=2).values for d, m in ((data, plain), (whole, metric)))
    assert relative(one, other) < 1e-6
    assert relative(eap.attribute(model, data, metric, steps=2).values, other) < 1e-6


@pytest.mark.parametrize("metric", ["kl_divergence", "sequence_logprob_diff"])
def test_masks_and_constants_are_learned_and_plans_are_made(metric, relative):
    model, data = tiny_model("llama"), case(metric, 3)
    start = eap.attribute(model, data, metric, method="eap")
    masks = [
        eap.learn_mask(model, data, metric, start=start, steps=2, examples=3, reuse_prefix=r) for r in (True, False)
    ]
    assert torch.equal(masks[0].values, masks[1].values)
    circuit = start.select(40)
    constants = eap.optimal_constants(model, circuit, data, metric, steps=3, batch_size=2)
    means = eap.evaluate(model, circuit, data, metric, ablation="mean")
    assert eap.evaluate(model, circuit, data, metric, ablation=constants).mean >= means.mean - 1e-9
    plan = eap.plan(model, data, metric, batch_size=1)
    assert len(plan.batches) == len(data)


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    model, data = tiny_model("llama"), answered_pairs()
    settings: dict[str, Any] = {"metric": "token_logprob_diff", "steps": 2, "batch_size": 1}
    right, path = eap.attribute(model, data, **settings), tmp_path / "run.safetensors"

    def interrupt(done: int, _: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        eap.attribute(model, data, **settings, checkpoint=path, progress=interrupt)
    with pytest.raises(eap.InputError, match="data"):
        eap.attribute(model, replace(data, weights=[1, 2, 1]), **settings, checkpoint=path)
    assert torch.equal(eap.attribute(model, data, **settings, checkpoint=path).values, right.values)


# Prompts without corrupted ones, several corrupted ones, and weights.


@pytest.mark.parametrize("metric", ["next_token_loss", "sequence_logprob"])
@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_prompts_alone_are_ablated_to_constants(metric, ablation, relative):
    model = tiny_model("llama")
    decoder, data = Decoder(model, "kv"), alone(case(metric, 2))
    circuit = random_circuit(bind(model).graph("kv"), 0, 0.5)
    with StayDouble():
        pairs = [runs(decoder, data, e) for e in range(len(data))]
        every = [torch.stack(row[2].c) for rows in pairs for row in rows]  # of [S, T, D]
        constant = torch.cat(every, 1).mean(1, keepdim=True) * (ablation == "mean")
        found = eap.attribute(model, data, metric, method="eap", ablation=ablation)
        result = eap.evaluate(model, circuit, data, metric, ablation=ablation)
        total = torch.zeros_like(found.values, dtype=torch.float64)
        for e, rows in enumerate(pairs):
            clean = [row[2].logits for row in rows]
            loss = -value(metric, data, e, clean, clean)
            logits = []
            for x, _, run, _, scored in rows:
                delta = (constant - torch.stack(run.c)).detach()
                total += torch.einsum("utd,vtd->uv", delta, gradients(loss, run.x)) / len(data)
                ablated = constant.expand(-1, len(x), -1)
                logits.append(plain_run(decoder, x, of_circuit(circuit.mask, ablated), scored).logits)
            assert float(result.values[e]) == pytest.approx(float(value(metric, data, e, logits, clean)), abs=1e-9)
        edges = found.graph.edge_mask
        assert relative(found.values[edges], total[edges]) < 1e-6


@pytest.mark.parametrize("method", ["eap", "exact", "information-flow-routes"])
def test_weights_are_those_of_pairs_that_repeat(method, relative):
    model, data = tiny_model("gpt2"), random_pairs(n=3)
    edges = {"edges": random_circuit(bind(model).graph("kv"), 1, 0.4)} if method == "exact" else {}
    repeated, weighted = data[[0, 0, 0, 1, 2]], replace(data, weights=[1.5, 0.5, 0.5])
    one, other = (eap.attribute(model, each, method=method, **edges) for each in (repeated, weighted))
    assert relative(one.values, other.values) < 1e-6
    circuit = other.select(20)
    one, other = (eap.evaluate(model, circuit, each) for each in (repeated, weighted))
    assert (one.mean, one.faithfulness) == pytest.approx((other.mean, other.faithfulness), abs=1e-9)


@pytest.mark.parametrize("ablation", ["mean", "mean-positional"])
@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_weights_count_in_means_of_prompts(ablation, kind, relative):
    model, data = tiny_model(kind), pairs_for(kind)[:3]
    repeated, weighted = data[[0, 0, 0, 1, 2]], replace(data, weights=[1.5, 0.5, 0.5])
    plain = replace(data, weights=None)
    circuit = random_circuit(bind(model).graph("kv"), 1, 0.4)
    with StayDouble():
        found = [eap.evaluate(model, circuit, plain, ablation=ablation, ablation_data=x) for x in (repeated, weighted)]
        torch.testing.assert_close(found[0].values, found[1].values, atol=1e-9, rtol=1e-9)
        without = eap.evaluate(model, circuit, plain, ablation=ablation)
        assert (without.values - found[0].values).abs().max() > 1e-6
        with borrowed(model):
            asked = [prepare(model, x, None, ablation).with_constants() for x in (repeated, weighted)]
            spread = [deviations(x.arch, x.batches(1024), x.constants) for x in asked]
        for one, other in zip(*(each.tensors for each in spread), strict=True):
            torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-6)
        if kind == "gpt2":
            constants = [eap.optimal_constants(model, circuit, x, steps=2) for x in (repeated, weighted)]
            for one, other in zip(*(each.tensors for each in constants), strict=True):
                assert relative(one, other) < 1e-6
