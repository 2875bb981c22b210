"""How attribution will be cut into batches and passes, and the memory that it will take."""

from __future__ import annotations

from dataclasses import dataclass

from ..capture import SHARE_OF_FREE, Batch, PeakBytes, Run, free_bytes, make_batches, most_tokens, parse_bytes
from ..graph import Graph
from ..tasks import PairedDataset
from .gradient import Scorer, points_held, steps_at_once
from .quadrature import Path
from .statistics import batch_bytes

# A pass keeps about two numbers for the backward for every weight that works on a token, divided by the width.
_NUMBERS_PER_WEIGHT = 2
# Below this share of the budget a rough estimate is enough.
_NEGLIGIBLE = 0.25


@dataclass(frozen=True)
class Plan:
    """How a gradient method runs.

    Args:
        tokens: the most tokens in a pass with gradients.
        batches: (examples, suffix tokens, path points per pass) of each batch.
        bytes: the most memory that tensors will take beside the model's weights and the data; an allocator may keep
            more, of what they have given back.
        budget: the most they may take.
    """

    tokens: int
    batches: tuple[tuple[int, int, int], ...]
    bytes: int
    budget: int


def budget(run: Run, memory: int | str | None) -> int:
    """The bytes that a user's `memory=` allows; by default half of what is free."""
    given = parse_bytes(memory)
    return int(SHARE_OF_FREE * free_bytes(run.arch.device)) if given is None else given


def tokens_per_pass(
    run: Run,
    graph: Graph,
    path: Path,
    batch_size: int | None,
    reuse_prefix: bool,
    allowed: int,
    scorer: Scorer,
) -> int:
    """The tokens of a pass within a budget of bytes.

    What a run takes is measured on one and two examples only where a rough estimate comes near the budget.
    """
    most = most_tokens(run.arch.device)
    weights = sum(p.numel() for p in run.arch.model.parameters())
    rough = _NUMBERS_PER_WEIGHT * most * weights // run.arch.d_model * run.arch.accumulate.itemsize
    if rough + batch_bytes(run, graph, batch_size or most) <= _NEGLIGIBLE * allowed:
        return most
    batch = next(make_batches(run.data, batch_size, reuse_prefix, run.arch.device, most))
    cost = _Cost(run, graph, path, batch, scorer)
    tokens = most
    while tokens > cost.suffix and cost.bytes(max(1, tokens // cost.suffix), 1) > allowed:
        tokens //= 2
    return max(tokens, cost.suffix)


def make_plan(
    run: Run,
    graph: Graph,
    path: Path,
    batch_size: int | None,
    reuse_prefix: bool,
    allowed: int,
    scorer: Scorer,
) -> Plan:
    """What `attribute` will do with this request."""
    tokens = tokens_per_pass(run, graph, path, batch_size, reuse_prefix, allowed, scorer)
    batches = list(make_batches(run.data, batch_size, reuse_prefix, run.arch.device, tokens))
    shapes = [(*batch.shape, steps_at_once(batch, len(path), tokens)) for batch in batches]
    needed = 0
    costs: dict[tuple[int, int], _Cost] = {}  # batches with alike prompts cost alike
    for batch, (examples, suffix, steps) in zip(batches, shapes, strict=True):
        alike = suffix, batch.prefix.shape[1]
        if alike not in costs:
            costs[alike] = _Cost(run, graph, path, batch, scorer)
        needed = max(needed, costs[alike].bytes(examples, steps))
    return Plan(tokens, tuple(shapes), needed, allowed)


class _Cost:
    """Bytes that a batch takes, measured on its longest example.

    Each phase, the passes and the contraction, is linear in the examples and in examples times path points.
    """

    def __init__(self, run: Run, graph: Graph, path: Path, batch: Batch, scorer: Scorer) -> None:
        self.suffix = batch.shape[1]
        held = points_held(run, batch, len(path))
        start = bool(batch.start.any())

        def measured(examples: int, steps: int) -> list[int]:
            few = _some(run.data, batch, examples, start)
            with PeakBytes() as count:
                scorer(run, graph, path[:steps], few, steps * few.clean.numel(), held, count.lap)
            return count.laps

        ones = measured(1, 1)
        more_steps = measured(1, 2) if len(path) > 1 else ones
        more_examples = measured(2, 1) if batch.n_examples > 1 else more_steps
        self._phases = []
        for one, steps, examples in zip(ones, more_steps, more_examples, strict=True):
            per_step = steps - one
            per_example = examples - one - per_step
            self._phases.append((one - per_example - per_step, per_example, per_step))

    def bytes(self, examples: int, steps: int) -> int:
        return max(fixed + examples * (per_example + steps * per_step) for fixed, per_example, per_step in self._phases)


def _some(data: PairedDataset, batch: Batch, examples: int, reuse_prefix: bool) -> Batch:
    """A batch of copies of the batch's longest example."""
    longest = int(batch.index[data.longer_lengths[batch.index].argmax()])
    return next(make_batches(data[[longest] * examples], examples, reuse_prefix, batch.clean.device))
