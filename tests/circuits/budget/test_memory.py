"""Memory: budgets are understood and kept, what a run takes is predicted, and running out loses nothing."""

from __future__ import annotations

from functools import partial
from itertools import cycle

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import eap_circuits as eap
from bench.pretended import pretending
from eap_circuits.budget import PeakBytes
from eap_circuits.intervention import CircuitRuns, PatchedEdges
from eap_circuits.methods.gradient import inputs
from eap_circuits.methods.gradient import method as gradient
from eap_circuits.recording import contraction
from eap_circuits.request import parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 * 2**30), ("500 MB", 500_000_000), ("1.5kib", 1536), (77, 77), ("77", 77), ("2TB", 2 * 10**12)],
)
def test_budgets_are_understood(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("bad", ["8 GG", "-1GiB", "", "GiB", 1.5, True, "1e9", "9" * 400 + "GB"])
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
        count.lap()
    assert count.laps == [2000, 400] and count.peak == 2000
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
    monkeypatch.setattr(gradient, "most_tokens", lambda device: 300)
    plan = eap.plan(model, data, **settings)
    with PeakBytes() as count:
        eap.attribute(model, data, **settings)
    assert abs(plan.bytes - count.peak) <= 0.1 * count.peak
    assert sum(examples for examples, _, _ in plan.batches) == len(data)


def test_where_memory_is_plenty_nothing_runs_only_to_be_measured(make_model, monkeypatch):
    def refuse(count):
        raise AssertionError("a run was measured")

    monkeypatch.setattr(PeakBytes, "__enter__", refuse)
    model, data = make_model("llama"), longer_pairs()
    scores = eap.attribute(model, data)
    eap.evaluate(model, [scores.select(n) for n in (10, 60)], data)
    eap.attribute(model, data[:2], method="exact", edges=scores.select(5))


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


def test_rows_that_a_gpu_expands_are_within_the_budget(monkeypatch):
    """They are made inside an operator, where no tensors are counted."""
    config = LlamaConfig(vocab_size=59, hidden_size=512, intermediate_size=1024, num_hidden_layers=6)
    clean = torch.randint(59, (64, 32), generator=torch.Generator().manual_seed(0))
    data = eap.PairedDataset.from_tokens(clean, (clean + 1) % 59, torch.full((64,), 32), clean[:, :2])
    meet, rows = contraction.head_space_scores, []

    def met(senders, receivers, reach, workspace=None):
        nodes = sum(group.values.shape[1] for group in (*senders, *receivers))
        width, tokens = senders[0].values.shape[2], len(senders[0].values)
        expanded = nodes * tokens * width * senders[0].values.element_size()
        rows.append(expanded if workspace is None else min(workspace, expanded))
        return meet(senders, receivers, reach, workspace=workspace)

    monkeypatch.setattr(contraction, "head_space_scores", met)
    budget = 600 * 2**20
    with pretending(shapes=True):
        with torch.device("meta"):
            model = LlamaForCausalLM(config).to(torch.bfloat16).eval().to("cuda")
        plan = eap.plan(model, data, memory=budget)
        rows.clear()
        with PeakBytes() as count:
            eap.attribute(model, data, memory=budget)
    assert plan.bytes <= budget and max(rows) < count.peak
    assert count.peak + max(rows) <= 1.1 * budget


def fails_above(tokens, monkeypatch):
    """As if memory ran out in passes of more tokens; returns the examples that were scored."""
    original, scored = inputs.InputsMethod.score, []
    # Some say nothing.
    errors = cycle([partial(torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate\nmore lines"), MemoryError])

    def run(method, request, scores, passes):
        original(method, request, scores, passes)
        if scores.batch.clean.numel() * passes.together > tokens:
            raise next(errors)()
        scored.extend(scores.batch.index.tolist())

    monkeypatch.setattr(inputs.InputsMethod, "score", run)
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
    with pytest.raises(
        eap.InputError, match=r"memory: expected enough for one example of 12 tokens, got (CUDA out|MemoryE)"
    ):
        eap.attribute(model, data)


def test_another_error_is_not_taken_for_want_of_memory(make_model, monkeypatch):
    def run(*_):
        raise RuntimeError("something else")

    monkeypatch.setattr(inputs.InputsMethod, "score", run)
    with pytest.raises(RuntimeError, match="something else"):
        eap.attribute(make_model("gpt2"), longer_pairs())


def test_evaluation_goes_on_with_less_at_once(make_model, monkeypatch):
    model, data = make_model("llama"), longer_pairs()
    scores = eap.attribute(model, data, method="eap")
    circuits = [scores.select(n) for n in (10, 40, 90)]
    right = eap.evaluate(model, circuits, data)
    original = CircuitRuns.on

    def run(runs, runner, corrupted, tokens):
        if min(tokens // runner.batch.clean.numel(), len(runs.masks)) * runner.batch.clean.numel() > 50:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
        return original(runs, runner, corrupted, tokens)

    monkeypatch.setattr(CircuitRuns, "on", run)
    for found, whole in zip(eap.evaluate(model, circuits, data), right):
        assert torch.allclose(found.values, whole.values, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reuse_prefix", [True, False])
def test_an_evaluation_keeps_to_its_budget(reuse_prefix, make_model, relative):
    model, data = make_model("llama"), longer_pairs()
    scores = eap.attribute(model, data, method="eap")
    # The first reads as many senders as any, in one place.
    one = torch.zeros_like(scores.graph.edge_mask)
    one[:, -1] = True
    circuits = [eap.Circuit.from_mask(scores.graph, one), *(scores.select(n) for n in (60, 70, 80, 90))]
    given = {"reuse_prefix": reuse_prefix}
    with PeakBytes() as whole:
        right = eap.evaluate(model, circuits, data, **given)
    budget = whole.peak // 3
    with PeakBytes() as count:
        found = eap.evaluate(model, circuits, data, memory=budget, **given)
    assert count.peak <= 1.1 * budget
    for one, other in zip(found, right):
        assert relative(one.values, other.values) < 1e-6
    curve = eap.faithfulness_curve(model, scores, data, (0.2, 0.6), memory=budget, **given)
    assert curve.faithfulness == pytest.approx(
        eap.faithfulness_curve(model, scores, data, (0.2, 0.6), **given).faithfulness
    )


def test_few_pairs_run_at_once_where_all_of_them_fit(make_model, monkeypatch):
    """A pass could have many more tokens than they have."""
    model, data = make_model("llama"), longer_pairs(3)
    scores = eap.attribute(model, data, method="eap")
    circuits, run, asked = [scores.select(n) for n in range(60, 68)], CircuitRuns.on, []

    def on(runs, runner, corrupted, tokens):
        asked.append(tokens)
        return run(runs, runner, corrupted, tokens)

    monkeypatch.setattr(CircuitRuns, "on", on)
    with PeakBytes() as count:
        eap.evaluate(model, circuits, data)
    eap.evaluate(model, circuits, data, memory=round(1.5 * count.peak))
    assert asked[-1] >= 9 * sum(data.longer_lengths - data.first_needed)
    whole = eap.plan(model, data)
    assert eap.plan(model, data, memory=round(1.2 * whole.bytes)).batches == whole.batches


@pytest.mark.parametrize("reuse_prefix", [True, False])
def test_exact_keeps_to_its_budget(reuse_prefix, make_model, relative):
    model, data = make_model("gpt2"), longer_pairs()
    given = {"method": "exact", "reuse_prefix": reuse_prefix}
    with PeakBytes() as whole:
        right = eap.attribute(model, data, **given)
    budget = whole.peak // 3
    with PeakBytes() as count:
        found = eap.attribute(model, data, memory=budget, **given)
    assert count.peak <= 1.1 * budget
    assert relative(found.values, right.values) < 1e-6


@pytest.mark.parametrize("memory", ["2 apples", -1])
def test_evaluation_refuses_other_budgets(memory, make_model, make_pairs):
    model, data = make_model("gpt2"), make_pairs()
    circuit = eap.attribute(model, data, method="eap").select(10)
    with pytest.raises(eap.InputError, match="memory: expected bytes"):
        eap.evaluate(model, circuit, data, memory=memory)


def exact_fails(above, monkeypatch, later=0):
    """As if memory ran out in passes of more tokens, once some passes have gone well; returns what was measured."""
    original, measured = PatchedEdges.logits, []

    def run(self, edges):
        batch = self.runner.batch
        found = original(self, edges)
        if batch.clean.numel() * len(edges) > above and len(measured) >= later:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore lines")
        measured.append((edges, batch.index.tolist()))
        return found

    monkeypatch.setattr(PatchedEdges, "logits", run)
    return measured


@pytest.mark.parametrize(
    ("fits", "later", "batch_size", "keep"),
    [
        (600, 0, None, None),
        (200, 0, 7, "examples"),
        (40, 0, None, "examples"),
        (40, 3, None, None),
        (40, 3, 7, "examples"),
        pytest.param(12, 0, 7, None, marks=pytest.mark.slow),
        pytest.param(12, 0, None, "examples", marks=pytest.mark.slow),
    ],
)
def test_exact_goes_on_with_less_at_once(fits, later, batch_size, keep, make_model, relative, monkeypatch):
    """Fewer edges side by side, then fewer examples; no edge of an example is lost or counted twice."""
    model, data = make_model("gpt2"), longer_pairs()
    given = {"method": "exact", "batch_size": batch_size, "keep": keep}
    right = eap.attribute(model, data, **given)
    exact_fails(fits, monkeypatch, later)
    done = []
    found = eap.attribute(model, data, progress=lambda *x: done.append(x), **given)
    assert relative(found.values, right.values) < 1e-6
    for name, tensor in right.statistics().items():
        assert relative(found.statistics()[name], tensor) < 1e-5
    assert done[-1] == (right.graph.n_edges, right.graph.n_edges)


@pytest.mark.parametrize("after", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (5, 9))])
def test_exact_goes_on_after_less_at_once_and_an_interruption(after, tmp_path, make_model, relative, monkeypatch):
    model, data = make_model("gpt2"), longer_pairs()
    right = eap.attribute(model, data, method="exact", batch_size=7)
    monkeypatch.setattr("eap_circuits.checkpoint.file.SECONDS_BETWEEN_SAVES", 0.0)
    measured, file, calls = exact_fails(40, monkeypatch, 1), tmp_path / "exact.safetensors", []

    def stop(*_):
        calls.append(_)
        if len(calls) == after:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        eap.attribute(model, data, method="exact", batch_size=7, checkpoint=file, progress=stop)
    before = len(measured)
    found = eap.attribute(model, data, method="exact", batch_size=7, checkpoint=file)
    assert relative(found.values, right.values) < 1e-6
    assert before and len(measured) > before


def test_too_little_memory_for_one_edge_is_one_sentence(make_model, monkeypatch):
    exact_fails(11, monkeypatch)
    with pytest.raises(
        eap.InputError, match=r"memory: expected enough for one example of 12 tokens, got (CUDA out|MemoryE)"
    ):
        eap.attribute(make_model("gpt2"), longer_pairs(), method="exact")


def test_a_plan_takes_what_attribute_takes(make_model, make_pairs):
    """Its quadrature, definition and ablation data, and refuses what it refuses."""
    model, data = make_model("gemma2"), make_pairs()
    given = {
        "quadrature": "left",
        "compat": "eap-ig",
        "ablation": "mean",
        "ablation_data": make_pairs(seed=1),
        "steps": 2,
    }
    for method in ("eap-ig-inputs", "eap-ig-activations"):
        planned = eap.plan(model, data, method=method, **given)
        assert planned.bytes > 0
        eap.attribute(model, data, method=method, memory=2 * planned.bytes, **given)
    for wrong in ({"quadrature": "middle"}, {"compat": "other"}, {"ablation_data": data}):
        for call in (eap.plan, eap.attribute):
            with pytest.raises(eap.InputError, match=next(iter(wrong))):
                call(model, data, **wrong)
