"""collapse of every backend against the float64 oracle."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import eap_kernels as ek
from eap_kernels import testing
from tests.kernels.conftest import QUICK
from tests.kernels.operators.test_normalise_rows import rows_of

CASES = st.fixed_dictionaries(
    {
        "points": st.integers(0, 9),
        "tokens": st.integers(1, 5),
        "heads": st.sampled_from([1, 2, 3]),
        "width": st.sampled_from([1, 3, 16, 37, 130]),
        "layouts": st.tuples(st.sampled_from(testing.LAYOUTS), st.sampled_from(testing.LAYOUTS)),
        "wanted": st.sampled_from(["all", "some", "none"]),
        "gathered": st.booleans(),
        "values": st.sampled_from([None, torch.float32, torch.bfloat16]),
        "constant": st.booleans(),
        "gain": st.booleans(),
        "seed": st.integers(0, 99),
    }
)
# More than one tile of features, and no whole number.
LARGE = {
    "points": 5,
    "tokens": 3,
    "heads": 1,
    "width": 1100,
    "layouts": ("contiguous", "contiguous"),
    "wanted": "some",
    "gathered": True,
    "values": torch.bfloat16,
    "constant": False,
    "gain": True,
    "seed": 0,
}


def operands(case, dtype, device):
    """Arguments of `collapse`, apart from what it writes."""
    generator = torch.Generator().manual_seed(case["seed"])
    m, tokens, heads, width = (case[name] for name in ("points", "tokens", "heads", "width"))

    def normal(tokens, dtype, layout):
        return testing.random_tensor((m, tokens, heads * width), dtype, generator, layout, device).unflatten(
            -1, (heads, width)
        )

    def positive(*shape):
        return torch.rand(shape, generator=generator, device="cpu").to(device, torch.float32)

    rows = rows_of(case["wanted"], tokens, generator)
    count = tokens if rows is None else len(rows)
    gradient = normal(tokens, dtype, case["layouts"][0])
    values = normal(count if case["gathered"] else tokens, case["values"] or dtype, case["layouts"][1])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    constant = positive(width, heads).T.to(wide) if case["constant"] else None
    gain = positive(width, 2)[:, 1].to(wide) if case["gain"] else None
    r, weights = positive(count, m).T.to(wide), positive(m, 2)[:, 0].to(wide)
    return gradient, values, r, weights, 2 * width, case["gathered"], rows, constant, gain


def call(args, impl, begin):
    """(out, coefficients), where out begins with ones that are to be added to."""
    gradient, values, r, weights, *rest = args
    heads, width = gradient.shape[2:]
    wide = torch.promote_types(r.dtype, torch.float32)
    points, count = r.shape
    out = torch.full((heads, count, width), begin, dtype=wide).transpose(0, 1)
    coefficients = torch.full((heads, points + 2, count), float("nan"), dtype=wide)
    ek.collapse(gradient, values, r, weights, out, coefficients[:, 1:-1], *rest, impl=impl)
    assert coefficients[:, [0, -1]].isnan().all()
    return out, coefficients[:, 1:-1]


def oracle(args, begin):
    def formula(sign, gradient, values, r, weights, features, gathered, rows, constant, gain):
        size = (lambda x: x.cpu().double()) if sign == 1 else (lambda x: x.cpu().double().abs())
        at = slice(None) if rows is None else rows.cpu()
        g = size(gradient)[:, at] * size(r * weights[:, None])[..., None, None]
        y = size(values) if gathered else size(values)[:, at]
        y = y if constant is None else y - sign * size(constant)
        y = y if gain is None else y * size(gain)
        return begin + g.sum(0), (g * y).sum(-1).permute(2, 0, 1) / features

    pairs = zip(formula(1, *args), formula(-1, *args), strict=True)
    return [testing.Oracle(right, float(size.max()) if size.numel() else 0.0) for right, size in pairs]


@settings(max_examples=15 if QUICK else 60, deadline=None, derandomize=True)
@given(case=CASES)
@example(case=LARGE)
@example(case={**LARGE, "heads": 2, "width": 64, "gathered": False, "constant": True, "gain": False})
def test_agrees_with_oracle(impl, device, dtype, case):
    args = operands(case, dtype, device)
    found, reference = (call(args, name, 1.0) for name in (impl, "reference"))
    for x, y, right in zip(found, reference, oracle(args, 1.0), strict=True):
        testing.assert_close(x, y, right)


def test_scales_and_constants_in_low_precision_are_widened_before_anything_is_computed(impl, device, randn):
    g, y = randn(4, 6, 2, 16), (randn(4, 6, 2, 16) + 30).bfloat16()
    r, weights, constant = (x.bfloat16() for x in (randn(4, 6).abs(), randn(4).abs(), randn(2, 16) + 30))
    wide = (g, y, r.float(), weights.float(), 16, True, None, constant.float(), None)
    found, reference = call((g, y, r, weights, 16, True, None, constant, None), impl, 0.0), call(wide, "reference", 0.0)
    for x, z, right in zip(found, reference, oracle(wide, 0.0), strict=True):
        testing.assert_close(x, z, right)


def test_more_points_than_one_launch_takes(impl, device):
    case = {**LARGE, "points": 300, "tokens": 1, "width": 40, "wanted": "all"}
    args = operands(case, torch.float32, device)
    for x, y, right in zip(call(args, impl, 0.0), call(args, "reference", 0.0), oracle(args, 0.0), strict=True):
        testing.assert_close(x, y, right)


def test_gives_the_same_bits_again(impl, device):
    args = operands({**LARGE, "width": 300}, torch.bfloat16, device)
    for first, second in zip(call(args, impl, 0.0), call(args, impl, 0.0), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_token_and_head(impl, device, value):
    args = operands({**LARGE, "heads": 2, "width": 37, "wanted": "all", "gathered": False}, torch.float32, device)
    args[0][1, 2, 1, 5] = value
    out, coefficients = call(args, impl, 0.0)
    wrong, places = ~out.isfinite(), torch.zeros(3, 2, 37, dtype=torch.bool)
    places[2, 1, 5] = True
    assert torch.equal(wrong, places)
    places = torch.zeros(2, 5, 3, dtype=torch.bool)
    places[1, 1, 2] = True
    assert torch.equal(~coefficients.isfinite(), places)


def test_an_infinite_scale_leaves_other_tokens_alone(impl, device):
    args = operands({**LARGE, "width": 37, "wanted": "all"}, torch.float32, device)
    args[2][3, 1] = float("inf")
    out, coefficients = call(args, impl, 0.0)
    assert not out[1].isfinite().any() and out[[0, 2]].isfinite().all()
    assert coefficients.isfinite().sum() == coefficients.numel() - 1


@pytest.mark.parametrize("overload", ["default", "select"])
@pytest.mark.parametrize("full", [True, False])
def test_opcheck(overload, full, impl, device, randn):
    op = getattr(torch.ops.eap_kernels.collapse, overload)
    options = (torch.tensor([2, 0]), randn(2, 5), randn(5)) if full else (None, None, None)
    count = 2 if full else 3
    written = torch.zeros(count, 2, 5), torch.zeros(2, 4, count)
    read = randn(4, 3, 2, 5), randn(4, 3, 2, 5), randn(4, count), randn(4)
    opcheck(op, (*read, *written, 7, False, *options, *((impl,) if overload == "select" else ())))


G, OUT = torch.zeros(2, 3, 1, 4), torch.zeros(3, 1, 4)
GOOD = {
    "gradient": G,
    "values": G,
    "r": torch.zeros(2, 3),
    "weights": torch.zeros(2),
    "out": OUT,
    "coefficients": torch.zeros(1, 2, 3),
    "features": 4,
}
BAD = {
    "no tensor": ({"gradient": [1.0]}, TypeError, "expected gradient to be a tensor, got list"),
    "rank": ({"gradient": G[0]}, ValueError, "expected gradient of shape [M, N, h, K], got [3, 1, 4]"),
    "values": ({"values": G[:, :2]}, ValueError, "expected values of shape [2, 3, 1, 4], got [2, 2, 1, 4]"),
    "gathered": (
        {"gathered": True, "rows": torch.tensor([1])},
        ValueError,
        "expected values of shape [2, 1, 1, 4], got [2, 3, 1, 4]",
    ),
    "r": ({"r": torch.zeros(3, 2)}, ValueError, "expected r of shape [2, 3], got [3, 2]"),
    "weights": ({"weights": torch.zeros(3)}, ValueError, "expected weights of shape [2], got [3]"),
    "out": ({"out": G[0, :2]}, ValueError, "expected out of shape [3, 1, 4], got [2, 1, 4]"),
    "out's dtype": (
        {"out": torch.zeros(3, 1, 4).bfloat16()},
        TypeError,
        "expected out and coefficients in float32, or both in float64, got torch.bfloat16",
    ),
    "two dtypes": (
        {"coefficients": torch.zeros(1, 2, 3).double()},
        TypeError,
        "expected out and coefficients in float32, or both in float64, got torch.float64",
    ),
    "own memory": ({"out": G[0]}, ValueError, "an out that overlaps gradient"),
    "own memory, constant": ({"constant": OUT[0]}, ValueError, "an out that overlaps constant"),
    "own memory, gain": ({"gain": OUT[0, 0]}, ValueError, "an out that overlaps gain"),
    "own memory of both": ({"coefficients": OUT.flatten()[6:].view(1, 2, 3)}, ValueError, "an out that overlaps out"),
    "coefficients": ({"coefficients": torch.zeros(2, 3)[None, :1]}, ValueError, "coefficients of shape [1, 2, 3]"),
    "features": ({"features": 0}, ValueError, "expected features to be a number from 1 to 2**63 - 1, got 0"),
    "gathered is a word": ({"gathered": "no"}, TypeError, "expected gathered to be True or False, got 'no'"),
    "rows": ({"rows": torch.tensor([0, 1, 3])}, ValueError, "expected rows within [0, 2], got 3"),
    "constant": ({"constant": torch.zeros(4)}, ValueError, "expected constant of shape [1, 4], got [4]"),
    "gain": ({"gain": torch.zeros(3)}, ValueError, "expected gain of shape [4], got [3]"),
    "impl": ({"impl": "fast"}, ValueError, "expected impl to be one of"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_arguments(case):
    change, error, message = BAD[case]
    with pytest.raises(error) as raised:
        ek.collapse(**{**GOOD, **change})
    text = str(raised.value)
    assert text.startswith("collapse: expected ") and message in text and "\n" not in text


def test_a_row_outside_gives_nan_on_a_gpu(impl, device):
    """There nothing is checked: the host would have to wait. Triton's interpreter computes what a GPU does."""
    if impl != "triton":
        return
    from eap_kernels.triton.collapse import collapse

    g, out, c = torch.ones(2, 3, 1, 4), torch.zeros(2, 1, 4), torch.zeros(1, 2, 2)
    collapse(g, g, torch.ones(2, 2), torch.ones(2), out, c, 4, False, torch.tensor([2, 3]), None, None)
    assert out.isnan().all(-1).flatten().tolist() == [False, True]
    assert c.isnan().tolist() == [[[False, True], [False, True]]]
