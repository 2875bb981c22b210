"""A plain run of a batch, kept for the runs of circuits and of patched edges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from torch import Tensor

from ..adapters import Norm, SenderSite, sender_sites
from ..forward import Constants, Hooks, Register, Runner, at_tokens, each
from .contributions import Pass, record_senders

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class ReceiverInputs:
    """What receivers read in a pass.

    Args:
        norm_inputs: what the norms read, [E, T, D].
        projections: for each layer its projections' outputs [E, T, heads·K] by letter, per query head where the graph
            is; T are the tokens of the stream that each reads.
    """

    norm_inputs: dict[Norm, Tensor]
    projections: list[dict[str, Tensor]]


def record_receiver_inputs(runner: Runner, keep: Callable[[Tensor], Tensor], run: Pass[T]) -> tuple[ReceiverInputs, T]:
    """(What receivers read in a pass, as far as `keep` keeps it; what `run` returns)."""
    arch, norm_inputs = runner.arch, dict[Norm, Tensor]()
    projections: list[dict[str, Tensor]] = [{} for _ in arch.layers]

    def read(norm: Norm, x: Tensor) -> None:
        norm_inputs[norm] = keep(x)

    def project(index: int, columns: dict[str, slice], y: Tensor) -> None:
        projections[index].update({letter: keep(y[..., part]) for letter, part in columns.items()})

    def register(hooks: Hooks) -> None:
        for norm in arch.norms:
            hooks.on_input(norm.module, partial(read, norm))
        for index in range(len(arch.layers)):
            for module, columns in runner.projection_sites(index):
                hooks.on_output(module, partial(project, index, columns))

    result = run(register)
    return ReceiverInputs(norm_inputs, projections), result


@dataclass(frozen=True, eq=False)
class ReferenceRun(ReceiverInputs):
    """A run of a batch's clean or corrupted tokens, or with all senders ablated.

    All of a corrupted run but the logits is aligned with the clean prompts.

    Args:
        written: of each of `sender_sites` the embeddings [E, T, D], what the heads write [E, T, H·K], or the MLP's
            output [E, T, D].
        logits: [E, V].
        of_constants: whether senders gave constants, and not what they make of what they read.
    """

    written: list[Tensor]
    logits: Tensor
    of_constants: bool = False


def record_run(runner: Runner, corrupted: bool, constants: Constants | None = None) -> ReferenceRun:
    """Run one side of a batch, or all senders ablated.

    Args:
        corrupted: run the corrupted tokens, else the clean ones.
        constants: what every sender is to give instead of what it computes; the tokens then do not matter.
    """
    arch, batch = runner.arch, runner.batch
    corrupted = corrupted and constants is None
    # A view of all of x: without it, gradients of learned constants would add up in another order.
    aligned = batch.aligned if corrupted else lambda x: x[: batch.n_rows]
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

    def run(receivers: Register, senders: Register) -> Tensor:
        first = partial(Hooks.on_input, module=arch.layers[0].module, hook=begin)
        if constants is None:
            return runner.record(embeddings, each(first, receivers, senders), int(corrupted))
        # Constants stand before what is recorded, which is to be of them, and may be learned.
        return runner.logits(embeddings, each(partial(constants.replace, arch, batch), receivers, senders))

    inputs, (written, logits) = record_receiver_inputs(
        runner, aligned, lambda receivers: record_senders(sender_sites(arch), partial(run, receivers), keep)
    )
    return ReferenceRun(inputs.norm_inputs, inputs.projections, [given, *written], logits, constants is not None)
