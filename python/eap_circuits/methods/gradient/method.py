"""Gradient methods: senders' differences times receivers' gradients along a path, batch by batch.

S[u, v] = Σ_t ⟨Δ_u(t), Σ_k w_k ∂loss/∂x_v(t) at point k⟩. What a point is, each method says in its own module.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from eap_kernels import Nodes, explain

from ...budget import (
    Cost,
    Replayable,
    Replays,
    Work,
    budget,
    end_of_phase,
    layer_weights,
    measure_cost,
    measured_operations,
    most_tokens,
    rates_of,
    tokens_in_all,
    tokens_within,
)
from ...checkpoint import Checkpoint
from ...errors import warn
from ...forward import Batch
from ...recording import ReceiverGradients
from ...request import Measurement, Progress
from ..quadrature import Path, Quadrature
from ..spec import KEEP, AttributionRequest, Method
from ..statistics import BatchScores, Contractions, LaterScores, Statistics, batch_bytes, score_batches
from .plans import Plan, contraction_of, expanded_bytes, pass_bytes, weight_bytes

T = TypeVar("T")
C = TypeVar("C", bound=Contractions)

# Normalised inputs of this many path points are held before they are contracted. With fewer, contractions would take
# longer than the passes; more would only take memory. The usual path is contracted once.
HELD_POINTS = 5
HELD_BYTES = 128 * 2**20
# A batch is at least this many launches for each layer (tests/circuits/budget/test_counts.py counts).
LAUNCHES = 70
# Operations of a forward and backward pass for a weight and a token: gradients of weights are not wanted.
_OPERATIONS = 4
# Batches of at least this share of the tokens that were measured, and with prefixes that are little longer, cost as
# much by the token.
_ALIKE, _LONGER = 0.25, 1.1


class Passes(NamedTuple):
    """How a batch runs along its path."""

    path: Path
    together: int  # points of one pass
    held: int  # points whose normalised inputs are held until they are contracted


@dataclass(frozen=True)
class GradientMethod(Method):
    """Gradients along a path.

    Args:
        grid: steps -> the path's points and weights; or several of them by name, if `quadrature=` chooses.
    """

    grid: Callable[[int], Path] | Mapping[str, Quadrature]

    backward: ClassVar[bool] = True
    keeps: ClassVar[tuple[str, ...]] = tuple(name for name in KEEP if name != "within-heads")
    planned: ClassVar[bool] = True
    # May passes be captured and replayed? What `score` adds must not change any more then.
    replayed: ClassVar[bool] = True

    @property
    def stepped(self) -> bool:
        return len(self.path(2, "right")) != len(self.path(3, "right"))

    @property
    def grids(self) -> bool:
        return isinstance(self.grid, Mapping)

    def path(self, steps: int, quadrature: str) -> Path:
        """Points and weights of the path."""
        return (self.grid[quadrature].points if isinstance(self.grid, Mapping) else self.grid)(steps)

    def repeated(self, request: AttributionRequest) -> Path:
        """The points that can run side by side, several in one pass."""
        return request.path

    @abstractmethod
    def score(self, request: AttributionRequest, scores: Contractions, passes: Passes) -> None:
        """Run a batch and add what its edges score. Calls `end_of_phase` where what is held changes, the same number of
        times for all numbers of examples and points."""

    def times_added(self, request: AttributionRequest) -> int:
        """How many times `score` adds senders and receivers of a batch whose points are contracted at once, at most."""
        return 1

    def operator(self, request: AttributionRequest) -> str:
        nothing = torch.empty(0, 1, 1, dtype=request.arch.contraction_dtype, device=request.arch.device)
        return explain("head_space_scores", [Nodes(nothing)])

    def run(
        self, request: AttributionRequest, statistics: Statistics, checkpoint: Checkpoint, progress: Progress | None
    ) -> None:
        most = most_tokens(request.arch.device_kind)
        tokens, per_batch = self._tokens(request, self._costs(request)) if self.planned else (most, most)
        refused = None if self.replayed else f"{self.name} contracts between its passes"
        if "within-heads" in request.keep:
            refused = "scores inside heads are added up between a pass's steps"
        with Replays(request, _Batches(self, request), refused) as replays:
            score_batches(request, tokens, replays.run, statistics, checkpoint, progress, per_batch)
        statistics.notes |= replays.told()

    def plan(self, request: AttributionRequest, gpus: int = 1) -> Plan:
        """How `run` will cut the data, and what it will take, on so many GPUs that share the model."""
        # Looked up once: what is free changes from one moment to the next.
        allowed = budget(request)
        request = replace(request, memory=allowed)
        cost = self._costs(request)
        tokens, per_batch = self._tokens(request, cost)
        batches = list(request.batches(per_batch))
        shapes = [(batch.n_examples, batch.shape[1], self.cut(request, batch, tokens).together) for batch in batches]
        needed = max(
            cost(batch).bytes(shape[0], shape[2]) + expanded_bytes(request, batch)
            for batch, shape in zip(batches, shapes, strict=True)
        )
        if needed > allowed:
            warn(
                f"plan: expected a run within {allowed:,} bytes, found that one example and path point take {needed:,}."
            )
        points = len(request.path)
        passes = sum(cost(batch).operations(batch.n_examples, len(self.repeated(request))) for batch in batches)
        contraction = contraction_of(request, points) * sum(examples * suffix for examples, suffix, _ in shapes)
        rates = rates_of(request)
        seconds = None if rates is None else (passes / rates.passes + contraction / rates.contraction) / gpus
        model = request.arch.device_kind, gpus, weight_bytes(request)
        return Plan(tokens, tuple(shapes), needed, allowed, *model, passes, contraction, rates, seconds)

    def cut(self, request: AttributionRequest, batch: Batch, tokens: int) -> Passes:
        """How a batch runs where a pass has at most this many tokens."""
        points = len(self.repeated(request))
        per_point = (
            len(request.arch.norms) * len(batch.rows) * request.arch.d_model * request.arch.contraction_dtype.itemsize
        )
        held = min(points, max(HELD_POINTS, HELD_BYTES // max(per_point, 1)))
        return Passes(request.path, max(1, min(held, tokens // batch.clean.numel())), held)

    def _tokens(self, request: AttributionRequest, cost: Callable[[Batch], Cost]) -> tuple[int, int]:
        """The most tokens of a pass within the budget, and those of a batch.

        Fewer examples with more of their points in a pass take less memory, as senders and receivers are held for each
        example.
        """
        most, points = most_tokens(request.arch.device_kind), len(self.repeated(request))
        at_once = min(most, tokens_in_all(request, points))
        rough = pass_bytes(request, at_once) + batch_bytes(request, request.batch_size or most)
        best = 0, 0
        for together in range(1, min(points, HELD_POINTS) + 1):
            tokens = tokens_within(request, most, rough, cost, most, request.workspace or 0, together, points)
            best = max(best, (tokens, tokens // together), key=lambda pair: pair[0])
            if tokens == most or request.batch_size is not None:
                break
        return best

    def _costs(self, request: AttributionRequest) -> Callable[[Batch], Cost]:
        """`_cost` of batches, measured once for those that are about alike, of which the longest come first."""
        costs: dict[tuple[int, int], Cost] = {}

        def cost(batch: Batch) -> Cost:
            tokens, prefix = batch.example_tokens, batch.prefix.shape[1]
            for (most, before), known in costs.items():
                alike = (tokens + prefix) / (most + before)
                if _ALIKE * most <= tokens <= most and _ALIKE <= alike <= _LONGER:
                    return known.scaled(tokens / most)
            costs[tokens, prefix] = self._cost(request, batch)
            return costs[tokens, prefix]

        return cost

    def _cost(self, request: AttributionRequest, batch: Batch) -> Cost:
        path, held = self.repeated(request), self.cut(request, batch, 0).held
        request = replace(request, only_memory=True)

        def measured(few: Batch, points: int) -> None:
            self.score(request, BatchScores(request, few), Passes(path[:points], points, held))

        cost = measure_cost(request.data, batch, measured, len(path) > 1)
        if len(path) == len(request.path):
            return cost
        # What is run once beside the repeated points counts, too.
        points = len(request.path)

        def whole(few: Batch) -> None:
            self.score(request, BatchScores(request, few), Passes(request.path, points, points))

        return replace(cost, work=(0, measured_operations(request.data, batch, whole), 0))


class _Batches(Replayable[LaterScores, BatchScores]):
    """Scores of one batch after another."""

    def __init__(self, method: GradientMethod, request: AttributionRequest) -> None:
        self._method, self._request = method, request

    def run(self, batch: Batch, tokens: int) -> BatchScores:
        return self._scored(BatchScores(self._request, batch), tokens)

    def record(self, batch: Batch, tokens: int) -> LaterScores:
        return self._scored(LaterScores(self._request, batch), tokens)

    def _scored(self, scores: C, tokens: int) -> C:
        passes = self._method.cut(self._request, scores.batch, tokens)
        self._method.score(self._request, scores, passes)
        return scores

    def finish(self, left: LaterScores, batch: Batch) -> BatchScores:
        return left.of(batch)

    def numbers(self, found: BatchScores) -> Iterable[Tensor]:
        return found.sums.values()

    def work(self, batch: Batch, tokens: int) -> Work | str:
        request, method = self._request, self._method
        passes, points = method.cut(request, batch, tokens), len(method.repeated(request))
        if passes.held < points:
            return "a batch's points are contracted in several parts"
        weights, together = layer_weights(request), batch.clean.numel() * passes.together
        run = pass_bytes(request, together)
        left = run + weights * request.arch.contraction_dtype.itemsize
        held = run + method.times_added(request) * left + batch_bytes(request, batch.n_examples)
        return Work(_OPERATIONS * together * weights, LAUNCHES, held)


def run_along(
    points: list[T],
    passes: Passes,
    receivers: ReceiverGradients,
    run: Callable[[list[T]], object],
    contract: Callable[[], object],
) -> None:
    """Run the points of a path, as many in a pass as fit, and contract what the receivers hold before there is more."""
    for held in chunks(points, passes.held):
        for part in chunks(held, passes.together):
            run(part)
        end_of_phase()
        contract()
        receivers.clear()
        end_of_phase()


def loss_of(measured: Measurement, points: Iterable[Tensor]) -> Tensor:
    """−metric summed over the batch's examples and path points, each point's logits being [E, V]."""
    return -torch.stack([measured.values(point).sum() for point in points]).sum()


def weights_of(request: AttributionRequest, part: Path) -> Tensor:
    """The weights of some points of the path, float64, on the model's device."""
    return request.sent.on(request.arch.device, torch.tensor([weight for _, weight in part], dtype=torch.float64))


def chunks(path: list[T], most: int) -> list[list[T]]:
    """The points of a path in the fewest parts of at most this many, all about equally long."""
    parts = -(-len(path) // most)
    return [path[len(path) * i // parts : len(path) * (i + 1) // parts] for i in range(parts)]
