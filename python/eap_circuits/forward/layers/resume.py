"""Start runs in the middle of the model, if everything before is the same as in another run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from ...adapters import Layer
from ..hooks import Hooks
from ..runner import Register

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """What the layers read in one run, from which others can start.

    Args:
        layers: all of the model's.
        inputs: the residual stream before each layer, [E, T, D].
        results: the form of each layer's result, with None for tensors.
    """

    layers: Sequence[Layer]
    inputs: Sequence[Tensor]
    results: Sequence[object]

    def start_at(self, index: int, copies: int, hooks: Hooks) -> None:
        """Start a pass over copies of the batch at this layer; one past the last layer: after all of them.

        It starts earlier where the layer is a part of the one before, or keys and values of an earlier one are needed.
        """
        while 0 < index < len(self.layers) and self.layers[index].module is self.layers[index - 1].module:
            index -= 1
        while (first := min((x.keys for x in self.layers[index:] if x.keys is not None), default=index)) < index:
            index = first
        for layer, result in zip(self.layers[:index], self.results, strict=False):
            hooks.pass_through(layer.module, result)
        if index < len(self.layers):
            x = self.inputs[index]
            # Before all that reads or changes what the layer begins with.
            hooks.on_input(self.layers[index].module, lambda _: x.repeat(copies, 1, 1), first=True)


def record_layer_inputs(
    layers: Sequence[Layer], run: Callable[[Register], T], rows: slice = slice(None)
) -> tuple[LayerInputs, T]:
    """(What the layers read in some rows of a pass, what `run` returns, which gets the hooks for the pass)."""
    inputs: list[Tensor] = []
    results: list[object] = []

    def register(hooks: Hooks) -> None:
        for layer in layers:
            hooks.on_input(layer.module, lambda x: inputs.append(x[rows]))
            hooks.on_result(
                layer.module, lambda y: results.append((None,) * len(y) if isinstance(y, (tuple, list)) else None)
            )

    result = run(register)
    return LayerInputs(layers, inputs, results), result
