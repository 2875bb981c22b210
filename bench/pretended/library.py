"""Functions of the library's that are one kernel each on a GPU, forward and backward: attention, and RMSNorm."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.pretended.tensors import LIBRARY, META, Pretend, recorded, tell


def attention_forward(*_: Any) -> None:
    """Stands for the kernel when observers are told of it, as the others do."""


def attention_backward(*_: Any) -> None:
    pass


def rms_norm(*_: Any) -> None:
    pass


def rms_norm_backward(*_: Any) -> None:  # without the weight's gradient
    pass


class _Kernel(torch.autograd.Function):
    """function(*tensors), with gradients of the first few; `empty` makes what it gives where there are no values."""

    @staticmethod
    def forward(ctx: Any, function: Any, empty: Any, names: Any, slopes: int, *tensors: Any) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.function, ctx.told, ctx.slopes = function, names[1], slopes
        held = [x.held for x in tensors]
        without = any(x.is_meta for x in held)
        found = Pretend(empty(*held) if without else recorded(partial(function, *held), held))
        tell("op", names[0], tensors, {}, found)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        held, n = [x.held for x in ctx.saved_tensors], ctx.slopes
        if any(x.is_meta for x in (*held, gradient.held)):
            found = [torch.empty_like(x, device=META) for x in held[:n]]
        else:
            found = recorded(partial(_slopes, ctx.function, n, held, gradient.held), held)
        made = [Pretend(x) for x in found]
        tell("op", ctx.told, (*ctx.saved_tensors, gradient), {}, made)
        return None, None, None, None, *made, *[None] * (len(held) - n)


def _slopes(function: Callable[..., Tensor], n: int, held: list[Tensor], gradient: Tensor) -> list[Tensor]:
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_(True) for x in held[:n]]
        return list(torch.autograd.grad(function(*inputs, *held[n:]), inputs, gradient))


def _attention(q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
               scale: float | None = None, enable_gqa: bool = False) -> Tensor:  # fmt: skip
    given = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    tensors = [q, k, v, *([] if attn_mask is None else [attn_mask])]
    if not all(isinstance(x, Pretend) for x in tensors):
        raise RuntimeError("scaled_dot_product_attention: expected all tensors on one device")

    def empty(q: Tensor, _: Tensor, v: Tensor, *mask: Tensor) -> Tensor:
        batch, heads, tokens, _ = q.shape
        return torch.empty(batch, tokens, heads, v.shape[-1], dtype=q.dtype, device=META).transpose(1, 2)

    function, names = partial(functional.scaled_dot_product_attention, **given), (attention_forward, attention_backward)
    found: Tensor = _Kernel.apply(function, empty, names, 3, *tensors)
    return found


def _rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    def function(x: Tensor, weight: Tensor | None = None) -> Tensor:
        return functional.rms_norm(x, shape, weight, eps)

    empty: Any = lambda x, *_: torch.empty_like(x, device=META)  # noqa: E731
    tensors = [x] if weight is None else [x, weight]
    found: Tensor = _Kernel.apply(function, empty, (rms_norm, rms_norm_backward), 1, *tensors)
    return found


LIBRARY |= {functional.scaled_dot_product_attention: _attention, functional.rms_norm: _rms_norm}
