"""A plain run of a batch, kept for the runs of circuits and of patched edges."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from ..adapters import Layer, Norm
from ..forward import Constants, Hooks, Runner, at_tokens


class Recording:
    """One copy of the batch in a pass, as far as runs that differ from it read it.

    Holds what the norms read [E, T, D] and, per layer, the projections' outputs [E, T, heads·K] (per query head where
    the graph is), what the heads write [E, T, H·K] and the MLP's output [E, T, D].

    Args:
        runner: the model on one batch.
        copy: which one.
        aligned: what to do with all of it.
        constants: see `RecordedRun`.
    """

    def __init__(
        self,
        runner: Runner,
        copy: int = 0,
        aligned: Callable[[Tensor], Tensor] = lambda x: x,
        constants: Constants | None = None,
    ) -> None:
        self._runner, self._constants, self._aligned = runner, constants, aligned
        self._rows = slice(copy * runner.batch.n_examples, (copy + 1) * runner.batch.n_examples)
        self.norm_inputs: dict[Norm, Tensor] = {}
        self.projections: list[dict[str, Tensor]] = []
        self.values: list[Tensor] = []
        self.mlps: list[Tensor] = []

    def watch(self, hooks: Hooks) -> None:
        """Record the pass that has these hooks."""
        arch, batch = self._runner.arch, self._runner.batch
        if self._constants is not None:
            self._constants.replace(arch, batch, hooks)
        for norm in arch.norms:
            hooks.on_input(norm.module, partial(self._read, norm))
        for index, layer in enumerate(arch.layers):
            self.projections.append({})
            for module, columns in self._runner.projection_sites(index):
                hooks.on_output(module, partial(self._project, index, columns))
            hooks.on_input(layer.out, partial(self._write, layer))
            # A copy: some models add to the MLP's output in place.
            hooks.on_output(layer.mlp_out, lambda y: self.mlps.append(self._aligned(y[self._rows].clone())))

    def _read(self, norm: Norm, x: Tensor) -> None:
        self.norm_inputs[norm] = self._aligned(x[self._rows])

    def _project(self, index: int, columns: dict[str, slice], y: Tensor) -> None:
        own = y[self._rows]
        self.projections[index].update({letter: self._aligned(own[..., part]) for letter, part in columns.items()})

    def _write(self, layer: Layer, z: Tensor) -> None:
        own = z[self._rows]
        # Constants are of what is written.
        self.values.append(self._aligned(layer.written(own) if self._constants is None else own))


class RecordedRun(Recording):
    """A run of a batch's clean or corrupted tokens, or with all senders ablated.

    Holds `embeddings` [E, T, D] and `logits` [E, V] besides; all of a corrupted run but the logits where it is aligned
    with the clean prompts.

    Args:
        runner: the model on one batch.
        corrupted: of the corrupted tokens, else of the clean ones.
        constants: what every sender is to give instead of what it computes; the tokens then do not matter.
    """

    def __init__(self, runner: Runner, corrupted: bool, constants: Constants | None = None) -> None:
        batch = runner.batch
        corrupted = corrupted and constants is None
        super().__init__(runner, 0, batch.aligned if corrupted else lambda x: x, constants)
        embeddings = runner.embed(batch.corrupted if corrupted else batch.clean)
        if constants is not None:
            embeddings = at_tokens(constants.embedding, batch).to(embeddings.dtype, copy=True)
        self.embeddings = embeddings

        def begin(x: Tensor) -> None:
            if corrupted:
                self.embeddings = batch.aligned_input(embeddings, x)

        def register(hooks: Hooks) -> None:
            hooks.on_input(runner.arch.layers[0].module, begin)
            self.watch(hooks)

        # Constants may be learned.
        self.logits = (runner.record if constants is None else runner.logits)(embeddings, register, int(corrupted))
