"""The public functions: they check the arguments, then call the operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from eap_kernels import _auto, _dispatch
from eap_kernels._registry import BACKENDS
from eap_kernels._schemas import accumulation_dtype

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@_dispatch.in_memory
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
        impl: "auto", which follows a measured rule, or a name in `backends()`.

    Returns:
        `out`. Not differentiable: the inputs are detached.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing has been written then.
        RuntimeError: the backend asked for is not available.
        torch.OutOfMemoryError: memory ran out; an `out` handed in may hold a part of the sums.

    Example:
        >>> import torch, eap_kernels
        >>> delta, grad = torch.ones(2, 3, 4), torch.ones(2, 3, 4)
        >>> eap_kernels.edge_scores(delta, grad, torch.tensor([1, 2]))
        tensor([[12., 12.],
                [ 0., 12.]])
    """
    _check_floating("edge_scores", "delta", delta, "[S, N, D]")
    _check_floating("edge_scores", "grad", grad, "[R, N, D]", like=delta)
    if grad.shape[1:] != delta.shape[1:]:
        _fail("edge_scores", f"grad of shape [R, {delta.shape[1]}, {delta.shape[2]}]", list(grad.shape))
    senders, tokens, receivers = delta.shape[0], delta.shape[1], grad.shape[0]
    _check_index("edge_scores", "reach", reach, receivers, delta)
    if segments is not None:
        _check_index("edge_scores", "segments", segments, tokens, delta)
    wide = accumulation_dtype(delta.dtype)
    if out is None:
        shape: list[Any] = [senders, receivers]
        if segments is not None:
            count = segments.max().item() + 1 if tokens else 0
            if torch.compiler.is_compiling():
                torch._check(count >= 0)  # what a compiler must know of a size
            elif tokens and not 1 <= count < 2**63:
                _fail("edge_scores", "segments from 0 to 2**63 - 2", count - 1)
            shape.insert(0, count)
        out = delta.new_zeros(shape, dtype=wide)
    else:
        _check_out("edge_scores", out, senders, receivers, segments is not None, wide, delta.device)
    _dispatch.check_impl("edge_scores", impl, delta.device)
    torch.ops.eap_kernels.edge_scores.select(delta.detach(), grad.detach(), reach, out, segments, impl)
    return out


@dataclass(frozen=True, eq=False)
class Nodes:
    """Consecutive senders or receivers in head space: node i stands for the residual-space rows

        values[:, i] @ weight[i // (h // g)] - sum_m coefficients[i, m, :, None] * normalised[m]    [N, D]

    For a head that writes, they are the difference of its values and its slice of the output projection. For a head
    that reads, they are the gradient at its projection, the projection's weight times the norm's gain, and the norm's
    second term. All have one dtype and device, and any strides.

    Args:
        values: [N, h, K], or [N, h, D] where there is no weight.
        weight: [g, K, D], g a divisor of h: nodes share a weight, as query heads share a key head's.
        coefficients: [h, M, N], together with `normalised`.
        normalised: [M, N, D], the normalised inputs of M path points.
    """

    values: Tensor
    weight: Tensor | None = None
    coefficients: Tensor | None = None
    normalised: Tensor | None = None


_SHAPES = {"values": "[N, h, K]", "weight": "[g, K, D]", "coefficients": "[h, M, N]", "normalised": "[M, N, D]"}


def _workspace(device: torch.device) -> int:
    there = device.type == "cuda" and torch.cuda.is_available()  # fake tensors may name a GPU that is not there
    return torch.cuda.get_device_properties(device).total_memory // 16 if there else 2**28


@_dispatch.in_memory
def head_space_scores(
    senders: Sequence[Nodes],
    receivers: Sequence[Nodes],
    reach: Tensor,
    out: Tensor | None = None,
    impl: str = "auto",
    workspace: int | None = None,
) -> Tensor:
    """`edge_scores` of nodes kept in head space, without ever holding [S, N, D] or [R, N, D].

    Tiles of the residual-space rows are expanded and contracted one after another, so `workspace` bounds the memory
    beyond the inputs, whatever N is. The norm's gradient is that of "Gradients in head space" in ARCHITECTURE.md.

    Args:
        senders: groups whose nodes, in order, are the S senders.
        receivers: groups whose nodes, in order, are the R receivers.
        reach: int64 [R], 0 <= reach <= S: how many senders each receiver sees.
        out: [S, R], added to in place; fp64 for fp64 inputs, else fp32. Allocated with zeros when absent.
        impl: "auto", which follows a measured rule, or a name in `backends()`.
        workspace: bytes of expanded rows held at once, but at least one token's; by default 2^28, or on a GPU a
            sixteenth of its memory, as there each tile costs launches and reads all weights.

    Returns:
        `out`. Not differentiable: the inputs are detached.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing has been written then.
        RuntimeError: the backend asked for is not available.
        torch.OutOfMemoryError: memory ran out; an `out` handed in may hold a part of the sums.

    Example:
        >>> import torch, eap_kernels as ek
        >>> head = ek.Nodes(torch.ones(3, 1, 2), weight=torch.ones(1, 2, 4))  # K = 2, D = 4
        >>> ek.head_space_scores([head], [ek.Nodes(torch.ones(3, 1, 4))], torch.tensor([1]))
        tensor([[24.]])
    """
    op = "head_space_scores"
    listed = isinstance(senders, Sequence) and isinstance(receivers, Sequence)
    groups: list[Nodes] = [*senders, *receivers] if listed else []
    if not (listed and senders and receivers and all(isinstance(group, Nodes) for group in groups)):
        kinds = [type(each).__name__ for each in (groups if listed else (senders, receivers))]
        _fail(op, "senders and receivers to be lists of at least one Nodes", kinds, TypeError)
    features = _check_nodes(groups)
    first = groups[0].values
    n_senders, n_receivers = (sum(group.values.shape[1] for group in side) for side in (senders, receivers))
    _check_index(op, "reach", reach, n_receivers, first)
    if workspace is None:
        workspace = _workspace(first.device)
    if isinstance(workspace, bool) or not isinstance(workspace, Integral) or not 1 <= workspace < 2**63:
        _fail(op, "a workspace of 1 to 2**63 - 1 bytes", repr(workspace))
    wide = accumulation_dtype(first.dtype)
    if out is None:
        out = first.new_zeros((n_senders, n_receivers), dtype=wide)
    else:
        _check_out(op, out, n_senders, n_receivers, False, wide, first.device)
    _dispatch.check_impl(op, impl, out.device)
    none = first.new_empty(0)
    lists = [
        [none if x is None else x.detach() for x in column]
        for column in zip(*((g.values, g.weight, g.coefficients, g.normalised) for g in groups), strict=True)
    ]
    torch.ops.eap_kernels.head_space_scores.select(*lists, len(senders), features, reach, out, int(workspace), impl)
    return out


@_dispatch.in_memory
def masked_read(base: Tensor, delta: Tensor, mask: Tensor, impl: str = "auto") -> Tensor:
    """Run a circuit's reads: y[v] = base[v] + sum_u mask[u, v] * delta[u].

    With base the corrupted residual and delta = current - corrupted contributions, y[v] is the input of
    receiver v in the circuit. Differentiable once, in base, delta and a floating mask; the mask's gradient is
    `edge_scores`. Senders whose mask row is zero are not read: their delta may hold anything.

    A mask with a leading dimension of circuits reads them all. Where they share delta, that is one read. Where each has
    its own, it is one product of the reference's on a GPU, which `auto` takes: every sender is read and must be finite.

    Args:
        base: [N, D], shared by all receivers, [R, N, D] or [C, R, N, D]; delta's dtype and device, any strides.
        delta: [S, N, D], floating, any strides; or [C, S, N, D], each circuit's own.
        mask: [S, R] or [C, S, R], bool or floating.
        impl: "auto", which follows a measured rule, or a name in `backends()`.

    Returns:
        [R, N, D] or [C, R, N, D] in delta's dtype; sums are kept in fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: an argument does not fit.
        RuntimeError: the backend asked for is not available, or a second-order or forward-mode gradient was asked for.
        torch.OutOfMemoryError: memory ran out.

    Example:
        >>> import torch, eap_kernels
        >>> mask = torch.ones(3, 1, dtype=torch.bool)
        >>> eap_kernels.masked_read(torch.zeros(1, 2), torch.ones(3, 1, 2), mask)
        tensor([[[3., 3.]]])
    """
    _check_read(base, delta, mask)
    if not torch.compiler.is_compiling() and any(unpack_dual(x).tangent is not None for x in (base, delta, mask)):
        raise RuntimeError("masked_read: expected gradients in reverse mode, got a tangent of forward mode")
    _dispatch.check_impl("masked_read", impl, delta.device)
    read: Callable[..., Tensor] = torch.ops.eap_kernels.masked_read.select
    if mask.dim() == 2:
        return read(base, delta, mask, impl)
    circuits, _, receivers = mask.shape
    if delta.dim() == 3:
        base = base if base.dim() == 2 else base.expand(circuits, receivers, *base.shape[-2:]).flatten(0, 1)
        return read(base, delta, _side_by_side(mask), impl).reshape(circuits, receivers, *delta.shape[1:])
    return read(base if base.dim() == 4 else base.expand(circuits, receivers, *delta.shape[2:]), delta, mask, impl)


def _side_by_side(mask: Tensor) -> Tensor:
    """[C, S, R] -> [S, C·R]: circuits that share delta are read as the receivers of one."""
    return mask.transpose(0, 1).flatten(1)


def backends() -> dict[str, str | None]:
    """Every backend by name, with None where it can run and the reason where it cannot."""
    return {name: backend.missing() for name, backend in BACKENDS.items()}


def explain(op: str, *args: object) -> str:
    """One sentence on what `impl="auto"` runs for these arguments, and why. It measures first where a call would.

    Args:
        op: the operator's name.
        args: the operator's own arguments, in its own order; those after the required ones may be left out.
    """
    known = (*_auto.RULES, *_auto.ONE_LAUNCH)
    if op not in known:
        _fail("explain", f"one of {', '.join(known)}", repr(op))
    if op == "masked_read" and len(args) > 1 and isinstance(args[1], Tensor) and args[1].dim() == 4 and args[1].is_cpu:
        _fail("explain", "one circuit's delta, since each circuit is read by itself", list(args[1].shape))
    if op == "masked_read" and len(args) > 2 and all(isinstance(x, Tensor) and x.dim() == 3 for x in args[1:3]):
        args = (*args[:2], _side_by_side(args[2]), *args[3:])  # type: ignore[arg-type]
    try:
        # A rule looks only at the nodes' values.
        choice = _auto.choose(op, *([node.values for node in x] if isinstance(x, Sequence) else x for x in args))
    except (AttributeError, IndexError, TypeError) as error:
        raise TypeError(f"explain: expected the tensors of {op}, got {len(args)} arguments") from error
    return f"{op}: auto runs {choice.impl}: {choice.reason}"


def _fail(op: str, expected: str, got: object, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{op}: expected {expected}, got {got}")


def _check_tensor(op: str, name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        _fail(op, f"{name} to be a tensor", type(x).__name__, TypeError)
    if x.layout != torch.strided or x.is_nested:
        _fail(op, f"{name} to be a dense tensor", "a nested one" if x.is_nested else x.layout, TypeError)


def _check_floating(op: str, name: str, x: Tensor, shape: str = "", like: Tensor | None = None) -> None:
    _check_tensor(op, name, x)
    if x.dtype not in FLOATS:
        _fail(op, f"{name} in float64, float32, bfloat16 or float16", x.dtype, TypeError)
    if shape and x.dim() != shape.count(",") + 1:
        _fail(op, f"{name} of shape {shape}", list(x.shape))
    if like is not None:
        _check_like(op, name, x, like)


def _check_like(op: str, name: str, x: Tensor, delta: Tensor) -> None:
    of = "the first values'" if op == "head_space_scores" else "delta's"
    if x.dtype != delta.dtype:
        _fail(op, f"{name} in {of} dtype {delta.dtype}", x.dtype, TypeError)
    if x.device != delta.device:
        _fail(op, f"{name} on {of} device {delta.device}", x.device)


def _check_index(op: str, name: str, x: Tensor, count: int, values: Tensor) -> None:
    _check_tensor(op, name, x)
    if x.dtype != torch.int64:
        _fail(op, f"{name} in int64", x.dtype, TypeError)
    if list(x.shape) != [count]:
        _fail(op, f"{name} of shape [{count}]", list(x.shape))
    if x.is_meta and not values.is_meta:  # torch would compute nothing
        _fail(op, f"{name} on a device that holds values", x.device)


def _check_read(base: Tensor, delta: Tensor, mask: Tensor) -> None:
    op = "masked_read"
    _check_tensor(op, "mask", mask)
    own = isinstance(delta, Tensor) and delta.dim() == 4 and mask.dim() == 3
    _check_floating(op, "delta", delta, "[C, S, N, D]" if own else "[S, N, D]")
    _check_tensor(op, "base", base)
    _check_like(op, "base", base, delta)
    if mask.dtype != torch.bool and mask.dtype not in FLOATS:
        _fail(op, "a bool or floating mask", mask.dtype, TypeError)
    if mask.device != delta.device:
        _fail(op, f"mask on {delta.device}", mask.device)
    senders, *shared = delta.shape[-3:]
    circuits = delta.shape[0] if own else "C"
    if mask.dim() not in (2, 3) or mask.shape[-2] != senders or (own and mask.shape[0] != circuits):
        _fail(op, f"mask of shape [{senders}, R] or [{circuits}, {senders}, R]", list(mask.shape))
    lead = [*mask.shape[:-2], mask.shape[-1]]
    shapes = [[*lead[i:], *shared] for i in range(len(lead), -1, -1)]
    if list(base.shape) not in shapes:
        _fail(op, f"base of shape {' or '.join(map(str, shapes))}", list(base.shape))


def _check_nodes(groups: Sequence[Nodes]) -> int:
    """D, the features of residual-space rows."""
    op, first = "head_space_scores", groups[0].values
    _check_floating(op, "values", first, _SHAPES["values"])
    for group in groups:
        for name, shape in _SHAPES.items():
            x = getattr(group, name)
            if x is not None or name == "values":
                _check_floating(op, name, x, shape, like=first)
    features = (first if groups[0].weight is None else groups[0].weight).shape[2]
    for group in groups:
        _check_sizes(group, first.shape[0], features)
    return features


def _check_sizes(group: Nodes, tokens: int, features: int) -> None:
    op = "head_space_scores"
    heads, width = group.values.shape[1:]
    if group.values.shape[0] != tokens:
        _fail(op, f"values of shape [{tokens}, h, K]", list(group.values.shape))
    if group.weight is None:
        if width != features:
            _fail(op, f"values of shape [{tokens}, h, {features}] where there is no weight", list(group.values.shape))
    else:
        shared = group.weight.shape[0]
        if list(group.weight.shape[1:]) != [width, features] or not shared or heads % shared:
            expected = f"weight of shape [g, {width}, {features}] with g a divisor of {heads}"
            _fail(op, expected, list(group.weight.shape))
    if (group.coefficients is None) != (group.normalised is None):
        _fail(op, "coefficients and normalised together", "only one of them")
    if group.coefficients is not None and group.normalised is not None:
        points = group.normalised.shape[0]
        if list(group.normalised.shape[1:]) != [tokens, features]:
            _fail(op, f"normalised of shape [M, {tokens}, {features}]", list(group.normalised.shape))
        if list(group.coefficients.shape) != [heads, points, tokens]:
            _fail(op, f"coefficients of shape [{heads}, {points}, {tokens}]", list(group.coefficients.shape))


def _check_out(
    op: str, out: Tensor, senders: int, receivers: int, segmented: bool, wide: torch.dtype, device: torch.device
) -> None:
    _check_tensor(op, "out", out)
    if out.dtype != wide:
        _fail(op, f"out in {wide}", out.dtype, TypeError)
    if out.device != device:
        _fail(op, f"out on {device}", out.device)
    if out.dim() != 2 + segmented or list(out.shape[-2:]) != [senders, receivers]:
        shape = f"[segments, {senders}, {receivers}]" if segmented else f"[{senders}, {receivers}]"
        _fail(op, f"out of shape {shape}", list(out.shape))
    _check_written(op, "out", out)


def _check_written(op: str, name: str, x: Tensor) -> None:
    if x.requires_grad:
        _fail(op, f"{name} that does not require grad", "requires_grad=True")
    if not torch.compiler.is_compiling() and x.is_neg():  # which torch.compile cannot trace
        _fail(op, f"{name} whose values stand in its memory", "a view that negates it")
