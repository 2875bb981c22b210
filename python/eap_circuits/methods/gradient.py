"""Gradient methods: senders' differences times receivers' gradients along the path, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from ..capture import Batch, Progress, ReceiverGradients, Run, Runner, SenderDifferences, contract, in_memory
from ..graph import Graph
from .spec import Path

# Normalised inputs of so many path points are held before what has been accumulated is contracted: fewer would
# spend more time on contractions than on the passes, more only memory.
HELD_POINTS = 4
HELD_BYTES = 64 * 2**20


def gradient_scores(
    run: Run, graph: Graph, batches: Iterable[Batch], path: Path, tokens: int, progress: Progress | None
) -> Tensor:
    """Scores summed over all examples: float64 [S, R], on the CPU."""
    total = torch.zeros(graph.n_senders, graph.n_receivers, dtype=torch.float64)
    done = 0
    for batch, scores in in_memory(run.data, batches, tokens, partial(score_batch, run, graph, path)):
        total += scores
        done += batch.n_examples
        if progress is not None:
            progress(done, len(run.data))
    return total


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
) -> Tensor:
    """Scores summed over the batch's examples: float64 [S, R], on the CPU.

    `phase` is called after the passes over each chunk of the path, and after its contraction.
    """
    runner = Runner(run.arch, graph, batch)
    # Where the clean prompts are a point of the path, that pass comes first and is their only one.
    path = sorted(path, reverse=True)
    shared = path[0][0] == 1.0
    senders = SenderDifferences(runner, graph, clean=not shared)
    corrupted, clean = senders.corrupted_embeddings, senders.clean_embeddings
    held = held or points_held(run, batch, len(path))
    size = min(steps_at_once(batch, len(path), tokens), held)
    receivers = ReceiverGradients(runner, graph, held, run.rules)

    def loss(logits: Tensor) -> Tensor:
        points = logits.split(batch.n_examples)
        if senders.clean_logits is None:
            senders.clean_logits = points[0].detach()
        values = [run.values(point, batch, senders.clean_logits, senders.corrupted_logits) for point in points]
        return -torch.stack([value.sum() for value in values]).sum()

    total = torch.zeros(graph.n_senders, graph.n_receivers, dtype=torch.float64)
    for together in _chunks(path, held):
        for part in _chunks(together, size):
            points = torch.cat([torch.lerp(corrupted, clean, alpha) for alpha, _ in part])
            watch = senders.register_clean if senders.clean_logits is None else None
            receivers.run(points, torch.tensor([weight for _, weight in part]), loss, watch)
        if phase is not None:
            phase()
        total += contract(senders, receivers).double().cpu()
        receivers.clear()
        if phase is not None:
            phase()
    return total


def points_held(run: Run, batch: Batch, steps: int) -> int:
    """For how many path points what the norms read is held at once."""
    per_point = len(run.arch.norms) * len(batch.rows) * run.arch.d_model * run.arch.accumulate.itemsize
    return min(steps, max(HELD_POINTS, HELD_BYTES // max(per_point, 1)))


def _chunks(path: Path, size: int) -> list[Path]:
    return [path[first : first + size] for first in range(0, len(path), size)]
