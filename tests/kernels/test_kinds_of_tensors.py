"""Tensors that are none of the usual ones: right results, or one sentence that begins with the operator's name."""

import contextlib
import threading

import pytest
import torch

import eap_kernels as ek
from eap_kernels import _dispatch

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
def test_gradients_that_need_what_was_written_over_are_refused(impl):
    """As after any change in place: the gradient of a product with `out` would be that of other values."""
    delta, grad, _ = operands()
    r = torch.ones(2, 4, dtype=torch.float64)
    nodes = [ek.Nodes(delta.transpose(0, 1))], [ek.Nodes(grad.transpose(0, 1))]
    for shape, write in {
        (2, 2): lambda out: ek.edge_scores(delta, grad, REACH, out, impl=impl),
        (2, 2, 1): lambda out: ek.head_space_scores(*nodes, REACH, out[..., 0], impl=impl),
        (2, 4, 3): lambda out: ek.normalise_rows(delta, 1e-5, out=out, impl=impl),
        (4, 1, 3): lambda out: ek.collapse(
            delta[:, :, None], delta[:, :, None], r, r[:, 0], out, torch.empty_like(r)[None], 3, impl=impl
        ),
    }.items():
        out = torch.zeros(shape, dtype=torch.float64)
        product = torch.ones(shape, dtype=torch.float64, requires_grad=True) * out
        write(out)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()


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
    with pytest.raises(ValueError, match=r"^edge_scores: expected segments from 0 to 2\*\*63 - 2, got 92233"):
        ek.edge_scores(delta, grad, REACH, segments=torch.full((4,), 2**63 - 1))


@pytest.mark.parametrize("strict", [True, False])
def test_the_number_of_segments_is_traced(strict):
    delta, grad, _ = operands()

    class Scores(torch.nn.Module):
        def forward(self, segments):
            return ek.edge_scores(delta, grad, REACH, segments=segments)

    segments = torch.tensor([0, 1, 1, 0])
    exported = torch.export.export(Scores(), (segments,), strict=strict).module()
    compiled = torch.compile(Scores(), fullgraph=True, backend="aot_eager")
    for each in (segments, 2 * segments):
        for traced in (exported, compiled):
            torch.testing.assert_close(traced(each), Scores()(each))


@contextlib.contextmanager
def medium_precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


ROUNDING = {
    "bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "float16": lambda: torch.autocast("cpu", torch.float16),
    "medium": medium_precision,
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rounding", ROUNDING)
def test_nothing_is_rounded_where_torch_may_round_products(impl, rounding, randn):
    delta, grad, mask, own = randn(200, 4, 5), randn(9, 4, 5), randn(200, 9), randn(2, 200, 9)
    nodes, reach = ek.Nodes(randn(4, 3, 6), randn(3, 6, 5), randn(3, 2, 4), randn(2, 4, 5)), torch.tensor([200, 7, 3])

    def all_of_them():
        learned = mask.clone().requires_grad_()
        ek.masked_read(delta[0], delta, learned, impl=impl).sum().backward()
        return (
            ek.edge_scores(delta, grad, torch.arange(9) + 100, impl=impl),
            ek.head_space_scores([ek.Nodes(delta.transpose(0, 1))], [nodes], reach, impl=impl),
            ek.masked_read(delta[0], delta, mask, impl=impl),
            ek.masked_read(delta[0], delta.expand(2, 200, 4, 5), own, impl=impl),
            ek.normalise_rows(delta, 1e-5, impl=impl),
            learned.grad,
        )

    plain = all_of_them()
    with ROUNDING[rounding]():
        for found, right in zip(all_of_them(), plain, strict=True):
            assert torch.equal(found, right)


def test_nothing_is_rounded_while_another_thread_leaves_an_operator():
    """What rounds is switched off for all threads at once, until the last one has left."""
    entered, left, seen, before = threading.Event(), threading.Event(), [], torch.backends.mkldnn.enabled

    @_dispatch._exact
    def first(_):
        assert entered.wait(60)

    @_dispatch._exact
    def second(_):
        entered.set()
        assert left.wait(60)
        seen.append(torch.backends.mkldnn.enabled)

    with medium_precision():
        other = threading.Thread(target=second, args=(torch.ones(1),))
        thread = threading.Thread(target=first, args=(torch.ones(1),))
        thread.start()
        other.start()
        thread.join()
        left.set()
        other.join()
    assert seen == [False] and torch.backends.mkldnn.enabled is before


def test_forward_mode_is_refused_as_it_would_lose_tangents():
    delta, _, base = operands()
    mask = torch.ones(2, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"^masked_read: expected gradients in reverse mode, got a tangent"):
        torch.func.jvp(lambda x: ek.masked_read(base[0], delta, x), (mask,), (mask,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(delta, delta)
        with pytest.raises(RuntimeError, match=r"^masked_read: expected gradients in reverse mode, got a tangent"):
            ek.masked_read(base[0], dual, mask)


def test_nodes_on_a_gpu_that_is_not_there(monkeypatch):
    """A workspace is chosen by the GPU's memory; fake tensors are traced where there may be none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with torch._subclasses.FakeTensorMode():
        nodes = [ek.Nodes(torch.empty(3, 2, 4, device="cuda"))]
        assert ek.head_space_scores(nodes, nodes, torch.tensor([1, 2])).shape == (2, 2)
