"""normalise_rows of every backend against the float64 oracle."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import eap_kernels as ek
from eap_kernels import testing
from tests.kernels.conftest import QUICK

CASES = st.fixed_dictionaries(
    {
        "points": st.integers(0, 3),
        "tokens": st.integers(1, 9),
        "features": st.sampled_from([1, 2, 5, 37, 64, 131]),
        "layout": st.sampled_from(testing.LAYOUTS),
        "out": st.sampled_from([None, torch.float64, torch.float32, torch.bfloat16, torch.float16]),
        "out_layout": st.sampled_from(testing.LAYOUTS[:-1]),
        "wanted": st.sampled_from(["all", "some", "none"]),
        "centred": st.booleans(),
        "eps": st.sampled_from([1e-6, 1e-5, 0.5]),
        "seed": st.integers(0, 99),
    }
)
# More features than a program has in registers at once, and no whole number of its blocks.
LARGE = {
    "points": 2,
    "tokens": 5,
    "features": 4099,
    "layout": "tokens_first",
    "out": torch.float32,
    "out_layout": "padded",
    "wanted": "some",
    "centred": True,
    "eps": 1e-5,
    "seed": 0,
}


def rows_of(wanted, tokens, generator):
    """int64 [n], in any order and maybe twice; None for all."""
    if wanted == "all":
        return None
    count = 0 if wanted == "none" else tokens + 2
    return torch.randint(0, tokens, (count,), generator=generator, device="cpu").to(torch.get_default_device())


@settings(max_examples=12 if QUICK else 60, deadline=None, derandomize=True)
@given(case=CASES)
@example(case=LARGE)
@example(case={**LARGE, "wanted": "all", "centred": False, "out_layout": "contiguous"})
def test_agrees_with_oracle(impl, device, dtype, case):
    generator = torch.Generator().manual_seed(case["seed"])
    shape = case["points"], case["tokens"], case["features"]
    x = (testing.random_tensor(shape, torch.float64, generator, case["layout"], device) * 3 + 1).to(dtype)
    rows = rows_of(case["wanted"], case["tokens"], generator)
    count = case["tokens"] if rows is None else len(rows)
    found = {}
    for name in (impl, "reference"):
        out = None
        if case["out"] is not None:
            shape = case["points"], count, case["features"]
            out = testing.random_tensor(shape, case["out"], generator, case["out_layout"], device)
        found[name] = ek.normalise_rows(x, case["eps"], case["centred"], rows, out, impl=name), out
    y = (x if rows is None else x[:, rows]).cpu().double()
    if case["centred"]:
        y = y - y.mean(-1, keepdim=True)
    r = 1 / (y.square().mean(-1) + case["eps"]).sqrt()
    (scale, out), (reference, right) = found[impl], found["reference"]
    assert scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    testing.assert_close(scale, reference, testing.Oracle(r, float(r.max()) if r.numel() else 0.0))
    if out is not None:
        terms = x.abs().amax().cpu().double() * r.max() if y.numel() else 0.0
        # Computed in the accumulation dtype, rounded to that of out.
        eps = max(torch.finfo(out.dtype).eps, torch.finfo(scale.dtype).eps)
        testing.assert_close(out, right, testing.Oracle(y * r[..., None], float(terms)), eps)


def test_is_the_norm_of_torch(impl, device, randn):
    x = randn(2, 3, 40)
    out = torch.empty_like(x)
    ek.normalise_rows(x, 1e-5, True, out=out, impl=impl)
    torch.testing.assert_close(out, torch.nn.functional.layer_norm(x, (40,), eps=1e-5), rtol=1e-5, atol=1e-6)
    ek.normalise_rows(x, 1e-5, out=out, impl=impl)
    torch.testing.assert_close(out, torch.nn.functional.rms_norm(x, (40,), eps=1e-5), rtol=1e-5, atol=1e-6)


def test_a_mean_far_from_zero_costs_no_digits(impl, device, randn):
    """The variance is that of differences from the mean, not a difference of large squares."""
    x = randn(1, 4, 300) + 1000
    y = x.double() - x.double().mean(-1, keepdim=True)
    r = ek.normalise_rows(x, 1e-5, True, impl=impl)
    torch.testing.assert_close(r.double(), 1 / (y.square().mean(-1) + 1e-5).sqrt(), rtol=1e-5, atol=0)


def test_writes_only_its_slice_and_gives_the_same_bits_again(impl, device, randn):
    x, rows = randn(2, 6, 70), torch.tensor([4, 1, 4])
    held = torch.full((5, 3, 70), 7.0)
    first, second = (ek.normalise_rows(x, 1e-6, True, rows, held[1:3], impl=impl) for _ in range(2))
    assert torch.equal(first, second)
    assert (held[0] == 7).all() and (held[3:] == 7).all() and (held[1:3] != 7).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(impl, device, randn, value):
    x, out = randn(1, 3, 50), torch.empty(1, 3, 50)
    x[0, 1, 7] = value
    r = ek.normalise_rows(x, 1e-6, out=out, impl=impl)
    assert r[0, [0, 2]].isfinite().all() and out[0, [0, 2]].isfinite().all()
    assert out[0, 1, 7].isnan() and r[0, 1].item() == 0 if value == float("inf") else r[0, 1].isnan()


def test_needs_no_gradient(impl, device, randn):
    x, out = randn(1, 3, 5).requires_grad_(), torch.empty(1, 3, 5)
    assert not ek.normalise_rows(x, 1e-6, out=out, impl=impl).requires_grad and not out.requires_grad


@pytest.mark.parametrize("overload", ["default", "select"])
@pytest.mark.parametrize("chosen", [True, False])
def test_opcheck(overload, chosen, impl, device, randn):
    op = getattr(torch.ops.eap_kernels.normalise_rows, overload)
    rows = torch.tensor([2, 0]) if chosen else None
    out = torch.empty(2, 2, 5) if chosen else None
    opcheck(op, (randn(2, 3, 5), 1e-5, True, rows, out, *((impl,) if overload == "select" else ())))


X = torch.zeros(2, 3, 4)
BAD = {
    "no tensor": (([1.0], 1e-5), {}, TypeError, "expected x to be a tensor, got list"),
    "rank": ((X[0], 1e-5), {}, ValueError, "expected x of shape [M, N, D], got [3, 4]"),
    "dtype": ((X.int(), 1e-5), {}, TypeError, "expected x in float64"),
    "eps": ((X, -1.0), {}, ValueError, "expected a finite eps of at least 0, got -1.0"),
    "an eps beyond floats": ((X, 10**400), {}, ValueError, "expected a finite eps of at least 0, got 1000"),
    "centred is a word": ((X, 1e-5, "no"), {}, TypeError, "expected centred to be True or False, got 'no'"),
    "no eps": ((X, "a"), {}, ValueError, "expected a finite eps of at least 0, got 'a'"),
    "rows": ((X, 1.0), {"rows": [0]}, TypeError, "expected rows to be a tensor, got list"),
    "rows' dtype": ((X, 1.0), {"rows": torch.tensor([True])}, TypeError, "expected rows in int64, got torch.bool"),
    "rows' rank": ((X, 1.0), {"rows": torch.tensor(1)}, ValueError, "expected rows of shape [n], got []"),
    "row outside": ((X, 1.0), {"rows": torch.tensor([1, 3])}, ValueError, "expected rows within [0, 2], got 3"),
    "row below": ((X, 1.0), {"rows": torch.tensor([1, -1])}, ValueError, "expected rows within [0, 2], got -1"),
    "no token": (
        (X[:, :0], 1.0),
        {"rows": torch.tensor([0])},
        ValueError,
        "expected no rows where there are no tokens",
    ),
    "out": (
        (X, 1.0),
        {"rows": torch.tensor([1]), "out": X},
        ValueError,
        "expected out of shape [2, 1, 4], got [2, 3, 4]",
    ),
    "out's dtype": ((X, 1.0), {"out": X.int()}, TypeError, "expected out in float64"),
    "own memory": ((X, 1.0), {"out": X}, ValueError, "an out that overlaps x"),
    "expanded": ((X, 1.0), {"out": X[:1].clone().expand(2, 3, 4)}, ValueError, "got an out with strides"),
    "grad": ((X, 1.0), {"out": X.clone().requires_grad_()}, ValueError, "expected out that does not require grad"),
    "impl": ((X, 1.0), {"impl": "fast"}, ValueError, "expected impl to be one of"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_arguments(case):
    args, options, error, message = BAD[case]
    with pytest.raises(error) as raised:
        ek.normalise_rows(*args, **options)
    text = str(raised.value)
    assert text.startswith("normalise_rows: expected ") and message in text and "\n" not in text


def test_a_row_outside_gives_nan_on_a_gpu(impl, device, randn):
    """There nothing is checked: the host would have to wait. Triton's interpreter computes what a GPU does."""
    if impl != "triton":
        return
    from eap_kernels.triton.normalise_rows import normalise_rows

    out = torch.zeros(1, 3, 5)
    r = normalise_rows(randn(1, 4, 5), 1e-5, False, torch.tensor([1, 4, -1]), out)
    assert r.isnan().tolist() == [[False, True, True]]
    assert out.isnan().all(-1).tolist() == [[False, True, True]]


def test_auto_is_one_pass_on_a_cpu(randn):
    if "cpu" not in testing.available_backends():
        return
    assert ek.explain("normalise_rows", randn(1, 2, 3)).startswith("normalise_rows: auto runs cpu: it is one pass")
