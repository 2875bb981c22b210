"""The public functions: check the arguments, then call the operator."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from eap_kernels import _dispatch
from eap_kernels._schemas import accumulation_dtype

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def edge_scores(
    delta: Tensor,
    grad: Tensor,
    reach: Tensor,
    out: Tensor | None = None,
    segments: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Add the score of every edge to `out`: out[u, v] += sum_n <delta[u, n], grad[v, n]> for u < reach[v].

    The contraction of edge attribution patching (EAP: Syed et al. 2023, arXiv 2310.10348; with integrated
    gradients, EAP-IG: Hanna et al. 2024, arXiv 2403.17806): activation difference of sender u times gradient
    at receiver v, summed over tokens. Entries with u >= reach[v] are never touched. Deterministic.

    Args:
        delta: [S, N, D], floating, any strides.
        grad: [R, N, D], delta's dtype and device, any strides.
        reach: int64 [R], 0 <= reach <= S: how many senders each receiver sees.
        out: [S, R], or [segments, S, R] with `segments`; fp64 for fp64 inputs, else fp32; any strides without
            overlap. Allocated with zeros when absent.
        segments: int64 [N], the segment of each token; scores are kept per segment.
        impl: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        `out`. Not differentiable: the inputs are detached.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing has been written then.
        RuntimeError: the backend asked for is not available.

    Example:
        >>> import torch, eap_kernels
        >>> delta, grad = torch.ones(2, 3, 4), torch.ones(2, 3, 4)
        >>> eap_kernels.edge_scores(delta, grad, torch.tensor([1, 2]))
        tensor([[12., 12.],
                [ 0., 12.]])
    """
    _check_floating("edge_scores", "delta", delta, 3, "[S, N, D]")
    _check_floating("edge_scores", "grad", grad, 3, "[R, N, D]")
    _check_like("edge_scores", "grad", grad, delta)
    if grad.shape[1:] != delta.shape[1:]:
        _fail("edge_scores", f"grad of shape [R, {delta.shape[1]}, {delta.shape[2]}]", list(grad.shape))
    senders, tokens, receivers = delta.shape[0], delta.shape[1], grad.shape[0]
    _check_index("edge_scores", "reach", reach, receivers)
    if segments is not None:
        _check_index("edge_scores", "segments", segments, tokens)
    wide = accumulation_dtype(delta.dtype)
    if out is None:
        count = [] if segments is None else [int(segments.max()) + 1 if tokens else 0]
        if count and count[0] < 0:
            _fail("edge_scores", "segments of at least 0", count[0] - 1)
        out = delta.new_zeros([*count, senders, receivers], dtype=wide)
    else:
        _check_out(out, senders, receivers, segments is not None, wide, delta.device)
    _dispatch.check_impl("edge_scores", impl, delta.device)
    torch.ops.eap_kernels.edge_scores.select(delta.detach(), grad.detach(), reach, out, segments, impl)
    return out


def masked_read(base: Tensor, delta: Tensor, mask: Tensor, impl: str = "auto") -> Tensor:
    """Run a circuit's reads: y[v] = base[v] + sum_u mask[u, v] * delta[u].

    With base the corrupted residual and delta = current - corrupted contributions, y[v] is the input of
    receiver v in the circuit. Differentiable once, in base, delta and a floating mask; the mask's gradient is
    `edge_scores`. Senders whose mask row is zero are not read: their delta may hold anything.

    Args:
        base: [N, D], shared by all receivers, or [R, N, D]; delta's dtype and device, any strides.
        delta: [S, N, D], floating, any strides.
        mask: [S, R], bool or floating.
        impl: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        [R, N, D] in delta's dtype; sums are kept in fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: an argument does not fit.
        RuntimeError: the backend asked for is not available, or a second-order gradient was asked for.

    Example:
        >>> import torch, eap_kernels
        >>> mask = torch.ones(3, 1, dtype=torch.bool)
        >>> eap_kernels.masked_read(torch.zeros(1, 2), torch.ones(3, 1, 2), mask)
        tensor([[[3., 3.]]])
    """
    _check_floating("masked_read", "delta", delta, 3, "[S, N, D]")
    if not isinstance(base, Tensor):
        _fail("masked_read", "base to be a tensor", type(base).__name__, TypeError)
    _check_like("masked_read", "base", base, delta)
    if not isinstance(mask, Tensor):
        _fail("masked_read", "mask to be a tensor", type(mask).__name__, TypeError)
    if mask.dtype != torch.bool and mask.dtype not in _FLOATS:
        _fail("masked_read", "a bool or floating mask", mask.dtype, TypeError)
    if mask.device != delta.device:
        _fail("masked_read", f"mask on {delta.device}", mask.device)
    if mask.dim() != 2 or mask.shape[0] != delta.shape[0]:
        _fail("masked_read", f"mask of shape [{delta.shape[0]}, R]", list(mask.shape))
    shared = list(delta.shape[1:])
    if list(base.shape) not in (shared, [mask.shape[1], *shared]):
        _fail("masked_read", f"base of shape {shared} or {[mask.shape[1], *shared]}", list(base.shape))
    _dispatch.check_impl("masked_read", impl, delta.device)
    result: Tensor = torch.ops.eap_kernels.masked_read.select(base, delta, mask, impl)
    return result


def backends() -> dict[str, str | None]:
    """Every backend by name, with None where it can run and the reason where it cannot."""
    return {impl: _dispatch.missing(impl) for impl in _dispatch.IMPLS if impl != "auto"}


def explain(op: str, *args: Tensor | None) -> str:
    """One sentence on what `impl="auto"` runs for these tensors, and why.

    Args:
        op: "edge_scores" or "masked_read".
        args: the operator's own tensors, in its own order; `out` and `segments` may be left out.
    """
    if op not in ("edge_scores", "masked_read"):
        _fail("explain", "edge_scores or masked_read", repr(op))
    required, allowed = 3, 5 if op == "edge_scores" else 3
    tensors = [x for x in args[:required] if isinstance(x, Tensor)]
    if len(tensors) != required or len(args) > allowed:
        _fail("explain", f"the tensors of {op}", f"{len(args)} arguments", TypeError)
    if op == "edge_scores":
        choice = _dispatch.choose_edge_scores(tensors[0], tensors[1], args[4] if len(args) == 5 else None)
    else:
        choice = _dispatch.choose_masked_read(tensors[1], tensors[2])
    return f"{op}: auto runs {choice.impl}: {choice.reason}"


def _fail(op: str, expected: str, got: object, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{op}: expected {expected}, got {got}")


def _check_floating(op: str, name: str, x: Tensor, rank: int, shape: str) -> None:
    if not isinstance(x, Tensor):
        _fail(op, f"{name} to be a tensor", type(x).__name__, TypeError)
    if x.dtype not in _FLOATS:
        _fail(op, f"{name} in float64, float32, bfloat16 or float16", x.dtype, TypeError)
    if x.dim() != rank:
        _fail(op, f"{name} of shape {shape}", list(x.shape))


def _check_like(op: str, name: str, x: Tensor, delta: Tensor) -> None:
    if x.dtype != delta.dtype:
        _fail(op, f"{name} in delta's dtype {delta.dtype}", x.dtype, TypeError)
    if x.device != delta.device:
        _fail(op, f"{name} on delta's device {delta.device}", x.device)


def _check_index(op: str, name: str, x: Tensor, count: int) -> None:
    if not isinstance(x, Tensor):
        _fail(op, f"{name} to be a tensor", type(x).__name__, TypeError)
    if x.dtype != torch.int64:
        _fail(op, f"{name} in int64", x.dtype, TypeError)
    if list(x.shape) != [count]:
        _fail(op, f"{name} of shape [{count}]", list(x.shape))


def _check_out(
    out: Tensor, senders: int, receivers: int, segmented: bool, wide: torch.dtype, device: torch.device
) -> None:
    op = "edge_scores"
    if not isinstance(out, Tensor):
        _fail(op, "out to be a tensor", type(out).__name__, TypeError)
    if out.dtype != wide:
        _fail(op, f"out in {wide}", out.dtype, TypeError)
    if out.device != device:
        _fail(op, f"out on {device}", out.device)
    if out.dim() != 2 + segmented or list(out.shape[-2:]) != [senders, receivers]:
        shape = f"[segments, {senders}, {receivers}]" if segmented else f"[{senders}, {receivers}]"
        _fail(op, f"out of shape {shape}", list(out.shape))
    if out.requires_grad:
        _fail(op, "an out that does not require grad", "requires_grad=True")
