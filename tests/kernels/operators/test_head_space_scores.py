"""head_space_scores of every backend against the float64 oracle."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import eap_kernels as ek
from eap_kernels import testing
from eap_kernels.reference.head_space_scores import head_space_scores

CASES = st.fixed_dictionaries(
    {
        "layers": st.integers(1, 3),
        "heads": st.sampled_from([1, 2, 6]),
        "shared": st.sampled_from([1, 2]),
        "points": st.integers(0, 3),
        "tokens": st.integers(0, 9),
        "width": st.sampled_from([0, 1, 3, 8, 16]),
        "features": st.sampled_from([1, 5, 32, 67, 130]),
        "layout": st.sampled_from(testing.LAYOUTS),
        "workspace": st.sampled_from([1, 5000, 2**28]),
        "seed": st.integers(0, 99),
    }
)
# Several tiles in both directions, a remainder in each, and more rows than one register tile.
LARGE = {
    "layers": 3,
    "heads": 6,
    "shared": 2,
    "points": 2,
    "tokens": 37,
    "width": 16,
    "features": 131,
    "layout": "contiguous",
    "workspace": 40_000,
    "seed": 0,
}


def make_inputs(case, dtype, device):
    """Senders and receivers of a small transformer, and their staircase."""
    generator = torch.Generator().manual_seed(case["seed"])
    layers, heads, points, tokens = (case[k] for k in ("layers", "heads", "points", "tokens"))
    width, features = case["width"], case["features"]
    shared = case["shared"] if heads % case["shared"] == 0 else 1

    def normal(*shape):
        return testing.random_tensor(shape, dtype, generator, case["layout"], device)

    senders, receivers, reach = [ek.Nodes(normal(tokens, 1, features))], [], []
    for _ in range(layers):
        normalised = normal(points, tokens, features) if points else None
        seen = sum(group.values.shape[1] for group in senders)
        reach += [seen] * heads + [seen + heads]
        for n, weight in ((heads, normal(heads // shared, width, features)), (1, None)):
            along = normal(n, points, tokens) if points else None
            values = normal(tokens, n, features if weight is None else width)
            receivers.append(ek.Nodes(values, weight, along, normalised))
        senders.append(ek.Nodes(normal(tokens, heads, width), normal(heads, width, features)))
        senders.append(ek.Nodes(normal(tokens, 1, features)))
    return senders, receivers, torch.tensor(reach, device="cpu")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=CASES)
@example(case=LARGE)
@example(case={**LARGE, "layout": "reversed", "workspace": 2**28})
def test_agrees_with_oracle(impl, device, dtype, case):
    senders, receivers, reach = make_inputs(case, dtype, device)
    oracle = testing.head_space_scores_oracle(senders, receivers, reach)
    reference = ek.head_space_scores(senders, receivers, reach, impl="reference")
    staircase = (torch.arange(oracle.value.shape[0], device="cpu")[:, None] < reach).to(device)
    out = torch.where(staircase, 0.0, math.nan).to(reference.dtype)
    assert ek.head_space_scores(senders, receivers, reach, out, impl, case["workspace"]) is out
    assert torch.equal(~out.isnan(), staircase), "entries outside the staircase were touched, or NaN leaked in"
    testing.assert_close(out.nan_to_num(), reference, oracle)


def test_accumulates_and_repeats_to_the_bit(impl, device):
    senders, receivers, reach = make_inputs(LARGE, torch.float32, device)
    once = ek.head_space_scores(senders, receivers, reach, impl=impl)
    out = ek.head_space_scores(senders, receivers, reach, torch.zeros_like(once), impl)
    assert torch.equal(once, out)
    ek.head_space_scores(senders, receivers, reach, out, impl)
    torch.testing.assert_close(out, 2 * once)


def test_no_more_rows_are_expanded_at_once_than_fit_in_the_workspace(impl, device, randn):
    """Of 8 MB, in 200 kB: no allocation is larger."""
    if device != "cpu":
        return  # torch's profiler tells of a CPU's allocations
    heads = [ek.Nodes(randn(2000, 8, 4), randn(8, 4, 64))]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        ek.head_space_scores(heads, heads, torch.full((8,), 8), impl=impl, workspace=200_000)
    assert 50_000 < max(event.cpu_memory_usage for event in found.events()) <= 200_000


# Where the reference's roundings happened to cancel out, and a kernel's did not.
UNEVEN = {**LARGE, "layers": 2, "heads": 1, "shared": 1, "tokens": 6, "features": 1, "workspace": 1, "seed": 30}


@settings(deadline=None)
@given(case=CASES, low=st.sampled_from([torch.bfloat16, torch.float16]))
@example(case=UNEVEN, low=torch.float16)
def test_rows_in_low_precision_cost_three_roundings_each(case, low):
    """As on a GPU: the product with a weight, the norm's term and their difference are rounded, on both sides.

    A kernel rounds only what comes of them, and agrees with that by the rule.
    """
    case = {**case, "layout": "contiguous"}
    senders, receivers, reach = make_inputs(case, low, "cpu")
    oracle = testing.head_space_scores_oracle(senders, receivers, reach)
    none = torch.empty(0, dtype=low)
    groups = [*senders, *receivers]
    lists = [
        [none if x is None else x for x in column]
        for column in zip(*((g.values, g.weight, g.coefficients, g.normalised) for g in groups), strict=True)
    ]
    out = torch.zeros(oracle.value.shape)
    features, workspace = case["features"], case["workspace"]
    head_space_scores(*lists, len(senders), features, reach, out, workspace, rounded=True)
    # A rounding is half an eps of the terms' absolute sum; one more eps for what is of second order.
    eps = torch.finfo(low).eps
    assert float((out.double() - oracle.value).abs().max()) <= 4 * eps * oracle.scale
    once = (testing.expanded(side)[0].to(low) for side in (senders, receivers))
    testing.assert_close(ek.edge_scores(*once, reach, impl="reference"), out, oracle._replace(eps=eps))


@pytest.mark.parametrize("overload", ["default", "select"])
def test_opcheck(overload, impl, device, randn):
    none = torch.empty(0)
    lists = ([randn(3, 2, 4), randn(3, 2, 5)], [randn(2, 4, 5), none], [none, randn(2, 1, 3)], [none, randn(1, 3, 5)])
    extra = (impl,) if overload == "select" else ()
    op = getattr(torch.ops.eap_kernels.head_space_scores, overload)
    opcheck(op, (*lists, 1, 5, torch.tensor([1, 2], device="cpu"), torch.zeros(2, 2), 2**20, *extra))


V, W, REACH = torch.zeros(3, 2, 4), torch.zeros(2, 4, 5), torch.tensor([1])
HEADS, MLP = ek.Nodes(V, W), ek.Nodes(torch.zeros(3, 1, 5))
C, X = torch.zeros(1, 2, 3), torch.zeros(2, 3, 5)
BAD = {
    "no senders": (([], [MLP], REACH), TypeError, "expected senders and receivers to be lists"),
    "no list": ((HEADS, [MLP], REACH), TypeError, "expected senders and receivers to be lists"),
    "not nodes": (([V], [MLP], REACH), TypeError, "expected senders and receivers to be lists"),
    "rank": (([ek.Nodes(V[0])], [MLP], REACH), ValueError, "expected values of shape [N, h, K], got [2, 4]"),
    "tokens": (([HEADS], [ek.Nodes(torch.zeros(2, 1, 5))], REACH), ValueError, "expected values of shape [3, h, K]"),
    "dtype": (([HEADS], [ek.Nodes(V.double(), W)], REACH), TypeError, "expected values in the first values' dtype"),
    "no weight": (([HEADS], [ek.Nodes(V)], REACH), ValueError, "expected values of shape [3, h, 5] where there is no"),
    "weight's type": (([ek.Nodes(V, [W])], [MLP], REACH), TypeError, "expected weight to be a tensor, got list"),
    "weight's rank": (
        ([ek.Nodes(V, W[0, 0, 0])], [MLP], REACH),
        ValueError,
        "expected weight of shape [g, K, D], got []",
    ),
    "weight": (([HEADS], [ek.Nodes(V, W[:, :3])], REACH), ValueError, "expected weight of shape [g, 4, 5] with g a"),
    "groups": (([HEADS], [ek.Nodes(V[:, :1], W)], REACH), ValueError, "with g a divisor of 1, got [2, 4, 5]"),
    "alone": (([HEADS], [ek.Nodes(MLP.values, None, C)], REACH), ValueError, "expected coefficients and normalised"),
    "points": (([HEADS], [ek.Nodes(MLP.values, None, C, X[:1])], REACH), ValueError, "expected coefficients of shape"),
    "normalised": (([HEADS], [ek.Nodes(MLP.values, None, C, X[:, :2])], REACH), ValueError, "expected normalised of"),
    "reach": (([HEADS], [MLP], REACH + 2), ValueError, "expected reach within [0, 2], got 3"),
    "out": (([HEADS], [MLP], REACH, torch.zeros(1, 2)), ValueError, "expected out of shape [2, 1], got [1, 2]"),
    "overlap": (([HEADS], [MLP], REACH, W[0, 0, :2, None]), ValueError, "own memory, got an out that overlaps weight"),
    "impl": (([HEADS], [MLP], REACH, None, "fast"), ValueError, "expected impl to be one of auto"),
    "workspace": (([HEADS], [MLP], REACH, None, "auto", 0), ValueError, "expected a workspace of 1 to"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_one_sentence(name):
    args, error, message = BAD[name]
    with pytest.raises(error) as raised:
        ek.head_space_scores(*args)
    text = str(raised.value)
    assert text.startswith(f"head_space_scores: {message}") or (
        message in text and text.startswith("head_space_scores: ")
    )
    assert ", got " in text
    assert not W.any()
