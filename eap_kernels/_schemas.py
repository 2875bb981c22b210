"""The torch operators: schemas, shape functions and gradients. No implementation.

Each operator has two overloads. The plain one runs the device's native kernel if one is registered, and the reference
otherwise. It takes reach and segments on the CPU, and `tf32` allows a GPU's kernel to round fp32 operands. `select`
also takes the backend's name and is opaque to tracing; the public functions call it.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

lib = torch.library.Library("eap_kernels", "DEF")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tf32() -> bool:
    """Whether a GPU may round fp32 operands to tf32: torch's own switch for matrix products."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def refuse_second_order(op: str) -> None:
    """In a backward pass: what it computes of saved operands has no gradient of its own."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op}: expected a first-order backward, got create_graph=True")


def _in_place_fake(*args: Any, **kwargs: Any) -> None:
    return None


def _masked_read_fake(base: Tensor, delta: Tensor, mask: Tensor, impl: str = "auto") -> Tensor:
    # Of many circuits receivers lead in memory.
    y = delta.new_empty((mask.shape[-1], *mask.shape[:-2], *delta.shape[-2:]))
    return y if mask.dim() == 2 else y.transpose(0, 1)


def _normalise_rows_fake(
    x: Tensor, eps: float, centred: bool, rows: Tensor | None, out: Tensor | None, impl: str = "auto"
) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1] if rows is None else len(rows)), dtype=accumulation_dtype(x.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    base, delta, mask, *impl = inputs
    ctx.save_for_backward(delta, mask)
    ctx.base_is_shared = base.dim() == delta.dim() - 1
    ctx.impl = impl


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_order("masked_read")
    delta, mask = ctx.saved_tensors
    need_base, need_delta, need_mask, *_ = ctx.needs_input_grad
    grad_base = grad_delta = grad_mask = None
    # The same overload as forward: `select` goes to the same backend.
    ops, overload = torch.ops.eap_kernels, attrgetter("select" if ctx.impl else "default")
    if need_base:
        wide = accumulation_dtype(grad_y.dtype)
        grad_base = grad_y.sum(0, dtype=wide).to(grad_y.dtype) if ctx.base_is_shared else grad_y
    if need_delta:
        zeros = delta.new_zeros(delta.shape[1:]) if delta.dim() == 3 else delta.new_zeros(()).expand_as(delta)
        grad_delta = overload(ops.masked_read)(zeros, grad_y, mask.mT, *ctx.impl)
    if need_mask:
        reach = torch.full((mask.shape[-1],), mask.shape[-2], dtype=torch.int64, device="cpu")
        scores = delta.new_zeros(mask.shape, dtype=accumulation_dtype(delta.dtype))
        for each in zip(delta, grad_y, scores, strict=True) if mask.dim() == 3 else [(delta, grad_y, scores)]:
            overload(ops.edge_scores)(*each[:2], reach, each[2], None, *ctx.impl)
        grad_mask = scores.to(mask.dtype)
    return (grad_base, grad_delta, grad_mask, *(None for _ in ctx.impl))


# Arguments, what only the plain overload takes, result, and the result's shape.
OPERATORS: dict[str, tuple[str, str, str, Callable[..., Tensor | None]]] = {
    "edge_scores": (
        "Tensor delta, Tensor grad, Tensor reach, Tensor(a!) out, Tensor? segments",
        ", bool tf32=False",
        "()",
        _in_place_fake,
    ),
    # Groups of nodes, senders first; an absent operand is an empty tensor.
    "head_space_scores": (
        "Tensor[] values, Tensor[] weights, Tensor[] coefficients, Tensor[] normalised, "
        "int sender_groups, int features, Tensor reach, Tensor(a!) out, int workspace",
        "",
        "()",
        _in_place_fake,
    ),
    "masked_read": ("Tensor base, Tensor delta, Tensor mask", "", "Tensor", _masked_read_fake),
    "normalise_rows": (
        "Tensor x, float eps, bool centred, Tensor? rows, Tensor(a!)? out",
        "",
        "Tensor",
        _normalise_rows_fake,
    ),
    "collapse": (
        "Tensor gradient, Tensor values, Tensor r, Tensor weights, Tensor(a!) out, Tensor(b!) coefficients, "
        "int features, bool gathered, Tensor? rows, Tensor? constant, Tensor? gain",
        "",
        "()",
        _in_place_fake,
    ),
}
for _op, (_arguments, _plain, _result, _fake) in OPERATORS.items():
    for _overload, _last in ((_op, _plain), (f"{_op}.select", ", str impl")):
        lib.define(f"{_overload}({_arguments}{_last}) -> {_result}")
        torch.library.register_fake(f"eap_kernels::{_overload}", _fake, lib=lib)
for _overload in ("masked_read", "masked_read.select"):
    torch.library.register_autograd(f"eap_kernels::{_overload}", _backward, setup_context=_setup_context, lib=lib)
