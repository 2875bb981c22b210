"""Run the last layer's MLP only where logits are scored: elsewhere nothing reads its output, and it has no gradient."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ...adapters import Layer
from ..hooks import Hooks

Scored = tuple[Tensor, Tensor]  # rows and positions, int64 [n] each


def at_scored(x: Tensor, scored: Scored) -> Tensor:
    """The scored positions, [rows, T, X] -> [n, 1, X]."""
    return x[_places(x, scored)][:, None]


def _places(x: Tensor, scored: Scored) -> Scored:
    row, position = scored
    return row.to(x.device), position.to(x.device)


class ScoredMLP:
    """An MLP that runs at the scored positions of each row and returns 0 at the others.

    Args:
        layer: the layer whose MLP it is.
        scored: called with a number of rows; gives their positions.
    """

    def __init__(self, layer: Layer, scored: Callable[[int], Scored]) -> None:
        self._layer, self._scored = layer, scored
        self._rows = self._tokens = 0

    def put(self, hooks: Hooks) -> None:
        """Put its output back into whole rows; `hooks` are for one token and come before any that read the output."""
        hooks.on_output(self._layer.mlp_out, self._put)

    def take(self, hooks: Hooks) -> None:
        """Pick its input at the positions; to be added after any hooks that read the input."""
        hooks.on_input(self._layer.mlp_in, self._take)

    def _take(self, x: Tensor) -> Tensor:
        self._rows, self._tokens = x.shape[:2]
        return at_scored(x, self._scored(len(x)))

    def _put(self, y: Tensor) -> Tensor | None:
        if not self._rows:  # a run that starts behind it, where the layer passes its input through
            return None
        full = y.new_zeros(self._rows, self._tokens, y.shape[2])
        full[_places(y, self._scored(self._rows))] = y[:, 0]
        return full
