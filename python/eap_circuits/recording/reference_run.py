"""A plain run of a batch, kept for the runs of circuits and of patched edges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ..adapters import Norm, SenderSite, sender_sites
from ..forward import Constants, Hooks, Register, Runner, at_tokens, each
from .contributions import record_senders


class ReceiverInputs:
    """What receivers read in a pass.

    Holds what the norms read, [E, T, D], and, per layer, the projections' outputs [E, T, heads·K], per query head where
    the graph is.

    Args:
        runner: the model on one batch.
        keep: takes what is wanted from what a pass has at all tokens.
    """

    def __init__(self, runner: Runner, keep: Callable[[Tensor], Tensor]) -> None:
        self._runner, self._keep = runner, keep
        self.norm_inputs: dict[Norm, Tensor] = {}
        self.projections: list[dict[str, Tensor]] = [{} for _ in runner.arch.layers]

    def watch(self, hooks: Hooks) -> None:
        """Record the pass that has these hooks."""
        for norm in self._runner.arch.norms:
            hooks.on_input(norm.module, partial(self._read, norm))
        for index, found in enumerate(self.projections):
            for module, columns in self._runner.projection_sites(index):
                hooks.on_output(module, partial(self._project, found, columns))

    def _read(self, norm: Norm, x: Tensor) -> None:
        self.norm_inputs[norm] = self._keep(x)

    def _project(self, found: dict[str, Tensor], columns: dict[str, slice], y: Tensor) -> None:
        found.update({letter: self._keep(y[..., part]) for letter, part in columns.items()})


@dataclass(frozen=True, eq=False)
class ReferenceRun:
    """A run of a batch's clean or corrupted tokens, or with all senders ablated.

    All of a corrupted run but the logits is aligned with the clean prompts.

    Args:
        written: of each of `sender_sites` the embeddings [E, T, D], what the heads write [E, T, H·K], or the MLP's
            output [E, T, D].
        norm_inputs, projections: see `ReceiverInputs`.
        logits: [E, V].
    """

    written: list[Tensor]
    norm_inputs: dict[Norm, Tensor]
    projections: list[dict[str, Tensor]]
    logits: Tensor


def record_run(runner: Runner, corrupted: bool, constants: Constants | None = None) -> ReferenceRun:
    """Run one side of a batch, or all senders ablated.

    Args:
        corrupted: run the corrupted tokens, else the clean ones.
        constants: what every sender is to give instead of what it computes; the tokens then do not matter.
    """
    arch, batch = runner.arch, runner.batch
    corrupted = corrupted and constants is None
    # A view of all of x: without it, gradients of learned constants would add up in another order.
    aligned = batch.aligned if corrupted else lambda x: x[: batch.n_examples]
    inputs = ReceiverInputs(runner, aligned)
    embeddings = runner.embed(batch.corrupted if corrupted else batch.clean)
    if constants is not None:
        embeddings = at_tokens(constants.embedding, batch).to(embeddings.dtype, copy=True)
    given = embeddings

    def begin(x: Tensor) -> None:
        nonlocal given
        if corrupted:
            given = batch.aligned_input(embeddings, x)

    def keep(site: SenderSite, x: Tensor) -> Tensor:
        if site.heads is None:
            x = x.clone()  # some models add to the MLP's output in place
        elif constants is None:  # these are of what is written
            x = site.written(x)
        return aligned(x)

    def run(register: Register) -> Tensor:
        first = partial(Hooks.on_input, module=arch.layers[0].module, hook=begin)
        if constants is None:
            return runner.record(embeddings, each(first, inputs.watch, register), int(corrupted))
        # Constants stand before what is recorded, which is to be of them, and may be learned.
        return runner.logits(embeddings, each(partial(constants.replace, arch, batch), inputs.watch, register))

    written, logits = record_senders(sender_sites(arch), run, keep)
    return ReferenceRun([given, *written], inputs.norm_inputs, inputs.projections, logits)
