"""The last layer's MLP where logits are scored: elsewhere nothing reads what it gives, and no gradient comes back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..adapters import Layer
from .hooks import Hooks


def at_scored(x: Tensor, scored: Tensor) -> Tensor:
    """One position of each row, int64 [rows]: [rows, T, X] -> [rows, 1, X]."""
    return x[_places(x, scored)][:, None]


def _places(x: Tensor, scored: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(len(x), device=x.device), scored.to(x.device)


class ScoredMLP:
    """An MLP that runs at one position of each row, and gives 0 at the others.

    Args:
        layer: whose MLP it is.
        scored: the positions of so many rows, int64 [rows].
    """

    def __init__(self, layer: Layer, scored: Callable[[int], Tensor]) -> None:
        self._layer, self._scored = layer, scored
        self._tokens = 0

    def put(self, hooks: Hooks) -> None:
        """Give the whole rows back; `hooks` of one token, before those that look at what the MLP gives."""
        hooks.on_output(self._layer.mlp_out, self._put)

    def take(self, hooks: Hooks) -> None:
        """Take the positions, after the hooks that look at what the MLP reads."""
        hooks.on_input(self._layer.mlp_in, self._take)

    def _take(self, x: Tensor) -> Tensor:
        self._tokens = x.shape[1]
        return at_scored(x, self._scored(len(x)))

    def _put(self, y: Tensor) -> Tensor:
        full = y.new_zeros(len(y), self._tokens, y.shape[2])
        full[_places(y, self._scored(len(y)))] = y[:, 0]
        return full
