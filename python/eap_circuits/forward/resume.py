"""Start runs in the middle of the model, if everything before is the same as in another run."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..adapters import Layer
from .hooks import Hooks


class LayerInputs:
    """The input of each layer in one run, from which others can start."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self._inputs: list[Tensor] = []  # [E, T, D]
        self._results: list[object] = []  # the form of each layer's result, with None for tensors

    @property
    def first(self) -> Tensor:
        """The residual stream before the first layer, [E, T, D]."""
        return self._inputs[0]

    def watch(self, hooks: Hooks, rows: slice = slice(None)) -> None:
        """Record some rows of the pass with these hooks."""
        for layer in self._layers:
            hooks.on_input(layer.module, lambda x: self._inputs.append(x[rows]))
            hooks.on_result(layer.module, self._keep_kind)

    def start_at(self, index: int, copies: int, hooks: Hooks) -> None:
        """Start a pass over copies of the batch at this layer; one past the last layer: after all of them."""
        for layer, result in zip(self._layers[:index], self._results, strict=False):
            hooks.pass_through(layer.module, result)
        if index < len(self._layers):
            x = self._inputs[index]
            hooks.on_input(self._layers[index].module, lambda _: x.repeat(copies, 1, 1))

    def _keep_kind(self, result: object) -> None:
        self._results.append((None,) * len(result) if isinstance(result, tuple) else None)
