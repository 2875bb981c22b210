"""edge_scores of every backend against the float64 oracle."""

import math

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
        "senders": st.integers(1, 60),
        "receivers": st.integers(1, 90),
        "tokens": st.integers(0, 9),
        "features": st.sampled_from([1, 2, 5, 8, 16, 37, 64, 131]),
        "layouts": st.tuples(st.sampled_from(testing.LAYOUTS), st.sampled_from(testing.LAYOUTS)),
        "reach": st.sampled_from(["full", "zero", "sorted", "shuffled"]),
        "segments": st.sampled_from([None, "runs", "shuffled"]),
        "seed": st.integers(0, 99),
    }
)
# Larger than one packed block in every dimension, and a remainder in each.
LARGE = {
    "senders": 200,
    "receivers": 67,
    "tokens": 5,
    "features": 140 if QUICK else 1100,
    "layouts": ("contiguous", "tokens_first"),
    "reach": "sorted",
    "segments": None,
    "seed": 0,
}
# So many features that partial sums are added up: those of chunks, or within a token's segment.
LONG = {**LARGE, "senders": 5, "receivers": 30, "features": 140 if QUICK else 9000}
# So many rows that the result is cut into several tiles both ways.
WIDE = {**LARGE, "senders": 90 if QUICK else 300, "receivers": 90 if QUICK else 500, "tokens": 2, "features": 37}


def make_reach(kind, senders, receivers, generator):
    if kind in ("full", "zero"):
        return torch.full((receivers,), senders if kind == "full" else 0, device="cpu")
    reach = torch.randint(0, senders + 1, (receivers,), generator=generator, device="cpu")
    return reach.sort().values if kind == "sorted" else reach


def make_inputs(case, dtype, device):
    generator = torch.Generator().manual_seed(case["seed"])
    s, r, n, d = (case[k] for k in ("senders", "receivers", "tokens", "features"))
    delta = testing.random_tensor((s, n, d), dtype, generator, case["layouts"][0], device)
    grad = testing.random_tensor((r, n, d), dtype, generator, case["layouts"][1], device)
    segments = None
    if case["segments"]:
        segments = torch.randint(0, 3, (n,), generator=generator, device="cpu")
        segments = segments.sort().values if case["segments"] == "runs" else segments
    return delta, grad, make_reach(case["reach"], s, r, generator), segments


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def poisoned(shape, reach, dtype, inside=0.0):
    """NaN outside the staircase, `inside` within."""
    staircase = torch.arange(shape[-2], device=reach.device)[:, None] < reach
    return torch.where(staircase, inside, math.nan).to(dtype).expand(shape).contiguous()


@settings(max_examples=12 if QUICK else 60, deadline=None, derandomize=True)
@given(case=CASES)
@example(case=LARGE)
@example(case={**LARGE, "segments": "shuffled", "tokens": 9, "layouts": ("reversed", "padded")})
@example(case={**LONG, "layouts": ("contiguous", "contiguous")})
@example(case={**LONG, "segments": "runs", "reach": "shuffled"})
@example(case={**WIDE, "reach": "shuffled"})
def test_agrees_with_oracle(impl, device, dtype, case):
    delta, grad, reach, segments = make_inputs(case, dtype, device)
    shape = (*([] if segments is None else [3]), delta.shape[0], grad.shape[0])
    oracle = testing.edge_scores_oracle(delta, grad, reach, segments, 3)
    zeros = torch.zeros(shape, dtype=wide(dtype), device=device)
    reference = ek.edge_scores(delta, grad, reach, zeros, segments, "reference")

    out = poisoned(shape, reach, wide(dtype)).to(device)
    staircase = ~out.isnan()
    assert ek.edge_scores(delta, grad, reach, out, segments, impl) is out
    assert torch.equal(~out.isnan(), staircase), "entries outside the staircase were touched, or NaN leaked in"
    testing.assert_close(out.nan_to_num(), reference, oracle)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_more_work_than_fits_a_chunk_and_than_there_are_processors(impl, device, kind, generator):
    """An entry of 65,536 products, which a GPU adds up in runs of 4,096; there hundreds of tiles for 132 processors."""
    interpreted = (impl, device) == ("triton", "cpu")
    senders, receivers = (600, 400) if device == "cuda" else (70, 40)
    tokens, features = (4, 64) if interpreted else (64, 1024)
    delta, grad = (
        testing.random_tensor((rows, tokens, features), kind, generator, layout, device)
        for rows, layout in ((senders, "contiguous"), (receivers, "tokens_first"))
    )
    reach = make_reach("sorted", senders, receivers, generator)
    oracle = testing.edge_scores_oracle(delta, grad, reach)
    reference = ek.edge_scores(delta, grad, reach, impl="reference")
    testing.assert_close(ek.edge_scores(delta, grad, reach, impl=impl), reference, oracle)


def test_accumulates_into_strided_out(impl, device, randn):
    delta, grad = randn(7, 3, 5), randn(4, 3, 5)
    reach = torch.tensor([0, 2, 7, 5])
    once = ek.edge_scores(delta, grad, reach, impl=impl)
    whole = poisoned((7, 4), reach, torch.float32, inside=1.0).repeat_interleave(2, dim=1)
    out = whole[:, ::2]
    for _ in range(2):
        ek.edge_scores(delta, grad, reach, out, impl=impl)
    staircase = torch.arange(7)[:, None] < reach
    torch.testing.assert_close(out[staircase], 1 + 2 * once[staircase])
    assert out[~staircase].isnan().all()
    assert (whole[:, 1::2][staircase] == 1).all()


def test_values_outside_the_staircase_do_not_leak_in(impl, device, dtype):
    delta, grad = torch.ones(3, 2, 4, dtype=dtype), torch.ones(2, 2, 4, dtype=dtype)
    delta[2] = math.nan
    assert ek.edge_scores(delta, grad, torch.tensor([1, 2]), impl=impl).tolist() == [[8, 8], [0, 8], [0, 0]]


def test_every_edge_is_as_exact_as_fp32_whatever_its_size(impl, device, generator):
    """Rows from 2^-120 to 2^120 beside each other; summed in fp32, they are off by n eps of the terms at most."""
    tokens, features = 3, 45
    delta, grad = (testing.random_tensor((rows, tokens, features), torch.float32, generator) for rows in (40, 50))
    delta *= 2.0 ** torch.randint(-60, 61, (40, 1, 1), generator=generator, device="cpu")
    grad *= 2.0 ** torch.randint(-60, 61, (50, 1, 1), generator=generator, device="cpu")
    for row, power in ((0, -120), (1, 120), (2, -50)):
        delta[row], grad[row] = (testing.random_tensor((2, tokens, features), torch.float32, generator)) * 2.0**power
    delta[5], grad[7] = 0, 0
    exact = torch.einsum("snd,rnd->sr", delta.double(), grad.double())
    terms = torch.einsum("snd,rnd->sr", delta.double().abs(), grad.double().abs())
    scores = ek.edge_scores(delta.to(device), grad.to(device), torch.full((50,), 40, device="cpu"), impl=impl).cpu()
    normal = (terms > 2.0**-100) & (terms < 2.0**127)
    bound = tokens * features * torch.finfo(torch.float32).eps * terms
    assert normal.sum() > 1500
    assert ((scores - exact).abs() <= bound)[normal].all()
    assert (scores[terms < 2.0**-150] == 0).all()
    assert (scores[5] == 0).all() and (scores[:, 7] == 0).all()


def test_a_single_product_is_as_exact_as_fp32(impl, device):
    """Where nothing averages out: mantissas of all kinds, one token, one feature."""
    delta, grad = (1 + torch.randint(0, 2**23, (n, 1, 1), device="cpu") / 2**23 for n in (100, 70))
    delta[0] = grad[0] = 1 + 2**-7 - 2**-23  # the most that eight leading bits leave, twice
    scores = ek.edge_scores(delta.to(device), grad.to(device), torch.full((70,), 100, device="cpu"), impl=impl).cpu()
    exact = delta.double().flatten()[:, None] * grad.double().flatten()
    assert ((scores - exact).abs() <= 2 * torch.finfo(torch.float32).eps * exact).all()


@pytest.mark.parametrize("bits", [0x7F800000, 0xFF800000, 0x7FC00000, 0x7FFFFFFF, 0x7F800001])
def test_a_value_that_is_not_finite_stays_with_its_own_edges(impl, device, randn, bits):
    """Infinities and every kind of NaN."""
    delta, grad = randn(40, 2, 40), randn(60, 2, 40)
    reach = torch.full((60,), 40, device="cpu")
    expected = ek.edge_scores(delta, grad, reach, impl=impl)
    value = torch.tensor(bits - 2**32 if bits >= 2**31 else bits, dtype=torch.int32).view(torch.float32)
    delta[3, 1, 5], grad[33, 0, 39] = value, value
    scores = ek.edge_scores(delta, grad, reach, impl=impl)
    finite = scores.isfinite()
    assert not finite[3].any()
    assert not finite[:, 33].any()
    finite[3], finite[:, 33] = True, True
    assert finite.all()
    others = [i for i in range(60) if i != 33]
    assert torch.equal(scores[4:, others], expected[4:, others])


def test_allocates_out_from_segments(impl, device):
    scores = ek.edge_scores(
        torch.ones(1, 3, 2),
        torch.ones(1, 3, 2),
        torch.tensor([1]),
        segments=torch.tensor([2, 0, 2]),
        impl=impl,
    )
    assert scores.flatten().tolist() == [2, 0, 4]


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_segments_that_alternate_are_as_exact_as_others(impl, device, kind, generator):
    """Sums of positive terms, which would show if each run of tokens was added to out by itself."""
    tokens = 512 if (impl, device) == ("triton", "cpu") else 65536
    delta, grad = (torch.rand(rows, tokens, 1, generator=generator, device="cpu").to(kind) for rows in (1, 2))
    segments = torch.arange(tokens, device="cpu") % 2
    segments[5:9] = 4  # and none of number 2 and 3
    given = delta, grad, torch.tensor([1, 1], device="cpu")
    oracle = testing.edge_scores_oracle(*given, segments)
    reference = ek.edge_scores(*given, segments=segments, impl="reference")
    scores = ek.edge_scores(delta.to(device), grad.to(device), given[2], segments=segments, impl=impl)
    testing.assert_close(scores, reference, oracle)


def test_no_tokens_and_no_segments(impl, device, dtype):
    """Nothing is written: there is no memory to write to."""
    delta, grad, segments = torch.ones(2, 0, 3, dtype=dtype), torch.ones(2, 0, 3, dtype=dtype), torch.zeros(0).long()
    reach = torch.tensor([1, 2])
    assert ek.edge_scores(delta, grad, reach, segments=segments, impl=impl).shape == (0, 2, 2)
    assert testing.edge_scores_oracle(delta, grad, reach, segments).value.shape == (0, 2, 2)
    assert not ek.edge_scores(delta, grad, reach, segments=segments, out=torch.zeros(3, 2, 2, dtype=wide(dtype))).any()


def test_is_deterministic_for_any_number_of_threads(impl, device, randn):
    tokens = 200 if impl == "cpu" else 20  # enough for several chunks, whose sums are added up
    delta, grad = randn(90, tokens, 64), randn(50, tokens, 64)
    delta = delta.transpose(0, 1).contiguous().transpose(0, 1)
    reach = torch.randn(50, device="cpu").argsort() * 2 % 91
    for segments in (None, torch.arange(tokens, device="cpu") % 7):
        first = ek.edge_scores(delta, grad, reach, segments=segments, impl=impl)
        assert torch.equal(first, ek.edge_scores(delta, grad, reach, segments=segments, impl=impl))
        if impl == "cpu":
            threads = torch.get_num_threads()
            try:
                torch.set_num_threads(1)
                assert torch.equal(first, ek.edge_scores(delta, grad, reach, segments=segments, impl=impl))
            finally:
                torch.set_num_threads(threads)


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
@pytest.mark.parametrize("layout", ["contiguous", "reversed"])
def test_tf32_is_torch_s_own_choice(impl, device, generator, fp32_precision, precision, layout):
    """Where it is not allowed, a rounded operand would show: sums here differ by a hundred times what is let pass."""
    fp32_precision(precision)
    delta, grad = (testing.random_tensor((rows, 4, 32), torch.float32, generator, layout, device) for rows in (70, 130))
    reach = make_reach("shuffled", 70, 130, generator)
    oracle = testing.edge_scores_oracle(delta, grad, reach)
    scores = ek.edge_scores(delta, grad, reach, impl=impl)
    # Not relative to the reference, which on a GPU is rounded too where tf32 is allowed, and need not be.
    eps = testing.TF32_EPS if precision == "tf32" and device == "cuda" else torch.finfo(torch.float32).eps
    testing.assert_close(scores, oracle.value, oracle, eps)


D, G, REACH = torch.zeros(3, 4, 5), torch.zeros(2, 4, 5), torch.tensor([1, 3])
SHARED = torch.zeros(60)
BAD = {
    "rank": ((D[0], G, REACH), {}, ValueError, "expected delta of shape [S, N, D], got [4, 5]"),
    "not a tensor": ((D, None, REACH), {}, TypeError, "expected grad to be a tensor, got NoneType"),
    "integers": ((D.int(), G, REACH), {}, TypeError, "expected delta in float64"),
    "mixed dtypes": ((D, G.double(), REACH), {}, TypeError, "expected grad in delta's dtype torch.float32"),
    "mixed devices": (
        (D, G.to("meta"), REACH),
        {},
        ValueError,
        "expected grad on delta's device cpu, got meta",
    ),
    "features": ((D, G[..., :4], REACH), {}, ValueError, "expected grad of shape [R, 4, 5], got [2, 4, 4]"),
    "reach dtype": ((D, G, REACH.int()), {}, TypeError, "expected reach in int64, got torch.int32"),
    "reach length": ((D, G, REACH[:1]), {}, ValueError, "expected reach of shape [2], got [1]"),
    "reach on meta": (
        (D, G, REACH.to("meta")),
        {},
        ValueError,
        "expected reach on a device that holds values, got meta",
    ),
    "segments on meta": (
        (D, G, REACH, torch.zeros(1, 3, 2), torch.zeros(4, device="meta").long()),
        {},
        ValueError,
        "expected segments on a device that holds values, got meta",
    ),
    "reach high": ((D, G, REACH + 1), {}, ValueError, "expected reach within [0, 3], got 4"),
    "reach low": ((D, G, REACH - 2), {}, ValueError, "expected reach within [0, 3], got -1"),
    "out shape": (
        (D, G, REACH, torch.zeros(2, 3)),
        {},
        ValueError,
        "expected out of shape [3, 2], got [2, 3]",
    ),
    "out dtype": ((D, G, REACH, torch.zeros(3, 2).double()), {}, TypeError, "expected out in torch.float32"),
    "out expanded": (
        (D, G, REACH, torch.zeros(3, 1).expand(3, 2)),
        {},
        ValueError,
        "expected every entry of out",
    ),
    "out needs grad": (
        (D, G, REACH, torch.zeros(3, 2, requires_grad=True)),
        {},
        ValueError,
        "expected out that does not require grad",
    ),
    "out overlaps": (
        (SHARED.view(3, 4, 5), G, REACH, SHARED[54:].view(3, 2)),
        {},
        ValueError,
        "expected out in its own memory, got an out that overlaps delta",
    ),
    "segments length": (
        (D, G, REACH, None, REACH),
        {},
        ValueError,
        "expected segments of shape [4], got [2]",
    ),
    "segments range": (
        (D, G, REACH, torch.zeros(2, 3, 2), torch.tensor([0, 1, 2, 0])),
        {},
        ValueError,
        "expected segments within [0, 1], got 2",
    ),
    "segments negative": (
        (D, G, REACH, None, torch.full((4,), -1)),
        {},
        ValueError,
        "expected segments from 0 to 2**63 - 2, got -1",
    ),
    "impl": ((D, G, REACH), {"impl": "fast"}, ValueError, "expected impl to be one of auto, reference, cpu"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_one_sentence_and_write_nothing(name):
    args, kwargs, error, message = BAD[name]
    with pytest.raises(error) as raised:
        ek.edge_scores(*args, **kwargs)
    text = str(raised.value)
    assert text.startswith("edge_scores: expected ")
    assert message in text
    assert ", got " in text
    assert "\n" not in text
    assert not any(x.any() for x in args if isinstance(x, torch.Tensor) and x.is_floating_point() and not x.is_meta)


def test_inputs_that_require_grad_are_detached(impl, device):
    delta = torch.ones(2, 1, 3, requires_grad=True)
    scores = ek.edge_scores(delta, torch.ones(1, 1, 3), torch.tensor([2]), impl=impl)
    assert not scores.requires_grad


@pytest.mark.parametrize("overload", ["default", "select"])
def test_opcheck(overload, impl, device, randn):
    delta, grad, reach = randn(3, 4, 5), randn(2, 4, 5), torch.tensor([1, 3], device="cpu")
    op = getattr(torch.ops.eap_kernels.edge_scores, overload)
    extra = (impl,) if overload == "select" else ()
    opcheck(op, (delta, grad, reach, torch.zeros(3, 2), None, *extra))
    segments = torch.tensor([0, 0, 1, 1], device="cpu")
    opcheck(op, (delta, grad, reach, torch.zeros(2, 3, 2), segments, *extra))
