"""Attribution and evaluation of SmolLM2 on IOI against the model's own passes, in one process. `make bench`."""

import pytest
import torch

import eap_circuits as eap
from bench import measure
from bench.circuits import passes

STEPS = 5
THREADS = torch.get_num_threads()
SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
EDGES = 300


@pytest.mark.parametrize(("reuse", "at_least"), [(True, 2.2), (False, 1.0)], ids=["prefix-reuse", "no-reuse"])
def test_attribute_over_floor(speedup, model_and_data, floor, reuse, at_least):
    model, data = model_and_data
    speedup(
        lambda: eap.attribute(model, data, steps=STEPS, reuse_prefix=reuse),
        lambda: floor(STEPS),
        at_least,
        threads=THREADS,
        rounds=8,
    )


def test_more_steps_over_floor(in_turns, model_and_data, floor):
    """How cost grows with path points, compared with the floor's."""
    model, data = model_and_data

    def ratios(seconds):
        growth = {kind: seconds[f"{kind}@30"] / seconds[f"{kind}@{STEPS}"] for kind in ("attribute", "floor")}
        return {
            "speedup": seconds["floor@30"] / seconds["attribute@30"],
            "growth": growth["floor"] / growth["attribute"],
        }

    runs = {f"attribute@{steps}": lambda steps=steps: eap.attribute(model, data, steps=steps) for steps in (STEPS, 30)}
    runs |= {f"floor@{steps}": lambda steps=steps: floor(steps) for steps in (STEPS, 30)}
    in_turns(runs, ratios, {"speedup": 2.2, "growth": 0.9}, device="cpu", timing={"rounds": 1})


def test_few_shot_over_floor(speedup, model_and_data):
    """400 tokens that all prompts share, then 20 that differ."""
    model, _ = model_and_data
    data = passes.random_pairs(model, 4, 420, shared=400)
    speedup(
        lambda: eap.attribute(model, data, steps=STEPS),
        lambda: passes.floor(model, data, STEPS),
        5.0,
        threads=THREADS,
        rounds=1,
    )


def test_curve_over_forward(speedup, model_and_data, forward):
    """A ten-point faithfulness curve against one plain forward; the bar is a tenth: one forward per circuit."""
    model, data = model_and_data
    scores = eap.attribute(model, data, method="eap")
    speedup(lambda: eap.faithfulness_curve(model, scores, data, SIZES), forward, 1 / 10, threads=THREADS, rounds=8)


def test_exact_over_forward(in_turns, model_and_data, forward):
    """Random edges patched one by one: time per edge against one plain forward, and twice as many edges."""
    model, data = model_and_data
    graph = eap.attribute(model, data, method="eap").graph
    edges = graph.edge_mask.nonzero()
    order = torch.randperm(len(edges), generator=torch.Generator().manual_seed(0))

    def exact(count):
        mask = torch.zeros_like(graph.edge_mask)
        mask[tuple(edges[order[:count]].T)] = True
        return lambda: eap.attribute(model, data, method="exact", edges=mask)

    def ratios(seconds):
        return {
            "speedup": seconds["forward"] * EDGES / seconds["exact"],
            "linear": 2 * seconds["exact"] / seconds["twice"],
        }

    runs = {"exact": exact(EDGES), "twice": exact(2 * EDGES), "forward": forward}
    in_turns(runs, ratios, {"speedup": 4.0, "linear": 0.9}, device="cpu", timing={"rounds": 1})


@pytest.mark.parametrize("reuse", [True, False], ids=["prefix-reuse", "no-reuse"])
def test_memory_over_floor(benchmark, hold, peak_memory, reuse):
    """Peak memory with one path point at a time, with weights but without the interpreter, each in a fresh process."""

    def measured():
        sizes = {
            "floor": peak_memory("floor", STEPS),
            "attribute": peak_memory("attribute" if reuse else "attribute without reuse", STEPS),
        }
        return {"memory": sizes["floor"] / sizes["attribute"]}, {"bytes": sizes}

    benchmark.pedantic(lambda: None)
    hold(measured, {"memory": 1 / 1.2}, tries=1)


@pytest.mark.parametrize("reuse", [True, False], ids=["prefix-reuse", "no-reuse"])
def test_memory_is_as_planned(benchmark, hold, peak_memory, model_and_data, reuse):
    """Path points side by side: what `plan` says against peak memory above the loaded model.

    The C library keeps freed memory for later. Only when it returns all of it does the memory that is needed show.
    """
    model, data = model_and_data
    what = "attribute at once" if reuse else "attribute at once without reuse"

    def measured():
        planned = eap.plan(model, data, steps=STEPS, reuse_prefix=reuse).bytes
        needed = peak_memory(what, STEPS, MALLOC_TRIM_THRESHOLD_="0", MALLOC_TOP_PAD_="0")
        resident = peak_memory(what, STEPS)
        sizes = {"planned": planned, "needed": needed, "resident": resident}
        return {"planned": planned / needed, "planned_of_resident": planned / resident}, {"bytes": sizes}

    benchmark.pedantic(lambda: None)
    hold(measured, {"planned": 0.9}, tries=1, device=measure.DEVICE)
