"""Circuits run on one batch after another, as many together as fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..adapters import Architecture
from ..forward import Runner
from ..graph import Graph
from ..recording import ReferenceRun
from .circuit_run import CircuitsRun, Together
from .groups import Asked, CircuitGroup, LearningGroup, SharedGroup, SpanGroup, asked_of, together
from .groups.grouping import arrange, rows_computed, shared

TOKENS_TOGETHER = 2048  # of circuits that run together


def run_circuits(
    runner: Runner, graph: Graph, corrupted: ReferenceRun, masks: Sequence[Tensor], tokens: int = TOKENS_TOGETHER
) -> Iterator[Tensor]:
    """`CircuitRuns` on one batch."""
    return CircuitRuns(graph, masks, corrupted.of_constants).on(runner, corrupted, tokens)


class CircuitRuns:
    """Runs of circuits on one batch after another.

    Off the CPU, what does not depend on a batch's values is made and sent only once for batches of one size.

    Args:
        graph: of masks that keep other edges at other spans, the one with spans.
        masks: bool or floating [S, R] each; values between 0 and 1 keep an edge in part.
        of_constants: whether their ablated runs are of constants.
    """

    def __init__(self, graph: Graph, masks: Sequence[Tensor], of_constants: bool = False) -> None:
        self.graph, self.masks, self._of_constants = graph, masks, of_constants
        self._size: object = None
        self._kept: list[Together] = []  # for batches of this size

    @cached_property
    def _asked(self) -> list[Asked]:
        """Of each circuit."""
        graph = self.graph
        return [asked_of(graph, together(graph, [mask]), of_constants=self._of_constants) for mask in self.masks]

    def rows(self, arch: Architecture) -> int:
        """`rows_computed` by these circuits."""
        return rows_computed(self.graph, self._asked, arch)

    def on(self, runner: Runner, corrupted: ReferenceRun, tokens: int = TOKENS_TOGETHER) -> Iterator[Tensor]:
        """Logits [E, V] of each circuit at the scored positions, in order.

        Args:
            tokens: the most that circuits which run together have.
        """
        for some in self._together(runner, tokens):
            with torch.no_grad():
                logits = CircuitsRun(runner, self.graph.base, corrupted, some).logits()
            # Outside of no_grad, which would otherwise last until the next one is asked for.
            yield from (logits[some.order.index(circuit)] for circuit in range(len(some.order)))

    def _together(self, runner: Runner, tokens: int) -> Iterator[Together]:
        graph, batch = self.graph, runner.batch
        size = tokens, batch.clean.shape, batch.end.clean.shape
        if size == self._size:
            yield from self._kept
            return
        self._size, self._kept = None, []
        arch, at_once = runner.arch, shared(runner.arch.device) and graph.spans is None
        one = CircuitGroup if graph.spans is None else SpanGroup
        count, row = max(1, tokens // batch.clean.numel()), batch.clean.numel() * arch.width * arch.dtype.itemsize
        for start in range(0, len(self.masks), count):
            some = slice(start, start + count)
            masks, asked = together(graph, self.masks[some]), Asked.joined(self._asked[some])
            kind = SharedGroup if at_once else one
            order, groups = arrange(asked, at_once, row, graph.n_layers)
            masks, asked = masks[order], asked.of(order)
            made = Together(order, asked, [kind(runner, graph, members, masks, asked) for members in groups])
            self._kept += [made] if at_once else []
            yield made
        self._size = size if at_once else None


def learning_run(
    runner: Runner, graph: Graph, ablated: ReferenceRun, masks: Tensor, at: Tensor | None = None
) -> Tensor:
    """Logits [C, E, V] of circuits, with a gradient.

    They are differentiable in the constants that the ablated run was made of, and in masks [C, S, R] of the CPU: at the
    edges that these keep in part, and at the edges `at`, bool [S, R]. Of others the gradient may be missing, as
    receivers that read nothing or everything are not computed.
    """
    asked = asked_of(graph, masks.detach(), at, ablated.of_constants)
    size = len(masks) if shared(runner.arch.device) else 1
    groups = [LearningGroup(runner, graph, slice(c, c + size), masks, asked) for c in range(0, len(masks), size)]
    return CircuitsRun(runner, graph, ablated, Together(list(range(len(masks))), asked, groups)).logits()
