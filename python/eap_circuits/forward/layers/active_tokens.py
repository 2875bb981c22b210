"""Backward passes through linear layers at only those tokens at which clean and corrupted prompts can differ.

Before an example's first difference Δ = 0, so no gradient is wanted there. In a causal model no wanted gradient passes
through there either: a token's gradient comes from itself and from later tokens. Where prefixes are not reused, for
want of a cache or by request, this saves their part of the backward pass.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ...adapters import Architecture, linear_weight
from ..batches import Batch
from ..hooks import Hooks

# Above this share of tokens picking them out costs more than their products.
_WORTH = 0.7


def skip_inactive(arch: Architecture, batch: Batch, copies: int, hooks: Hooks) -> None:
    """Let the layers' linear modules compute gradients only at the active tokens of this many copies of the batch."""
    tokens = batch.clean.numel()
    # An encoder-decoder's layers have two kinds of tokens.
    if batch.decoder is not None or len(batch.rows) > _WORTH * tokens:
        return
    rows = (torch.arange(copies, device=batch.rows.device)[:, None] * tokens + batch.rows).flatten()
    for layer in arch.layers:
        for module in layer.module.modules():
            # Subclasses and wrapped modules may compute something else.
            if type(module) in (nn.Linear, Conv1D) and "forward" not in vars(module):
                hooks.replace_forward(module, partial(_linear, module, rows, copies * tokens))


def _linear(module: nn.Module, rows: Tensor, tokens: int, x: Tensor) -> Tensor:
    # Experts see only some of the tokens, in an order of their own.
    if x.shape[:-1].numel() != tokens or not x.requires_grad:
        plain: Tensor = type(module).forward(module, x)
        return plain
    y: Tensor = _Linear.apply(x, linear_weight(module), module.bias, rows)
    return y


class _Linear(torch.autograd.Function):
    """x Wᵀ + b, whose gradient with respect to x is computed at some rows and zero at all others."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
        ctx.save_for_backward(weight, rows)
        y = functional.linear(x.flatten(0, -2), weight, bias)
        # No view, which hooks of others could not change in place.
        found: Tensor = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], len(weight)])
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, rows = ctx.saved_tensors
        (gradient,) = gradients
        x = gradient.new_zeros(*gradient.shape[:-1], weight.shape[1])
        x.flatten(0, -2)[rows] = gradient.flatten(0, -2)[rows] @ weight
        return x, None, None, None
