"""Exact edge scores: each edge alone carries its corrupted value, and the metric is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..budget import Cost, bytes_without_gradient, in_memory, measure_cost, tokens_within
from ..errors import expected
from ..forward import TOKENS_PER_BATCH, Batch
from ..graph import Circuit, Graph
from ..intervention import PatchedEdges, prepare_patching
from ..request import Progress, Run
from .checkpoint import Checkpoint

SECONDS_BETWEEN_SAVES = 60.0


def edges_to_score(graph: Graph, edges: object) -> Tensor:
    """bool [S, R] of what `attribute(edges=)` names: all edges, a circuit's, or a mask's."""
    if edges is None:
        return graph.edge_mask
    if isinstance(edges, Circuit):
        if edges.graph != graph:
            raise expected("edges", f"a circuit of {graph!r}", f"one of {edges.graph!r}")
        return edges.mask
    if not isinstance(edges, Tensor) or edges.dtype != torch.bool or edges.shape != graph.edge_mask.shape:
        found = f"{edges.dtype} {list(edges.shape)}" if isinstance(edges, Tensor) else type(edges).__name__
        raise expected("edges", f"a circuit or a bool mask {list(graph.edge_mask.shape)}", found)
    return edges.cpu() & graph.edge_mask


def exact_scores(
    run: Run,
    graph: Graph,
    batches: Iterable[Batch],
    mask: Tensor,
    checkpoint: Checkpoint,
    tokens: int,
    progress: Progress | None,
) -> None:
    """Add m(clean) − m(edge corrupted) of every edge in the mask and of every example to the checkpoint's sums."""
    n_edges = int(mask.sum())

    def measure(batch: Batch, tokens: int) -> None:
        checkpoint.begin(batch)
        patched = prepare_patching(run.runner(graph, batch), graph, run.constants)
        ends = patched.sides.clean_logits, patched.sides.corrupted_logits
        clean = run.values(ends[0], batch, *ends)
        together = max(1, tokens // batch.clean.numel())
        for edges in _passes(patched, mask & ~checkpoint.done, together):
            for (u, v), logits in zip(edges, patched.logits(edges), strict=True):
                values = run.values(logits, batch, *ends)
                checkpoint.add(u, v, batch, (clean - values).double().cpu())
            checkpoint.save(SECONDS_BETWEEN_SAVES)
            if progress is not None:
                measured = n_edges * int(checkpoint.finished.sum()) + int(checkpoint.done.sum()) * batch.n_examples
                progress(measured // len(run.data), n_edges)

    for _ in in_memory(run.data, checkpoint.remaining(run.data, batches), tokens, measure):
        checkpoint.finish()


def edge_tokens(
    run: Run, graph: Graph, mask: Tensor, batch_size: int | None, reuse_prefix: bool, allowed: int, most: int
) -> int:
    """The tokens of the edges that run together within a budget of bytes."""
    if not mask.any():
        return most
    receiver, sender = mask.T.nonzero()[0].tolist()

    def measured(few: Batch, copies: int, phase: Callable[[], None]) -> None:
        patched = prepare_patching(run.runner(graph, few), graph, run.constants)
        # The earliest layer's edges take the most.
        patched.logits([(sender, receiver)] * copies)
        phase()

    def cost(batch: Batch) -> Cost:
        return measure_cost(run.data, batch, measured)

    rough = bytes_without_gradient(run, min(most, TOKENS_PER_BATCH), most)
    return tokens_within(run, batch_size, reuse_prefix, allowed, most, rough, cost)


def _passes(patched: PatchedEdges, mask: Tensor, size: int) -> Iterable[list[tuple[int, int]]]:
    """Edges that run together: from one layer, those of one sender beside each other."""
    by_layer: dict[int, list[tuple[int, int]]] = {}
    for u, v in mask.nonzero().tolist():
        by_layer.setdefault(patched.layer(v), []).append((u, v))
    for edges in by_layer.values():
        for first in range(0, len(edges), size):
            yield edges[first : first + size]
