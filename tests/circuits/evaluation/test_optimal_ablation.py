"""Learned constants: their gradient, what they are worth, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import eap_circuits as eap
from eap_circuits.adapters import bind
from eap_circuits.budget import PeakBytes
from eap_circuits.evaluation import faithfulness, optimal_ablation
from eap_circuits.forward import Constants, Runner, borrowed, make_batches
from eap_circuits.intervention import learning_run
from eap_circuits.recording import ABLATIONS, record_run
from eap_circuits.request import Measurement, prepare
from eap_circuits.selfcheck import StayDouble
from tests.circuits.budget.test_memory import longer_pairs
from tests.circuits.conftest import random_circuit


def circuit_of(model, heads="kv", share=0.4, seed=0):
    return random_circuit(bind(model).graph(heads), seed, share)


@pytest.mark.parametrize("heads", ["kv", "query"])
@pytest.mark.parametrize("share", [0.0, 0.4, 0.95])
def test_what_is_followed_is_the_gradient_of_what_evaluate_measures(kind, heads, share, make_model, make_pairs):
    """Finite differences of the evaluated metric along random moves of all constants."""
    model, data = make_model(kind), make_pairs(seed=3, n=3)
    circuit = circuit_of(model, heads, share)
    generator = torch.Generator().manual_seed(1)
    with StayDouble():
        run = prepare(model, data, "logit_diff", "mean", None)
        with borrowed(model):
            constants = run.with_constants().constants.map(lambda x: x.clone().requires_grad_(True))
            for batch in make_batches(run.data, 2, False, run.arch.device):
                runner = Runner(run.arch, circuit.graph, batch)
                ablated = record_run(runner, False, constants)
                (logits,) = learning_run(runner, circuit.graph, ablated, circuit.mask[None])
                Measurement(run, batch, logits, logits).values(logits).sum().backward()
        for _ in range(2):
            moves = constants.map(lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype))
            slope = sum(
                float((x.grad * move).sum()) for x, move in zip(constants.tensors, moves.tensors) if x.grad is not None
            )
            size = 1e-5
            ends = [
                Constants.of_tensors(
                    [x.detach() + sign * size * move for x, move in zip(constants.tensors, moves.tensors)]
                )
                for sign in (1, -1)
            ]
            high, low = (eap.evaluate(model, circuit, data, ablation=end).values.sum() for end in ends)
            assert slope == pytest.approx(float(high - low) / (2 * size), rel=1e-5, abs=1e-7)


def test_they_are_better_than_means_and_do_not_depend_on_batching(make_model, make_pairs, relative):
    model, data = make_model("llama"), make_pairs(seed=3)
    circuit = circuit_of(model)
    found = eap.optimal_constants(model, circuit, data, "kl_divergence", steps=15)
    learned, mean = (eap.evaluate(model, circuit, data, "kl_divergence", ablation=a).mean for a in (found, "mean"))
    assert learned > mean
    again = eap.optimal_constants(model, circuit, data[[4, 2, 0, 6, 1, 3, 5]], "kl_divergence", steps=15, batch_size=2)
    for one, two in zip(found.tensors, again.tensors):
        assert relative(one, two) < 1e-6
    assert not any(x.requires_grad for x in found.tensors)
    # A rate at which every step leads away: the best seen is where it began.
    wild = eap.optimal_constants(model, circuit, data, "kl_divergence", steps=2, rate=1e4)
    assert eap.evaluate(model, circuit, data, "kl_divergence", ablation=wild).mean >= mean - 1e-9


def test_any_metric_can_be_raised(make_model, make_pairs):
    model, data = make_model("gpt2"), make_pairs(seed=3)
    circuit = circuit_of(model)
    found = eap.optimal_constants(model, circuit, data, "logit_diff", steps=15)
    assert (
        eap.evaluate(model, circuit, data, ablation=found).mean
        > eap.evaluate(model, circuit, data, ablation="mean").mean
    )


def test_evaluate_learns_for_each_circuit_on_the_ablation_data(make_model, make_pairs, monkeypatch):
    model, data, lessons = make_model("llama"), make_pairs(seed=3), make_pairs(seed=4)
    few = lambda *given, **more: eap.optimal_constants(*given, **more, steps=3)  # noqa: E731
    monkeypatch.setattr(faithfulness, "optimal_constants", few)
    circuits = [circuit_of(model, share=0.3), circuit_of(model, "query", share=0.8)]
    seen = []
    both = eap.evaluate(
        model, circuits, data, ablation="optimal", ablation_data=lessons, progress=lambda *x: seen.append(x)
    )
    graph = circuits[0].graph
    none = eap.Circuit.from_mask(graph, torch.zeros_like(graph.edge_mask))
    lowest = eap.evaluate(model, none, data, ablation=few(model, none, lessons, "kl_divergence"))
    for circuit, result in zip(circuits, both):
        right = eap.evaluate(model, circuit, data, ablation=few(model, circuit, lessons, "kl_divergence"))
        torch.testing.assert_close(result.values, right.values)
        torch.testing.assert_close(result.corrupted_values, lowest.values)
    assert seen[-1] == (7, 7)
    alone = eap.evaluate(model, circuits[0], data, ablation="optimal", ablation_data=lessons)
    torch.testing.assert_close(alone.values, both[0].values)
    full = eap.Circuit.from_mask(graph, graph.edge_mask)
    assert eap.evaluate(model, full, data, ablation="optimal").faithfulness == pytest.approx(1)


def test_learned_constants_score_edges(make_model, make_pairs, relative):
    """Scores with the constants are those with any others of the same values."""
    model, data = make_model("llama"), make_pairs(seed=3)
    run = prepare(model, data, "logit_diff", "mean", None)
    with borrowed(model):
        means = run.with_constants().constants
    scores = eap.attribute(model, data, ablation=means, steps=2)
    assert relative(scores.values, eap.attribute(model, data, ablation="mean", steps=2).values) < 1e-6
    assert scores.info["ablation"] == "constants"


def test_the_model_comes_back_as_it_was(make_model, make_pairs):
    model, data = make_model("gemma2").train(), make_pairs(seed=3)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    eap.optimal_constants(model, circuit_of(model), data, "kl_divergence", steps=1)
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 0}, "steps: expected a whole number of at least 1, found 0"),
        ({"rate": 0}, "rate: expected a positive number, found 0"),
        ({"rate": float("nan")}, "rate: expected a positive number"),
        ({"metric": "rank"}, "metric: expected values that depend differentiably"),
        ({"circuit": "c.json"}, "circuit: expected a Circuit"),
    ],
)
def test_bad_requests_are_one_sentence(settings, words, make_model, make_pairs):
    model = make_model("gpt2")
    given = {"circuit": circuit_of(model), "data": make_pairs(), **settings}
    with pytest.raises(eap.InputError, match=words):
        eap.optimal_constants(model, **given)


def test_constants_of_another_model_are_refused(make_model, make_pairs):
    llama, model, data = make_model("llama"), make_model("gpt2"), make_pairs()
    constants = eap.optimal_constants(llama, circuit_of(llama), data, "kl_divergence", steps=1)
    circuit = circuit_of(model)
    for attempt in (
        lambda: eap.evaluate(model, circuit, data, ablation=constants),
        lambda: eap.attribute(model, data, ablation=constants),
    ):
        with pytest.raises(eap.InputError, match="ablation: expected constants of this model"):
            attempt()
    with pytest.raises(eap.InputError, match=r"ablation_data: expected none, except for .* found some for constants"):
        eap.evaluate(llama, circuit_of(llama), data, ablation=constants, ablation_data=data)
    few = constants.map(lambda x: x.repeat(3, 1))
    with pytest.raises(eap.InputError, match=r"ablation: expected constants for .* positions"):
        eap.evaluate(llama, circuit_of(llama), data, ablation=few)


def test_the_pages_example_runs(make_model, make_pairs, monkeypatch, capsys):
    """docs/ablations.md, on a tiny model and random prompts."""
    page = (Path(__file__).parents[3] / "docs" / "ablations.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)

    def load_task(name, tokenizer, n, seed):
        pairs = make_pairs(seed=seed, n=n)
        return eap.PairedDataset.from_tokens(pairs.clean, pairs.corrupted, torch.full((n,), 11), pairs.answers)

    monkeypatch.setattr(eap, "load_task", load_task)
    names = {"model": make_model("llama"), "tokenizer": None}
    exec(example, names)
    assert capsys.readouterr().out.count("EvaluationResult") == 2
    for ablation in ABLATIONS:
        assert f'`"{ablation}"`' in page


def test_learning_keeps_to_its_budget(make_model, relative):
    model, data = make_model("llama"), longer_pairs(longest=20)
    circuit = circuit_of(model)

    def learn(memory):
        with PeakBytes() as taken:
            found = eap.optimal_constants(model, circuit, data, "kl_divergence", steps=2, memory=memory)
        return found, taken.peak

    right, all_at_once = learn(None)
    budget = all_at_once // 2
    found, peak = learn(budget)
    assert peak <= budget
    for one, two in zip(found.tensors, right.tensors):
        assert relative(one, two) < 1e-6
    with pytest.raises(eap.InputError, match="memory: expected bytes"):
        learn("much")


@pytest.mark.parametrize("later", [0, 24])
def test_learning_goes_on_with_smaller_batches(later, make_model, relative, monkeypatch):
    """No prompt is lost, or learned from twice, also where memory runs out in a later step."""
    model, data, ran = make_model("llama"), longer_pairs(longest=20), []
    circuit = circuit_of(model)
    right = eap.optimal_constants(model, circuit, data, "kl_divergence", steps=4)

    def run(runner, *given):
        logits = learning_run(runner, *given)
        if runner.batch.clean.numel() > 60 and len(ran) >= later:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore lines")
        ran.extend(runner.batch.index.tolist())
        return logits

    monkeypatch.setattr(optimal_ablation, "learning_run", run)
    found = eap.optimal_constants(model, circuit, data, "kl_divergence", steps=4)
    assert sorted(ran) == sorted(5 * list(range(12)))
    for one, two in zip(found.tensors, right.tensors):
        assert relative(one, two) < 1e-6
