"""Tensors that are none of the usual ones: right results, or one sentence that begins with the operator's name."""

import pytest
import torch

import eap_kernels as ek

IMPLS = ("auto", "reference", *(["cpu"] if ek.backends()["cpu"] is None else []))
REACH = torch.tensor([1, 2])


def operands():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 2, 4, 5, generator=generator, dtype=torch.float64)[:, :, :, :3].unbind(0)


def right(delta, grad):
    return torch.einsum("und,vnd->uv", delta, grad) * (torch.arange(2)[:, None] < REACH)


@pytest.mark.parametrize("impl", IMPLS)
def test_entries_of_out_that_share_memory_are_refused(impl):
    delta, grad, _ = operands()
    memory = torch.zeros(9, dtype=torch.float64)
    for strides in ((1, 1), (0, 1), (2, 0)):
        with pytest.raises(
            ValueError, match=r"^edge_scores: expected every entry of out .* own memory, got .* strides"
        ):
            ek.edge_scores(delta, grad, REACH, memory.as_strided((2, 2), strides), impl=impl)
    assert not memory.any()
    # Strides that only look as if: entries at 0, 3, 2, 5.
    apart = memory.as_strided((2, 2), (2, 3))
    torch.testing.assert_close(ek.edge_scores(delta, grad, REACH, apart, impl=impl), right(delta, grad))
    r = torch.zeros(2, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^normalise_rows: expected every entry"):
        ek.normalise_rows(delta, 1e-5, out=torch.zeros(20).as_strided((2, 4, 3), (3, 2, 1)), impl=impl)
    out = torch.zeros(5, dtype=torch.float64).as_strided((4, 1, 3), (0, 1, 1))
    with pytest.raises(ValueError, match=r"^collapse: expected every entry"):
        ek.collapse(delta[:, :, None], delta[:, :, None], r, r[:, 0], out, torch.zeros_like(r)[None], 3, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_an_out_of_inference_mode_is_refused_outside_of_it(impl):
    delta, grad, _ = operands()
    with torch.inference_mode():
        out = torch.zeros(2, 2, dtype=torch.float64)
        torch.testing.assert_close(ek.edge_scores(delta, grad, REACH, out, impl=impl), right(delta, grad))
    with pytest.raises(ValueError, match=r"^edge_scores: expected an out that may be written to, got one of inference"):
        ek.edge_scores(delta, grad, REACH, out, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_views_that_negate(impl):
    """As the imaginary part of a conjugate is: the sign is no part of the memory."""
    delta, grad, base = (torch.complex(x, x).conj().imag for x in operands())
    assert delta.is_neg()
    plain = [x.resolve_neg() for x in (delta, grad, base)]
    torch.testing.assert_close(ek.edge_scores(delta, grad, REACH, impl=impl), right(*plain[:2]))
    mask = torch.tensor([[True, False], [True, True]])
    found, wanted = (ek.masked_read(z[0], x, mask, impl=impl) for x, _, z in ((delta, grad, base), plain))
    torch.testing.assert_close(found, wanted)
    out = torch.zeros(2, 2, dtype=torch.complex128).conj().imag
    with pytest.raises(ValueError, match=r"^edge_scores: expected out whose values stand in its memory, got a view"):
        ek.edge_scores(delta, grad, REACH, out, impl=impl)


@pytest.mark.parametrize("made", ["to_sparse", "to_mkldnn", "nested"])
def test_tensors_that_are_not_dense_are_refused_by_name(made):
    delta, grad, base = (x.float() for x in operands())

    def odd(x):
        return torch.nested.nested_tensor(list(x)) if made == "nested" else getattr(x, made)()

    mask = torch.ones(2, 2)
    for name, call in {
        "edge_scores: expected delta": lambda: ek.edge_scores(odd(delta), grad, REACH),
        "edge_scores: expected grad": lambda: ek.edge_scores(delta, odd(grad), REACH),
        "edge_scores: expected out": lambda: ek.edge_scores(delta, grad, REACH, odd(mask)),
        "masked_read: expected base": lambda: ek.masked_read(odd(base[0]), delta, mask),
        "masked_read: expected mask": lambda: ek.masked_read(base[0], delta, odd(mask)),
        "head_space_scores: expected values": lambda: ek.head_space_scores(
            [ek.Nodes(odd(delta.mT))], [ek.Nodes(grad)], REACH
        ),
        "normalise_rows: expected x": lambda: ek.normalise_rows(odd(delta), 1e-5),
    }.items():
        with pytest.raises(TypeError, match=f"^{name} to be a dense tensor, got "):
            call()


def test_segments_that_no_memory_holds():
    delta, grad, _ = operands()
    with pytest.raises(torch.OutOfMemoryError, match=r"^edge_scores: expected enough memory, got Storage size"):
        ek.edge_scores(delta, grad, REACH, segments=torch.full((4,), 2**62))
