"""Runs that start in the middle of the model, where all before is as in another run."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..adapters import Layer
from .hooks import Hooks


class LayerInputs:
    """What each layer of a run read, for others that begin there."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self._inputs: list[Tensor] = []  # [E, T, D]
        self._results: list[object] = []  # of what kind each layer's result is

    @property
    def first(self) -> Tensor:
        """The residual stream's beginning, [E, T, D]."""
        return self._inputs[0]

    def watch(self, hooks: Hooks, rows: slice = slice(None)) -> None:
        """Record some rows of the pass that has these hooks."""
        for layer in self._layers:
            hooks.on_input(layer.module, lambda x: self._inputs.append(x[rows]))
            hooks.on_result(layer.module, self._keep_kind)

    def start_at(self, index: int, copies: int, hooks: Hooks) -> None:
        """Let a pass of copies of the batch begin at this layer, or, one past the last, behind all of them."""
        for layer, result in zip(self._layers[:index], self._results, strict=False):
            hooks.pass_through(layer.module, result)
        if index < len(self._layers):
            x = self._inputs[index]
            hooks.on_input(self._layers[index].module, lambda _: x.repeat(copies, 1, 1))

    def _keep_kind(self, result: object) -> None:
        self._results.append((None,) * len(result) if isinstance(result, tuple) else None)
