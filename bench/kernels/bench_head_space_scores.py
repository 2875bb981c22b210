"""head_space_scores against expanding both operands with torch and scoring them: time, and memory beyond the inputs.

edge_scores alone, on operands expanded before the clock starts, shows what the expansion costs.
"""

import pytest

import eap_kernels as ek
from bench import measure
from bench.kernels import head_space, shapes
from eap_kernels import testing

pytestmark = pytest.mark.benchmark(group="head_space_scores")


def check(model, dtype, tokens):
    """Compare every backend with the float64 oracle, on the model's first three layers and at most 64 tokens."""
    given = head_space.inputs(model._replace(layers=3), min(tokens, 64), dtype)
    oracle = testing.head_space_scores_oracle(*given)
    reference = ek.head_space_scores(*given, impl="reference")
    for impl in shapes.IMPLS:
        testing.assert_close(ek.head_space_scores(*given, impl=impl), reference, oracle, shapes.eps(dtype))


# With the few tokens that a CPU gets, the largest models only read their weights, for half a minute each.
CASES = [case for case in shapes.CASES if measure.DEVICE == "cuda" or shapes.MODELS[case[0]].senders < 400]


@pytest.mark.parametrize(("name", "dtype_name"), CASES)
def test_head_space_scores(in_turns, name, dtype_name):
    model, dtype = shapes.MODELS[name], shapes.DTYPES[dtype_name]
    tokens = head_space.tokens_for(model, dtype, 2**28)
    check(model, dtype, tokens)
    senders, receivers, reach = head_space.inputs(model, tokens, dtype)
    delta, grad = head_space.expand(senders), head_space.expand(receivers)
    runs = {impl: lambda impl=impl: ek.head_space_scores(senders, receivers, reach, impl=impl) for impl in shapes.IMPLS}
    runs["expanded"] = lambda: head_space.expanded_scores(senders, receivers, reach)
    runs["edge_scores"] = lambda: ek.edge_scores(delta, grad, reach)

    def ratios(seconds):
        auto = shapes.auto(seconds)
        return {
            "over_expanded": seconds["expanded"] / auto,
            "of_edge_scores_alone": seconds["edge_scores"] / auto,
            "auto_over_best": min(1.0, shapes.best(seconds) / auto),
        }

    facts = {"model": name, "dtype": dtype_name, "tokens": tokens}
    in_turns(runs, ratios, {"over_expanded": 0.6}, **facts)


@pytest.mark.parametrize("name", ["gpt2", "qwen2.5-0.5b"])
def test_head_space_memory(benchmark, hold, name):
    """Expanded operands of 3 GiB on a CPU or 8 GiB on a GPU; each run in its own process."""
    model = shapes.MODELS[name]
    tokens = head_space.tokens_for(model, shapes.DTYPES["float32"], 3 * 2**30)

    def measured():
        peaks = {what: measure.in_fresh_process(head_space.peak, what, name, tokens) for what in ("expanded", "fused")}
        return {"memory_saved": peaks["expanded"] / peaks["fused"]}, {"bytes": peaks}

    benchmark.pedantic(lambda: None)
    hold(measured, {"memory_saved": 5.0}, tries=1, model=name, tokens=tokens, device=measure.DEVICE)
