"""How attribution will be cut into batches and passes, and the memory that it will take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ..budget import Cost, measure_cost, most_tokens, numbers_per_token, tokens_within
from ..forward import Batch, make_batches
from ..graph import Graph
from ..request import Run
from .gradient import Scorer, points_held, steps_at_once
from .quadrature import Path
from .statistics import BatchScores, batch_bytes

# A pass keeps about two numbers for the backward for every weight that works on a token, divided by the width.
_NUMBERS_PER_WEIGHT = 2


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


def tokens_per_pass(
    run: Run,
    graph: Graph,
    path: Path,
    batch_size: int | None,
    reuse_prefix: bool,
    allowed: int,
    scorer: Scorer,
) -> int:
    """The tokens of a pass within a budget of bytes; see `tokens_within`."""
    most = most_tokens(run.arch.device)
    rough = _NUMBERS_PER_WEIGHT * most * numbers_per_token(run) * run.arch.accumulate.itemsize
    rough += batch_bytes(run, graph, batch_size or most)
    cost = partial(_cost, run, graph, path, scorer)
    return tokens_within(run, batch_size, reuse_prefix, allowed, most, rough, cost, per_batch=most)


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
    costs: dict[tuple[int, int], Cost] = {}  # batches with alike prompts cost alike
    for batch, (examples, suffix, steps) in zip(batches, shapes, strict=True):
        alike = suffix, batch.prefix.shape[1]
        if alike not in costs:
            costs[alike] = _cost(run, graph, path, scorer, batch)
        needed = max(needed, costs[alike].bytes(examples, steps))
    return Plan(tokens, tuple(shapes), needed, allowed)


def _cost(run: Run, graph: Graph, path: Path, scorer: Scorer, batch: Batch) -> Cost:
    held = points_held(run, batch, len(path))

    def measured(few: Batch, steps: int, phase: Callable[[], None]) -> BatchScores:
        return scorer(run, graph, path[:steps], few, steps * few.clean.numel(), held, phase)

    return measure_cost(run.data, batch, measured, len(path) > 1)
