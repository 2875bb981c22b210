"""The metric of circuits, of the clean run and of the fully ablated one, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..budget import (
    Cost,
    Replayable,
    Work,
    bytes_without_gradient,
    layer_weights,
    measure_cost,
    most_tokens,
    tokens_in_all,
    tokens_within,
)
from ..forward import TOKENS_PER_BATCH, Batch
from ..graph import Circuit
from ..intervention import TOKENS_TOGETHER, CircuitRuns
from ..recording import record_run
from ..request import DRAWS, Measurement, Request, fetch, variance_by_rounding

# A batch is at least this many launches for each layer (tests/circuits/budget/test_counts.py counts).
LAUNCHES = 45
# Operations of a forward pass for a weight and a token.
_OPERATIONS = 2


class CircuitValues(Replayable[Measurement, Tensor]):
    """The metric of the clean run, of the fully ablated run and of each circuit; last, the variance of the first two by
    rounding. float64 [3 + C, E] of a batch."""

    def __init__(self, request: Request, circuits: Sequence[Circuit]) -> None:
        self._request, self._circuits = request, circuits
        # Those that run, by graph: with spans or without, by key or by query head. The circuit of all edges is the
        # clean run, the circuit without edges the fully ablated run.
        first = circuits[0].graph
        masks, rows = {first: [first.edge_mask]}, {first: list[int]()}
        for row, item in enumerate(circuits, 2):
            if 0 < item.n_edges < item.graph.n_edges:
                masks.setdefault(item.graph, []).append(item.mask)
                rows.setdefault(item.graph, []).append(row)
        self._ran = [row for each in rows.values() for row in each]  # their rows in the result, as they run
        self._of_constants = request.constants is not None  # the fully ablated run; else it is the corrupted one
        self._runs = [CircuitRuns(graph, each, self._of_constants) for graph, each in masks.items()]

    def run(self, batch: Batch, tokens: int) -> Tensor:
        return self.finish(self.record(batch, tokens), batch)

    def record(self, batch: Batch, tokens: int) -> Measurement:
        request = self._request
        measured: Measurement | None = None
        for runs in self._runs:
            runner = request.runner(runs.graph.base, batch)
            record = record_run(runner, True, request.constants)
            outputs = runs.on(runner, record, tokens)
            if measured is None:
                clean = next(outputs)
                # Whatever the ablation, metrics get the logits of the corrupted run.
                corrupted = record.logits
                if self._of_constants:
                    corrupted = runner.logits(runner.embed(batch.corrupted), None, 1)
                measured = Measurement(request, batch, clean, corrupted)
                for logits in (clean, record.logits):
                    measured.values(logits)
                    measured.moved(logits)
            for logits in outputs:
                measured.values(logits)
        assert measured is not None
        return measured

    def finish(self, left: Measurement, batch: Batch) -> Tensor:
        values, _ = fetch([left.of(batch)])
        found = torch.empty(3 + len(self._circuits), batch.n_examples, dtype=torch.float64)
        sides, own = values[: 2 * (1 + DRAWS)], values[2 * (1 + DRAWS) :]
        (found[0], *near_clean), (found[1], *near_ablated) = sides[: 1 + DRAWS], sides[1 + DRAWS :]
        found[-1] = variance_by_rounding(sides[0], near_clean) + variance_by_rounding(sides[1 + DRAWS], near_ablated)
        request = self._request
        if not self._of_constants and batch.alignment is None:
            # If both prompts are equal, so are their values, even if the two runs round differently.
            equal = (request.data.clean[batch.index] == request.data.corrupted[batch.index]).all(1)
            found[1, equal] = found[0, equal]
        for row, item in enumerate(self._circuits, 2):
            if row not in self._ran:
                found[row] = found[0 if item.n_edges else 1]
        for row, value in zip(self._ran, own, strict=True):
            found[row] = value
        return found

    def numbers(self, found: Tensor) -> Iterable[Tensor]:
        return [found[:-1]]

    def work(self, batch: Batch, tokens: int) -> Work:
        request, copies = self._request, 2 + len(self._ran)
        ran = batch.clean.numel() * copies
        held = self._bytes(batch.clean.numel(), min(ran, tokens))
        return Work(_OPERATIONS * ran * layer_weights(request), LAUNCHES, 2 * held)

    def tokens_together(self) -> int:
        """How many tokens of circuits can run together within the budget."""
        request, circuits, device = self._request, self._circuits, self._request.arch.device
        most = max(TOKENS_TOGETHER, most_tokens(device.type))
        copies = len(circuits) + 1  # beside the clean run
        at_once = min(tokens_in_all(request, copies), most)
        rough = self._bytes(min(tokens_in_all(request, 1), TOKENS_PER_BATCH), at_once)

        def rows(item: Circuit) -> int:
            return CircuitRuns(item.graph, [item.mask], self._of_constants).rows(request.arch)

        def cost(batch: Batch) -> Cost:
            largest = max(circuits, key=rows)

            def measured(few: Batch, n: int) -> None:
                # The clean run and n − 1 circuits run together, and then n circuits.
                CircuitValues(request, [largest] * (2 * n - 1)).run(few, n * few.clean.numel())

            return measure_cost(request.data, batch, measured)

        return tokens_within(request, most, rough, cost, copies=copies)

    def _bytes(self, kept: int, at_once: int) -> int:
        """Roughly what passes hold that record `kept` tokens and run so many of circuits at once."""
        return bytes_without_gradient(self._request, kept, at_once, self._rows * self._request.arch.width)

    @cached_property
    def _rows(self) -> int:
        return max(runs.rows(self._request.arch) for runs in self._runs)
