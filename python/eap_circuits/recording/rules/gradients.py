"""Functions of torch's with another gradient than their own, of which backward rules are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...adapters import Norm, as_given

_SLOPES = ("SigmoidBackward0", "MulBackward0")
ATTENTION = functional.scaled_dot_product_attention


class Changed(torch.autograd.Function):
    """forward(x), whose gradient is `rule(x, y)` of that with respect to y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Callable[[Tensor], Tensor], rule: Callable[..., Any]) -> Tensor:
        y = forward(x)
        ctx.backward_of = rule(x, y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.backward_of(*gradients), None, None


def slope(x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    ratio = torch.where(x == 0, 0, y / x)
    return lambda gradient: gradient * ratio


def is_slope(b: Tensor, a: Tensor) -> bool:
    """Is b = σ(βa)? Their product is then an activation function that some models write out."""
    node, names = b.grad_fn, []
    while node is not a.grad_fn:
        if node is None or node.name() not in _SLOPES:
            return False
        names.append(node.name())
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        node = parents[0] if len(parents) == 1 else None
    return "SigmoidBackward0" in names


def normalise(norm: Norm, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = as_given(norm.module, x)

    def rule(x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        scale = norm.scale(x)[..., None]
        return lambda gradient: (norm.backwards(gradient.to(scale.dtype)) * scale).to(gradient.dtype)

    y: Tensor = Changed.apply(x, forward, rule)
    return y


def half(gradient: Tensor) -> Tensor:
    return gradient / 2


def halved_copy(z: Tensor) -> Tensor | None:
    if not z.requires_grad:  # of a pass whose gradients end after it
        return None
    z = z.view_as(z)
    z.register_hook(half)
    return z


class Attention(torch.autograd.Function):
    """scaled_dot_product_attention with the gradient of `pattern`; only the backward pass writes it out."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], pattern: Any) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.options, ctx.pattern = options, pattern
        return ATTENTION(q, k, v, **options)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dtype = torch.promote_types(gradients[0].dtype, torch.float32)
        with torch.enable_grad():
            q, k, v = inputs = [x.detach().to(dtype).requires_grad_() for x in ctx.saved_tensors]
            z = _attention(q, k, v, ctx.pattern, **ctx.options)
        # Queries and keys of a constant pattern get zeros, as hooks on them expect a gradient.
        found = torch.autograd.grad(z, inputs, gradients[0].to(dtype), materialize_grads=True)
        return *(x.to(gradients[0].dtype) for x in found), None, None


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Callable[[Tensor, Tensor, int], Tensor],
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As torch documents scaled_dot_product_attention, in eval mode, with `pattern` of the softmax and its input."""
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return pattern(scores.softmax(-1), scores, -1) @ v
