"""The torch operators: schemas, shape functions and gradients. No implementation.

Each operator has two overloads. The plain one is what a device offers: the native kernel where one is registered, the
reference elsewhere; it wants reach and segments on the CPU; `tf32` allows a GPU's kernel to round fp32 operands.
`select` carries the backend's name, is opaque to tracing, and is what the public functions call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

lib = torch.library.Library("eap_kernels", "DEF")

_EDGE_SCORES = "Tensor delta, Tensor grad, Tensor reach, Tensor(a!) out, Tensor? segments"
_MASKED_READ = "Tensor base, Tensor delta, Tensor mask"
# Groups of nodes, senders first; an absent operand is an empty tensor.
_HEAD_SPACE_SCORES = (
    "Tensor[] values, Tensor[] weights, Tensor[] coefficients, Tensor[] normalised, "
    "int sender_groups, int features, Tensor reach, Tensor(a!) out, int workspace"
)
lib.define(f"edge_scores({_EDGE_SCORES}, bool tf32=False) -> ()")
lib.define(f"edge_scores.select({_EDGE_SCORES}, str impl) -> ()")
lib.define(f"head_space_scores({_HEAD_SPACE_SCORES}) -> ()")
lib.define(f"head_space_scores.select({_HEAD_SPACE_SCORES}, str impl) -> ()")
lib.define(f"masked_read({_MASKED_READ}) -> Tensor")
lib.define(f"masked_read.select({_MASKED_READ}, str impl) -> Tensor")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scores_fake(*args: Any, **kwargs: Any) -> None:
    return None


def _masked_read_fake(base: Tensor, delta: Tensor, mask: Tensor, impl: str = "auto") -> Tensor:
    return delta.new_empty((mask.shape[1], delta.shape[1], delta.shape[2]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    base, delta, mask, *impl = inputs
    ctx.save_for_backward(delta, mask)
    ctx.base_is_shared = base.dim() == 2
    ctx.impl = impl


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("masked_read: expected a first-order backward, got create_graph=True")
    delta, mask = ctx.saved_tensors
    need_base, need_delta, need_mask, *_ = ctx.needs_input_grad
    grad_base = grad_delta = grad_mask = None
    if need_base:
        wide = accumulation_dtype(grad_y.dtype)
        grad_base = grad_y.sum(0, dtype=wide).to(grad_y.dtype) if ctx.base_is_shared else grad_y
    if need_delta:
        grad_delta = _read(delta.new_zeros(delta.shape[1:]), grad_y, mask.T, *ctx.impl)
    if need_mask:
        reach = torch.full((mask.shape[1],), mask.shape[0], dtype=torch.int64, device="cpu")
        scores = delta.new_zeros(mask.shape, dtype=accumulation_dtype(delta.dtype))
        _score(delta, grad_y, reach, scores, None, *ctx.impl)
        grad_mask = scores.to(mask.dtype)
    return (grad_base, grad_delta, grad_mask, *(None for _ in ctx.impl))


def _read(base: Tensor, delta: Tensor, mask: Tensor, *impl: str) -> Tensor:
    op = torch.ops.eap_kernels.masked_read
    result: Tensor = op.select(base, delta, mask, *impl) if impl else op.default(base, delta, mask)
    return result


def _score(delta: Tensor, grad: Tensor, reach: Tensor, out: Tensor, segments: Tensor | None, *impl: str) -> None:
    op = torch.ops.eap_kernels.edge_scores
    if impl:
        op.select(delta, grad, reach, out, segments, *impl)
    else:
        op.default(delta, grad, reach, out, segments)


for _overload in ("", ".select"):
    torch.library.register_fake(f"eap_kernels::edge_scores{_overload}", _scores_fake, lib=lib)
    torch.library.register_fake(f"eap_kernels::head_space_scores{_overload}", _scores_fake, lib=lib)
    torch.library.register_fake(f"eap_kernels::masked_read{_overload}", _masked_read_fake, lib=lib)
    torch.library.register_autograd(
        f"eap_kernels::masked_read{_overload}", _backward, setup_context=_setup_context, lib=lib
    )
