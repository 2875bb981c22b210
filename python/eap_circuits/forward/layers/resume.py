"""Start runs in the middle of the model, if everything before is the same as in another run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard, TypeVar

from torch import Tensor

from ...adapters import Architecture
from ..hooks import Hooks
from ..runner import Register

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """What the layers read in one run, from which others can start.

    Args:
        arch: the bound model.
        inputs: the residual stream before each layer, [E, T, D].
        results: what each layer returns beside the residual stream, such as T5's distances between positions; None
            where it returns one tensor.
        memory: what the last layer of an encoder in front of a decoder gives, [E, T, D].
    """

    arch: Architecture
    inputs: Sequence[Tensor]
    results: Sequence[tuple[object, ...] | None]
    memory: Tensor | None

    def start_at(self, index: int, copies: int, hooks: Hooks) -> None:
        """Start a pass over copies of the batch at this layer; one past the last layer: after all of them.

        It starts earlier where the layer is a part of the one before, or keys and values of an earlier one are needed.
        """
        layers, memory = self.arch.layers, self.memory
        while 0 < index < len(layers) and layers[index].module is layers[index - 1].module:
            index -= 1
        while (first := min((x.keys for x in layers[index:] if x.keys is not None), default=index)) < index:
            index = first
        for layer, result in zip(layers[:index], self.results, strict=False):
            hooks.pass_through(layer.module, result and tuple(self._repeated(x, copies) for x in result))
        # Before all that reads or changes what layers begin with.
        if memory is not None and index >= self.arch.encoder:
            hooks.on_output(layers[self.arch.encoder - 1].module, lambda _: memory.repeat(copies, 1, 1), first=True)
        if index < len(layers):
            x = self.inputs[index]
            hooks.on_input(layers[index].module, lambda _: x.repeat(copies, 1, 1), first=True)

    def _repeated(self, x: object, copies: int) -> object:
        """For copies of the batch, if it has a row for each of its rows."""
        return x.repeat(copies, *[1] * (x.dim() - 1)) if _by_row(x, len(self.inputs[0])) else x


def _by_row(x: object, rows: int) -> TypeGuard[Tensor]:
    return isinstance(x, Tensor) and x.dim() > 0 and len(x) == rows


def record_layer_inputs(
    arch: Architecture, run: Callable[[Register], T], rows: slice = slice(None)
) -> tuple[LayerInputs, T]:
    """(What the layers read in some rows of a pass, what `run` returns, which gets the hooks for the pass)."""
    # Hooks of others are called again where a run starts: what they are given is kept, not what they make of it.
    inputs: list[Tensor] = []
    memory: list[Tensor] = []
    results: list[tuple[object, ...] | None] = []

    def keep(result: Any) -> None:
        first, *others = result if isinstance(result, (tuple, list)) else (result,)
        found = (x[rows] if _by_row(x, len(first)) else x for x in others)
        results.append(tuple(found) if isinstance(result, (tuple, list)) else None)

    def own(x: Tensor) -> Tensor:
        return x[rows].clone() if arch.hooked else x[rows]

    def register(hooks: Hooks) -> None:
        for layer in arch.layers:
            hooks.on_input(layer.module, lambda x: inputs.append(own(x)), first=True)
            hooks.on_result(layer.module, keep)
        if arch.encoder:
            hooks.on_output(arch.layers[arch.encoder - 1].module, lambda y: memory.append(own(y)), first=True)

    result = run(register)
    return LayerInputs(arch, inputs, results, memory[0] if memory else None), result
