"""Gradient methods: senders' differences times receivers' gradients along the path, batch by batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from ..budget import in_memory
from ..forward import Batch
from ..graph import Graph
from ..recording import BothSides, ReceiverGradients, less_clean, record_both_sides, record_corrupted_side
from ..request import Progress, Run
from .quadrature import Path
from .statistics import BatchScores, Statistics

# Normalised inputs of so many path points are held before what has been accumulated is contracted: fewer would
# spend more time on contractions than on the passes, more only memory. The usual path is contracted once.
HELD_POINTS = 5
HELD_BYTES = 128 * 2**20
# (run, graph, path, batch, tokens of a pass) -> scores of the batch
Scorer = Callable[..., BatchScores]


def gradient_scores(
    run: Run,
    graph: Graph,
    batches: Iterable[Batch],
    path: Path,
    tokens: int,
    progress: Progress | None,
    statistics: Statistics,
    scorer: Scorer,
) -> None:
    """Add the scores of all examples to `statistics`, batch by batch as the method's `scorer` finds them."""
    done = 0
    for batch, scores in in_memory(run.data, batches, tokens, partial(scorer, run, graph, path)):
        statistics.add(scores)
        done += batch.n_examples
        if progress is not None:
            progress(done, len(run.data))


def steps_at_once(batch: Batch, steps: int, tokens: int) -> int:
    """Path points per pass, for a pass to have no more than so many tokens."""
    return max(1, min(steps, tokens // batch.clean.numel()))


def score_batch(
    run: Run,
    graph: Graph,
    path: Path,
    batch: Batch,
    tokens: int,
    held: int | None = None,
    phase: Callable[[], None] | None = None,
) -> BatchScores:
    """Scores of the batch's examples.

    `phase` is called after the passes over each chunk of the path, and after its contraction.
    """
    runner = run.runner(graph, batch)
    # Where the clean prompts are a point of the path, that pass comes first and is their only one.
    path = sorted(path, reverse=True)
    shared = path[0][0] == 1.0
    side = (record_corrupted_side if shared else record_both_sides)(runner, run.constants)
    senders, clean_logits = side.senders, side.clean_logits if isinstance(side, BothSides) else None
    held = held or points_held(run, batch, len(path))
    size = min(steps_at_once(batch, len(path), tokens), held)
    receivers = ReceiverGradients(runner, graph, held, run.rules)

    def loss(logits: Tensor) -> Tensor:
        nonlocal clean_logits
        points = logits.split(batch.n_examples)
        if clean_logits is None:
            clean_logits = points[0].detach()
        return loss_of(run, batch, points, clean_logits, side.corrupted_logits)

    scores = BatchScores(run, graph, batch)
    for together in chunks(path, held):
        for part in chunks(together, size):
            points = torch.cat([torch.lerp(side.corrupted_embeddings, side.clean_embeddings, a) for a, _ in part])
            run_pass = partial(receivers.run, points, torch.tensor([weight for _, weight in part]), loss)
            if clean_logits is None:
                senders, _ = less_clean(side, batch, run_pass)
            else:
                run_pass()
        with contracted(receivers, phase):
            scores.add(senders.nodes(), receivers.nodes())
    return scores


@contextlib.contextmanager
def contracted(receivers: ReceiverGradients, phase: Callable[[], None] | None) -> Iterator[None]:
    """Around the contraction of what has been accumulated, which is forgotten then; `phase` is called at both ends."""
    if phase is not None:
        phase()
    yield
    receivers.clear()
    if phase is not None:
        phase()


def loss_of(run: Run, batch: Batch, points: Iterable[Tensor], clean: Tensor, corrupted: Tensor) -> Tensor:
    """−metric summed over the batch's examples and path points, each point's logits being [E, V]."""
    return -torch.stack([run.values(point, batch, clean, corrupted).sum() for point in points]).sum()


def points_held(run: Run, batch: Batch, steps: int) -> int:
    """For how many path points what the norms read is held at once."""
    per_point = len(run.arch.norms) * len(batch.rows) * run.arch.d_model * run.arch.contraction_dtype.itemsize
    return min(steps, max(HELD_POINTS, HELD_BYTES // max(per_point, 1)))


def chunks(path: Path, most: int) -> list[Path]:
    """The path in as few parts of at most so many points as there can be, all about equally long."""
    parts = -(-len(path) // most)
    return [path[len(path) * i // parts : len(path) * (i + 1) // parts] for i in range(parts)]
