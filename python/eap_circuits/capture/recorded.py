"""A plain run of a batch, kept for the runs of circuits and of patched edges."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from ..adapters import Layer, Norm
from .ablation import Constants, at_tokens
from .borrow import Hooks
from .runner import Runner
from .start import LayerInputs


class RecordedRun:
    """A run of a batch's clean or corrupted tokens, or with all senders ablated, as far as runs that differ from it
    read it.

    Holds `embeddings` [E, T, D] and `logits` [E, V] and what the norms read [E, T, D] and, per layer, the projections'
    outputs [E, T, heads·K] (per query head where the graph is), what the heads write [E, T, H·K] and
    the MLP's output [E, T, D]; all of a corrupted run but the logits where it is aligned with the clean prompts.
    `layers`, of a clean run: where others may start.

    Args:
        runner: the model on one batch.
        corrupted: of the corrupted tokens, else of the clean ones.
        constants: what every sender is to give instead of what it computes; the tokens then do not matter.
    """

    def __init__(self, runner: Runner, corrupted: bool, constants: Constants | None = None) -> None:
        arch, batch = runner.arch, runner.batch
        corrupted = corrupted and constants is None
        embeddings = runner.embed(batch.corrupted if corrupted else batch.clean)
        if constants is not None:
            embeddings = at_tokens(constants.embedding, batch).to(embeddings.dtype, copy=True)
        self.embeddings = embeddings
        aligned: Callable[[Tensor], Tensor] = batch.aligned if corrupted else lambda x: x
        self.layers = LayerInputs(arch.layers)
        self.norm_inputs: dict[int, Tensor] = {}
        self.projections: list[dict[str, Tensor]] = []
        self.values: list[Tensor] = []
        self.mlps: list[Tensor] = []

        def read(norm: Norm) -> Callable[[Tensor], None]:
            return lambda x: self.norm_inputs.__setitem__(id(norm.module), aligned(x))

        def project(index: int, columns: dict[str, slice], y: Tensor) -> None:
            self.projections[index].update({letter: aligned(y[..., part]) for letter, part in columns.items()})

        def write(layer: Layer, z: Tensor) -> None:
            # Constants are of what is written.
            self.values.append(aligned(layer.written(z) if constants is None else z))

        def begin(x: Tensor) -> None:
            if corrupted:
                self.embeddings = batch.aligned_input(embeddings, x)

        def register(hooks: Hooks) -> None:
            if constants is not None:
                constants.replace(arch, batch, hooks)
            hooks.on_input(arch.layers[0].module, begin)
            for norm in arch.norms:
                hooks.on_input(norm.module, read(norm))
            if not corrupted and constants is None:
                self.layers.watch(hooks)
            for index, layer in enumerate(arch.layers):
                self.projections.append({})
                for module, columns in runner.projection_sites(index):
                    hooks.on_output(module, partial(project, index, columns))
                hooks.on_input(layer.out, partial(write, layer))
                # A copy: some models add to the MLP's output in place.
                hooks.on_output(layer.mlp_out, lambda y: self.mlps.append(aligned(y.clone())))

        # Constants may be learned.
        self.logits = (runner.record if constants is None else runner.logits)(embeddings, register, int(corrupted))
