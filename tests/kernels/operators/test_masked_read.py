"""masked_read of every backend against the float64 oracle, and its gradients."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import eap_kernels as ek
from bench.pretended import pretending
from bench.pretended.tensors import observers
from eap_kernels import testing
from eap_kernels.reference import masked_read as reference
from tests.kernels.conftest import QUICK

CASES = st.fixed_dictionaries(
    {
        "senders": st.integers(1, 40),
        "receivers": st.integers(1, 20),
        "tokens": st.integers(0, 9),
        "features": st.sampled_from([1, 2, 5, 8, 37, 64, 131]),
        "layouts": st.tuples(st.sampled_from(testing.LAYOUTS), st.sampled_from(testing.LAYOUTS)),
        "mask": st.sampled_from(["bool", "soft", "low"]),
        "density": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
        "shared": st.booleans(),
        "seed": st.integers(0, 99),
    }
)
LARGE = {
    "senders": 90,
    "receivers": 21,
    "tokens": 3,
    "features": 300 if QUICK else 2500,
    "layouts": ("tokens_first", "contiguous"),
    "mask": "soft",
    "density": 0.5,
    "shared": True,
    "seed": 0,
}


def make_inputs(case, dtype, device):
    generator = torch.Generator().manual_seed(case["seed"])
    s, r, n, d = (case[k] for k in ("senders", "receivers", "tokens", "features"))
    delta = testing.random_tensor((s, n, d), dtype, generator, case["layouts"][0], device)
    base = testing.random_tensor((1 if case["shared"] else r, n, d), dtype, generator, case["layouts"][1], device)
    mask = torch.rand(r, s, generator=generator, device="cpu").to(device).T.lt(case["density"])
    if case["mask"] != "bool":
        weights = torch.randn(s, r, generator=generator, device="cpu").to(device) * mask
        mask = weights.bfloat16() if case["mask"] == "low" else weights
    return base[0] if case["shared"] else base, delta, mask


@pytest.mark.parametrize("density", [0.01, 1.0])
def test_more_work_than_there_are_processors(impl, device, density):
    """On a GPU thousands of pieces of a result for about 100 processors, and hundreds of senders an entry."""
    sizes = (600, 400, 64, 1024) if device == "cuda" else (600, 40, 16, 1024)
    if (impl, device) == ("triton", "cpu"):  # interpreted
        sizes = 70, 40, 4, 64
    case = {**dict(zip(("senders", "receivers", "tokens", "features"), sizes)), "density": density}
    base, delta, mask = make_inputs({**LARGE, **case}, torch.float32, device)
    oracle = testing.masked_read_oracle(base, delta, mask)
    reference = ek.masked_read(base, delta, mask, impl="reference")
    testing.assert_close(ek.masked_read(base, delta, mask, impl=impl), reference, oracle)


@settings(max_examples=12 if QUICK else 60, deadline=None, derandomize=True)
@given(case=CASES)
@example(case=LARGE)
@example(case={**LARGE, "shared": False, "layouts": ("contiguous", "contiguous"), "mask": "bool"})
@example(case={**LARGE, "senders": 9, "tokens": 3 if QUICK else 20})  # a result larger than a core's cache
def test_agrees_with_oracle(impl, device, dtype, case):
    base, delta, mask = make_inputs(case, dtype, device)
    y = ek.masked_read(base, delta, mask, impl=impl)
    assert y.dtype == dtype
    reference = ek.masked_read(base, delta, mask, impl="reference")
    testing.assert_close(y, reference, testing.masked_read_oracle(base, delta, mask))


CIRCUITS = st.fixed_dictionaries(
    {
        "circuits": st.integers(0, 4),
        "senders": st.integers(1, 20),
        "receivers": st.integers(1, 6),
        "tokens": st.integers(0, 5),
        "features": st.sampled_from([1, 5, 37]),
        "layouts": st.tuples(st.sampled_from(testing.LAYOUTS), st.sampled_from(testing.LAYOUTS)),
        "mask": st.sampled_from([torch.bool, torch.float32, torch.bfloat16]),
        "density": st.sampled_from([0.05, 0.5, 1.0]),
        "own": st.booleans(),
        "base": st.sampled_from(["N", "RN", "CRN"]),
        "seed": st.integers(0, 99),
    }
)


NONE = {"circuits": 0, "senders": 3, "receivers": 2, "tokens": 1, "features": 5, "mask": torch.bool, "density": 1.0}
NONE |= {"layouts": ("contiguous", "contiguous"), "own": True, "base": "CRN", "seed": 0}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=CIRCUITS)
@example(case=NONE)
@example(case={**NONE, "own": False})
def test_many_circuits_at_once(impl, device, dtype, case):
    generator = torch.Generator().manual_seed(case["seed"])
    c, s, r, n, d = (case[k] for k in ("circuits", "senders", "receivers", "tokens", "features"))

    def rows(lead, layout):
        x = testing.random_tensor((math.prod(lead), n, d), dtype, generator, layout, device)
        return x.unflatten(0, lead) if len(lead) > 1 else x

    delta = rows([c, s] if case["own"] else [s], case["layouts"][0])
    lead = {"N": [1], "RN": [r], "CRN": [c, r]}[case["base"]]
    base = rows(lead, case["layouts"][1])[0 if case["base"] == "N" else slice(None)]
    mask = torch.randn(c, r, s, generator=generator, device="cpu").mT
    mask = (mask * (torch.rand(c, s, r, generator=generator, device="cpu") < case["density"])).to(device, case["mask"])
    y = ek.masked_read(base, delta, mask, impl=impl)
    assert y.dtype == dtype
    one_by_one = [
        ek.masked_read(
            base[i] if base.dim() == 4 else base, delta[i] if case["own"] else delta, mask[i], impl="reference"
        )
        for i in range(c)
    ]
    reference = torch.stack(one_by_one) if c else y
    testing.assert_close(y, reference, testing.masked_read_oracle(base, delta, mask))


@pytest.mark.parametrize("own", [True, False])
def test_senders_that_no_circuit_keeps_do_not_matter(impl, device, own):
    delta = torch.ones(2, 3, 1, 4)
    # Circuits with deltas of their own are one product of the reference's off the CPU, in which garbage counts 0 times.
    garbage = 1e9 if own and impl == "reference" and device != "cpu" else math.nan
    delta[:, 1] = garbage
    mask = torch.tensor([[[1], [0], [0]], [[1], [0], [1]]], dtype=torch.bool)
    if own:
        delta[0, 2] = garbage
    y = ek.masked_read(torch.ones(1, 4), delta if own else delta[0], mask, impl=impl)
    assert y[:, 0, 0, 0].tolist() == [2, 3]


@pytest.mark.parametrize("used", [[0, 3], [1, 2], [2, 3], [0, 1]], ids=["inner", "outer", "first", "last"])
def test_unused_senders_are_never_read(impl, device, dtype, used):
    delta, mask = torch.full((4, 2, 3), math.nan, dtype=dtype), torch.zeros(4, 2, dtype=torch.bool)
    delta[used] = torch.tensor([1.0, 2.0], dtype=dtype)[:, None, None]
    mask[used] = torch.tensor([[True, False], [True, True]])
    y = ek.masked_read(torch.ones(2, 3, dtype=dtype), delta, mask, impl=impl)
    assert y[:, 0, 0].tolist() == [4, 3]


@pytest.mark.parametrize("precision", [torch.float64, torch.bfloat16])
def test_the_reference_reads_all_circuits_in_one_product(precision, randn):
    """As it does on a device."""
    base, delta = randn(3, 5, 2, 4).to(precision), randn(3, 6, 2, 4).to(precision)
    mask = randn(3, 6, 5).sigmoid()
    together = reference.masked_read(base, delta, mask)
    apart = torch.stack([reference.masked_read(*each) for each in zip(base, delta, mask)])
    torch.testing.assert_close(together, apart)


@pytest.fixture
def launches():
    """Names of the operators that run on a pretended GPU."""
    found = []

    def observe(event, func, *_):
        if event == "op" and not func.is_view and func is not torch.ops.aten.new_empty.default:
            found.append(str(func))

    observers.append(observe)
    with pretending(native=True):
        yield found
    observers.remove(observe)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float64, torch.float32, torch.bfloat16])
def test_a_gpu_multiplies_low_precision_as_it_is(mask_dtype, own, dtype, launches, randn, monkeypatch):
    monkeypatch.setattr(reference, "_CHUNK_ON_DEVICE", 1 << 9)
    base, delta = randn(5, 7, 9).to(dtype), randn(2, 11, 7, 9).to(dtype)
    mask = (randn(2, 11, 5) * (randn(2, 11, 5) > 0)).to(mask_dtype)
    if not own:
        delta, mask = delta[0], mask[0]
        mask[3] = 0
    oracle = testing.masked_read_oracle(base, delta, mask)
    cpu = ek.masked_read(base, delta, mask, impl="reference")
    if not own:
        delta[3] = math.nan
    y = ek.masked_read(base.to("cuda"), delta.to("cuda"), mask.to("cuda"), impl="reference").cpu()
    assert y.dtype == dtype
    testing.assert_close(y, cpu, oracle)
    exact = dtype == torch.bfloat16 or (dtype == torch.float16 and mask_dtype == torch.bool)
    assert ("aten.bmm.dtype" in launches, "aten.bmm.default" in launches) == (exact, not exact)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("weight", [1.0, -1 / 3, math.inf, 3.4e38])
def test_what_is_not_finite_survives_a_mask_in_parts(value, weight, launches):
    for x, w in ((value, weight), (2.0, weight), (value, 2.0)):
        delta, mask = torch.full((1, 1, 3), x, dtype=torch.bfloat16), torch.full((1, 1), w)
        y = ek.masked_read(torch.zeros_like(delta[0]).to("cuda"), delta.to("cuda"), mask.to("cuda"), impl="reference")
        torch.testing.assert_close(y.cpu(), (delta.float() * w).bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_a_read_on_a_gpu_is_a_few_launches(launches):
    delta, mask = torch.zeros(30, 4, 8, dtype=torch.bfloat16, device="cuda"), torch.ones(30, 9, device="cuda") > 0
    launches.clear()
    ek.masked_read(delta[0], delta, mask, impl="reference")
    assert len(launches) <= 7, launches
    launches.clear()
    ek.masked_read(delta[0], torch.stack([delta, delta]), torch.stack([mask, mask]), impl="reference")
    assert len(launches) <= 7, launches


def test_the_cuda_kernel_adds_up_few_edges_and_leaves_many_to_the_product(launches, randn):
    base, delta = randn(2, 3).to("cuda"), randn(40, 2, 3).to("cuda")
    for kept, ours in ((8, True), (9, False)):
        mask = (torch.arange(80) < kept).view(40, 2).to("cuda")
        launches.clear()
        y = ek.masked_read(base, delta, mask, impl="cuda")
        assert ("eap_kernels.masked_read.default" in launches, "aten.bmm.default" in launches) == (ours, not ours)
        right = testing.masked_read_oracle(base, delta, mask)
        testing.assert_close(y.cpu(), ek.masked_read(base.cpu(), delta.cpu(), mask.cpu(), impl="reference"), right)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 65504.0, 6e-8, -0.0])
def test_special_values_survive(impl, device, dtype, value):
    delta = torch.full((1, 1, 17), value).to(dtype)
    y = ek.masked_read(torch.zeros_like(delta[0]), delta, torch.ones(1, 1), impl=impl)
    torch.testing.assert_close(y, delta, rtol=0, atol=0, equal_nan=True)


def test_every_half_precision_value_is_rounded_to_nearest(impl, device):
    for dtype in (torch.float16, torch.bfloat16):
        values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
        values = values[values.isfinite()]
        weight = torch.tensor([[1 / 3]])
        y = ek.masked_read(torch.zeros(1, len(values), dtype=dtype), values.view(1, 1, -1), weight, impl=impl)
        torch.testing.assert_close(y[0, 0], (values.float() * weight[0]).to(dtype), rtol=0, atol=0)


def gradient_inputs(randn, shared=True):
    base = randn(*([] if shared else [2]), 3, 4, dtype=torch.float64)
    delta = randn(5, 3, 4, dtype=torch.float64)
    mask = randn(5, 2, dtype=torch.float64).sigmoid()
    mask[1] = 0
    return [x.requires_grad_() for x in (base, delta, mask)]


@pytest.mark.parametrize("shared", [True, False])
def test_gradcheck(impl, device, randn, shared):
    """Entry by entry; quickly, of a random combination of all entries."""
    inputs = gradient_inputs(randn, shared)
    assert torch.autograd.gradcheck(lambda *x: ek.masked_read(*x, impl=impl), inputs, fast_mode=QUICK)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("lead", [[], [2], [3, 2]])
def test_gradcheck_of_many_circuits(impl, device, randn, own, lead):
    delta = randn(*([3] if own else []), 5, 2, 4, dtype=torch.float64)
    mask = randn(3, 5, 2, dtype=torch.float64).sigmoid()
    mask[0, 1] = 0
    inputs = [x.requires_grad_() for x in (randn(*lead, 2, 4, dtype=torch.float64), delta, mask)]
    assert torch.autograd.gradcheck(lambda *x: ek.masked_read(*x, impl=impl), inputs, fast_mode=QUICK)


def test_mask_gradient_is_the_edge_score(impl, device, dtype, randn, generator):
    base, delta, mask = (x.detach().to(dtype) for x in gradient_inputs(randn))
    mask = mask.float().requires_grad_()
    grad_y = testing.random_tensor((2, 3, 4), dtype, generator, device=device)
    ek.masked_read(base, delta, mask, impl=impl).backward(grad_y)
    oracle = testing.edge_scores_oracle(delta, grad_y, torch.tensor([5, 5]))
    scores = ek.edge_scores(delta, grad_y, torch.tensor([5, 5]), impl="reference")
    assert mask.grad.dtype == torch.float32
    testing.assert_close(mask.grad, scores, oracle)


def test_only_what_is_needed_gets_a_gradient(impl, device, randn):
    base, delta, mask = gradient_inputs(randn)
    (grad,) = torch.autograd.grad(ek.masked_read(base.detach(), delta, mask > 0.5, impl=impl).sum(), delta)
    expected = (mask > 0.5).double().sum(1)[:, None, None].expand_as(delta)
    torch.testing.assert_close(grad, expected)


def test_double_backward_raises(impl, device, randn):
    base, delta, mask = gradient_inputs(randn)
    y = ek.masked_read(base, delta, mask, impl=impl)
    with pytest.raises(RuntimeError, match="masked_read: expected a first-order backward"):
        torch.autograd.grad(y.square().sum(), mask, create_graph=True)


@pytest.mark.parametrize("overload", ["default", "select"])
def test_opcheck(overload, impl, device, randn):
    base, delta, mask = gradient_inputs(randn)
    extra = (impl,) if overload == "select" else ()
    op = getattr(torch.ops.eap_kernels.masked_read, overload)
    opcheck(op, (base, delta, mask, *extra))
    opcheck(op, (base.detach(), delta.detach(), mask.detach() > 0.5, *extra))


def test_is_deterministic(impl, device, randn):
    delta, mask = randn(50, 20, 33), randn(50, 30)
    first = ek.masked_read(delta[0], delta, mask, impl=impl)
    assert torch.equal(first, ek.masked_read(delta[0], delta, mask, impl=impl))


B, D, M = torch.zeros(4, 5), torch.zeros(3, 4, 5), torch.zeros(3, 2)
BAD = {
    "rank": ((B, D[0], M), ValueError, "expected delta of shape [S, N, D], got [4, 5]"),
    "base type": ((None, D, M), TypeError, "expected base to be a tensor, got NoneType"),
    "base dtype": ((B.double(), D, M), TypeError, "expected base in delta's dtype torch.float32"),
    "base device": ((B.to("meta"), D, M), ValueError, "expected base on delta's device cpu, got meta"),
    "base shape": ((B[:, :4], D, M), ValueError, "expected base of shape [4, 5] or [2, 4, 5], got [4, 4]"),
    "base receivers": ((D, D, M), ValueError, "expected base of shape [4, 5] or [2, 4, 5], got [3, 4, 5]"),
    "mask type": ((B, D, [[1]]), TypeError, "expected mask to be a tensor, got list"),
    "mask dtype": ((B, D, M.int()), TypeError, "expected a bool or floating mask, got torch.int32"),
    "mask device": ((B, D, M.to("meta")), ValueError, "expected mask on cpu, got meta"),
    "mask shape": ((B, D, M.T), ValueError, "expected mask of shape [3, R] or [C, 3, R], got [2, 3]"),
    "mask rank": ((B, D, M[0]), ValueError, "expected mask of shape [3, R] or [C, 3, R], got [2]"),
    "one circuit": ((B, D[None], M), ValueError, "expected delta of shape [S, N, D], got [1, 3, 4, 5]"),
    "circuits": (
        (B, D[None], M.expand(2, 3, 2)),
        ValueError,
        "expected mask of shape [3, R] or [1, 3, R], got [2, 3, 2]",
    ),
    "base circuits": (
        (D, D, M.expand(6, 3, 2)),
        ValueError,
        "expected base of shape [4, 5] or [2, 4, 5] or [6, 2, 4, 5], got [3, 4, 5]",
    ),
    "impl": ((B, D, M, "fast"), ValueError, "expected impl to be one of auto, reference, cpu"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_one_sentence(name):
    args, error, message = BAD[name]
    with pytest.raises(error) as raised:
        ek.masked_read(*args)
    assert str(raised.value) == f"masked_read: {message}" or str(raised.value).startswith(f"masked_read: {message},")
