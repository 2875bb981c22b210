"""Memory: budgets are understood and kept, what a run takes is predicted, and running out loses nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import eap_circuits as eap
from eap_circuits.capture import PeakBytes, parse_bytes
from eap_circuits.methods import METHODS, gradient, planning


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 * 2**30), ("500 MB", 500_000_000), ("1.5kib", 1536), (77, 77), ("77", 77), ("2TB", 2 * 10**12)],
)
def test_budgets_are_understood(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("bad", ["8 GG", "-1GiB", "", "GiB", 1.5, True, "1e9"])
def test_other_budgets_are_refused(bad, make_model, make_pairs):
    with pytest.raises(eap.InputError, match='memory: expected bytes, such as "8GiB"'):
        eap.attribute(make_model("gpt2"), make_pairs(), memory=bad)


def test_peak_bytes_are_those_of_living_tensors():
    weight = torch.ones(1000, requires_grad=True)
    with PeakBytes() as count:
        doubled = weight * 2  # 4000 bytes
        view = doubled[::2]  # nothing of its own
        del doubled
        exp = view.exp()  # 2000 more, and kept for the backward
        del view
    assert count.peak == 6000
    with PeakBytes() as count:
        torch.empty(500)
        torch.empty(250)
        count.lap()
        torch.empty(100)
    assert count.laps == [2000] and count.peak == 400
    assert exp.shape == (500,)


def longer_pairs(n=12, longest=24):
    generator = torch.Generator().manual_seed(3)
    clean = torch.randint(0, 59, (n, longest), generator=generator)
    corrupted = clean.clone()
    corrupted[:, 12] = (clean[:, 12] + 1) % 59
    return eap.PairedDataset.from_tokens(
        clean, corrupted, torch.full((n,), longest), clean[:, :2] % 7 + torch.arange(2) * 8
    )


@pytest.mark.parametrize("settings", [{}, {"reuse_prefix": False}, {"heads": "query"}, {"batch_size": 5}, {"steps": 1}])
def test_what_attribution_takes_is_predicted(settings, make_model, monkeypatch):
    """Within a tenth of what the tensors of the whole run take; the plan itself ran two examples."""
    model, data = make_model("llama"), longer_pairs()
    monkeypatch.setattr(planning, "most_tokens", lambda device: 300)
    plan = eap.plan(model, data, **settings)
    with PeakBytes() as count:
        eap.attribute(model, data, **settings)
    assert abs(plan.bytes - count.peak) <= 0.1 * count.peak
    assert sum(examples for examples, _, _ in plan.batches) == len(data)


@pytest.mark.parametrize("reuse_prefix", [True, False])
def test_a_budget_is_kept_and_changes_no_score(reuse_prefix, make_model, relative):
    model, data = make_model("llama"), longer_pairs()
    given = {"steps": 6, "reuse_prefix": reuse_prefix}
    whole = eap.plan(model, data, **given)
    budget = whole.bytes // 3
    plan = eap.plan(model, data, memory=budget, **given)
    assert plan.bytes <= budget == plan.budget
    assert plan.tokens < whole.tokens
    with PeakBytes() as count:
        scores = eap.attribute(model, data, memory=budget, **given)
    assert count.peak <= 1.1 * budget
    assert relative(scores.values, eap.attribute(model, data, **given).values) < 1e-6


def score_by(scorer, monkeypatch):
    monkeypatch.setitem(METHODS, "eap-ig-inputs", replace(METHODS["eap-ig-inputs"], scorer=scorer))


def fails_above(tokens, monkeypatch):
    """As if memory ran out in passes of more tokens; returns the examples that were scored."""
    original, scored = METHODS["eap-ig-inputs"].scorer, []

    def run(run_, graph, path, batch, limit):
        at_once = gradient.steps_at_once(batch, len(path), limit)
        found = original(run_, graph, path, batch, limit)
        if batch.clean.numel() * at_once > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore lines")
        scored.extend(batch.index.tolist())
        return found

    score_by(run, monkeypatch)
    return scored


@pytest.mark.parametrize("fits", [200, 60, 12])
@pytest.mark.parametrize("batch_size", [None, 7])
def test_where_memory_runs_out_each_example_still_counts_once(fits, batch_size, make_model, relative, monkeypatch):
    model, data = make_model("gpt2"), longer_pairs()
    right = eap.attribute(model, data, batch_size=batch_size)
    scored = fails_above(fits, monkeypatch)
    done = []
    found = eap.attribute(model, data, batch_size=batch_size, progress=lambda *x: done.append(x))
    assert sorted(scored) == list(range(len(data)))
    assert relative(found.values, right.values) < 1e-6
    assert done[-1] == (len(data), len(data))


def test_too_little_memory_for_one_example_is_one_sentence(make_model, monkeypatch):
    model, data = make_model("gpt2"), longer_pairs()
    fails_above(11, monkeypatch)
    with pytest.raises(eap.InputError, match=r"memory: expected enough for one example of 12 tokens, got CUDA out of"):
        eap.attribute(model, data)


def test_another_error_is_not_taken_for_want_of_memory(make_model, monkeypatch):
    def run(*_):
        raise RuntimeError("something else")

    score_by(run, monkeypatch)
    with pytest.raises(RuntimeError, match="something else"):
        eap.attribute(make_model("gpt2"), longer_pairs())


def test_evaluation_goes_on_with_less_at_once(make_model, monkeypatch):
    model, data = make_model("llama"), longer_pairs()
    scores = eap.attribute(model, data, method="eap")
    circuits = [scores.select(n) for n in (10, 40, 90)]
    right = eap.evaluate(model, circuits, data)
    module = __import__("eap_circuits.evaluation.evaluate", fromlist=["run_circuits"])
    original = module.run_circuits

    def run(runner, graph, corrupted, masks, tokens):
        if min(tokens // runner.batch.clean.numel(), len(masks)) * runner.batch.clean.numel() > 50:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
        return original(runner, graph, corrupted, masks, tokens)

    monkeypatch.setattr(module, "run_circuits", run)
    for found, whole in zip(eap.evaluate(model, circuits, data), right):
        assert torch.allclose(found.values, whole.values, rtol=1e-9, atol=1e-9)
