"""Exact edge scores: one edge at a time carries its corrupted value, and the metric is measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

import torch
from torch import Tensor

from ...budget import Cost, bytes_without_gradient, in_memory, measure_cost, tokens_within
from ...checkpoint import Checkpoint, remaining
from ...errors import expected
from ...forward import TOKENS_PER_BATCH, Batch
from ...graph import Circuit, Graph
from ...intervention import TOKENS_TOGETHER, PatchedEdges, prepare_patching
from ...ranks import alike, dealt
from ...request import Measurement, Progress, fetch
from ..spec import AttributionRequest, Method
from ..statistics import Statistics
from .edges_measured import EdgesMeasured


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


@dataclass(frozen=True)
class ExactMethod(Method):
    """One edge at a time carries its corrupted value."""

    selective: ClassVar[bool] = True
    keeps: ClassVar[tuple[str, ...]] = ("variance", "examples")

    def operator(self, request: AttributionRequest) -> str:
        return "none: each edge is measured by a run of the model"

    def run(
        self, request: AttributionRequest, statistics: Statistics, checkpoint: Checkpoint, progress: Progress | None
    ) -> None:
        measured = EdgesMeasured(statistics, len(request.data), checkpoint)
        mask = request.edges
        n_edges, tokens = int(torch.count_nonzero(mask)), checkpoint.tokens(_edge_tokens(request))

        def measure(batch: Batch, tokens: int) -> None:
            measured.begin(batch)
            patched, metric, clean = alike(lambda: _begun(request, batch))
            together = max(1, tokens // batch.clean.numel())

            def run(edges: Tensor) -> Tensor:
                for logits in patched.logits([(u, v) for u, v in edges.tolist()]):
                    metric.values(logits)
                return (clean - torch.stack(fetch([metric])[0])).double()

            passes = _passes(patched, mask, measured.done, together)
            for edges, scores in dealt(passes, run, request.arch.team):
                measured.put(edges, batch, scores)
                if progress is not None:
                    examples = n_edges * int(measured.finished.sum()) + int(measured.done.sum()) * batch.n_examples
                    progress(examples // len(request.data), n_edges)

        batches = request.batches(min(tokens, TOKENS_PER_BATCH))
        left = remaining(request.data, batches, measured.finished, measured.current)
        for _ in in_memory(request.data, left, tokens, measure):
            measured.finish()


def _begun(request: AttributionRequest, batch: Batch) -> tuple[PatchedEdges, Measurement, Tensor]:
    """A batch's runs with edges patched, what measures them, and the metric of its clean run, [E]."""
    patched = prepare_patching(request.runner(request.graph, batch), request.graph, request.constants)
    ends = patched.sides.clean_logits, patched.sides.corrupted_logits
    metric = Measurement(request, batch, *ends)
    metric.values(ends[0])
    (clean,), _ = fetch([metric])
    return patched, metric, clean


def _edge_tokens(request: AttributionRequest) -> int:
    """The tokens of the edges that run together within the budget."""
    graph, most = request.graph, TOKENS_TOGETHER
    entered = request.edges.any(0).nonzero()
    if not len(entered):
        return most
    receiver = int(entered[0])
    sender = int(request.edges[:, receiver].nonzero()[0])

    def measured(few: Batch, copies: int) -> None:
        patched = prepare_patching(request.runner(graph, few), graph, request.constants)
        # The earliest layer's edges take the most.
        patched.logits([(sender, receiver)] * copies)

    def cost(batch: Batch) -> Cost:
        return measure_cost(request.data, batch, measured)

    rough = bytes_without_gradient(request, min(most, TOKENS_PER_BATCH), most)
    return tokens_within(request, most, rough, cost)


def _passes(patched: PatchedEdges, mask: Tensor, done: Tensor, size: int) -> Iterable[Tensor]:
    """Edges that run together, int64 [n, 2]: from one layer, those of one sender beside each other."""
    for _, layer in groupby(range(mask.shape[1]), patched.layer):
        receivers = list(layer)  # one after another
        # A layer's by themselves: a list of all edges of a large model would take gigabytes.
        here = slice(receivers[0], receivers[-1] + 1)
        edges = (mask[:, here] & ~done[:, here]).nonzero() + torch.tensor([0, here.start])
        if len(edges):
            yield from edges.split(size)
