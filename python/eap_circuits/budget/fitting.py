"""How many tokens a pass may have within a budget of bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..forward import TOKENS_PER_BATCH, Batch, make_batches
from ..request import Run
from ..tasks import PairedDataset
from .memory import SHARE_OF_FREE, PeakBytes, free_bytes, parse_bytes

# Below this share of the budget a rough estimate is enough.
_NEGLIGIBLE = 0.25
# (batch, copies of it in a pass, what to call at the end of each phase)
Measured = Callable[[Batch, int, Callable[[], None]], object]


def budget(run: Run, memory: int | str | None) -> int:
    """The bytes that a user's `memory=` allows; by default half of what is free."""
    given = parse_bytes(memory)
    # Of several devices each takes its own layers' share; the one with the least room decides.
    return int(SHARE_OF_FREE * min(map(free_bytes, run.arch.devices))) if given is None else given


def numbers_per_token(run: Run) -> int:
    """About what all layers give for a token: a number for every weight that works on it, divided by the width."""
    return sum(p.numel() for p in run.arch.model.parameters()) // run.arch.d_model


def bytes_without_gradient(run: Run, kept: int, at_once: int, more: int = 0) -> int:
    """A rough estimate of a run whose record is kept of some tokens, and passes of more of them, which leave nothing.

    `more` are numbers for each of the latter.
    """
    layers, every = len(run.arch.layers), numbers_per_token(run)
    return run.arch.accumulate.itemsize * (2 * kept * every + at_once * (4 * every // layers + more))


def tokens_within(
    run: Run,
    batch_size: int | None,
    reuse_prefix: bool,
    allowed: int,
    most: int,
    rough: int,
    cost: Callable[[Batch], Cost],
    per_batch: int = TOKENS_PER_BATCH,
) -> int:
    """The tokens of a pass within a budget of bytes, at most `most`; batches have up to `per_batch` of them.

    What a run takes is measured on one and two examples only where a rough estimate comes near the budget.
    """
    if rough <= _NEGLIGIBLE * allowed:
        return most
    batch = next(make_batches(run.data, batch_size, reuse_prefix, run.arch.device, min(most, per_batch)))
    measured, suffix = cost(batch), batch.shape[1]
    tokens = most
    while tokens > suffix:
        examples = max(1, min(tokens, per_batch) // suffix)
        if measured.bytes(examples, max(1, tokens // (examples * suffix))) <= allowed:
            break
        tokens //= 2
    return max(tokens, suffix)


@dataclass(frozen=True)
class Cost:
    """Bytes that a batch takes.

    Each phase, (fixed, per example, per copy of an example), is linear in the examples and in examples times copies
    (path points, circuits, edges).
    """

    phases: tuple[tuple[int, int, int], ...]

    def bytes(self, examples: int, copies: int) -> int:
        return max(fixed + examples * (per_example + copies * per_copy) for fixed, per_example, per_copy in self.phases)


def measure_cost(data: PairedDataset, batch: Batch, run: Measured, copies: bool = True) -> Cost:
    """Run one and two copies of the batch's longest example, and the latter in one and two copies of a pass."""
    start = bool(batch.start.any())

    def measured(examples: int, side_by_side: int) -> list[int]:
        few = _some(data, batch, examples, start)
        with PeakBytes() as count:
            run(few, side_by_side, count.lap)
        return count.laps

    ones = measured(1, 1)
    more_copies = measured(1, 2) if copies else ones
    more_examples = measured(2, 1) if batch.n_examples > 1 else more_copies
    phases = []
    for one, copied, examples in zip(ones, more_copies, more_examples, strict=True):
        per_copy = copied - one
        per_example = examples - one - per_copy
        phases.append((one - per_example - per_copy, per_example, per_copy))
    return Cost(tuple(phases))


def _some(data: PairedDataset, batch: Batch, examples: int, reuse_prefix: bool) -> Batch:
    """A batch of copies of the batch's longest example."""
    longest = int(batch.index[data.longer_lengths[batch.index].argmax()])
    return next(make_batches(data[[longest] * examples], examples, reuse_prefix, batch.clean.device))
