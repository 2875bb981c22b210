"""Prompts of which circuits are run again and again: their metric, and the gradient of masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from ..budget import Cost, budget, dealt_in_memory, measure_cost, numbers_per_token, tokens_within
from ..forward import Batch, Constants, Runner, batch_of, halves
from ..graph import Graph
from ..intervention import learning_run, run_circuits
from ..recording import ReferenceRun, record_run
from ..request import Measurement, Progress, Request, fetch

TOKENS_PER_PASS = 512  # of circuits that run together with a gradient
T = TypeVar("T")
_SHARE_KEPT = 0.25  # of the budget, for runs that every step needs again


@dataclass(frozen=True, eq=False)
class Lesson:
    """A batch of prompts that has run: the model on it, its ablated run, and the logits on both of its sides [E, V]."""

    runner: Runner
    ablated: ReferenceRun
    clean: Tensor
    corrupted: Tensor

    def ablated_to(self, constants: Constants) -> Lesson:
        """The same prompts, whose ablated run is of these constants."""
        with torch.no_grad():
            return replace(self, ablated=record_run(self.runner, True, constants))

    def gradient(
        self,
        request: Request,
        graph: Graph,
        masks: Tensor,
        tokens: int,
        target: Tensor | None = None,
        signed: bool = False,
        at: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """How far circuits' metric is from the target of the data's examples [E], or from the model's own, or signed,
        above it, float64 [C, E]; and the gradient of the sum in masks [C, S, R], right at the edges that they keep in
        part and at the edges `at`, bool [S, R]."""
        batch = self.runner.batch
        together = max(1, tokens // batch.clean.numel())
        values: list[Tensor] = []
        slopes: list[Tensor] = []
        for some in masks.split(together):
            leaf = some.detach().requires_grad_()
            measured = Measurement(request, batch, self.clean, self.corrupted)
            logits = learning_run(self.runner, graph, self.ablated, leaf, at)
            found = torch.stack([measured.values(each) for each in logits])
            with torch.no_grad():
                own = measured.values(self.clean)
            wanted = own if target is None else measured.weighed(target[batch.index].to(own))
            apart = found - wanted if signed else (found - wanted).abs()
            total = apart.sum()
            # Circuits of nothing or of everything that receivers read have no gradient.
            (slope,) = torch.autograd.grad(total, leaf) if total.requires_grad else (torch.zeros_like(leaf),)
            values += fetch([measured], apart.detach())[1][0].unbind()
            slopes.append(slope)
        return torch.stack(values).double(), torch.cat(slopes)

    def values(self, request: Request, graph: Graph, masks: Sequence[Tensor], tokens: int) -> Tensor:
        """The metric of circuits on the examples, float64 [C, E]."""
        measured = Measurement(request, self.runner.batch, self.clean, self.corrupted)
        for logits in run_circuits(self.runner, graph, self.ablated, masks, tokens):
            measured.values(logits)
        return torch.stack(fetch([measured])[0]).double()


class Lessons:
    """All prompts in groups of equal size, the same in every epoch; what fits into a share of the budget runs once.

    Args:
        request: verified, with constants.
        examples: how many prompts a group has.
        seed: of which prompts of about equal length come together.
        tokens: the most that a pass has.
    """

    def __init__(self, request: Request, graph: Graph, examples: int, seed: int, tokens: int) -> None:
        self.request, self.graph = request, graph
        data = request.data
        length = data.longer_lengths - data.first_needed
        mixed = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        self.groups = mixed[length[mixed].argsort(stable=True)].split(examples)
        self.tokens = tokens
        self._room = share_kept(request)
        self._kept: dict[bytes, Lesson] = {}

    def batches(self, group: int) -> Iterator[Batch]:
        """Of a group, each small enough for a pass."""
        request = self.request
        waiting = [batch_of(request.data, self.groups[group], request.reuse_prefix, request.arch.device)]
        while waiting:
            batch = waiting.pop()
            ends = (stream.host["last"] for stream in (batch, batch.end))
            uneven = request.arch.hooked and any(last.unique().numel() > 1 for last in ends)
            if batch.n_examples > 1 and (uneven or batch.clean.numel() > self.tokens):
                waiting += reversed(halves(request.data, batch))
            else:
                yield batch

    def lesson(self, batch: Batch) -> Lesson:
        """Of a batch; the model must be borrowed."""
        key = batch.index.numpy().tobytes()
        if key in self._kept:
            return self._kept[key]
        made = prepare_lesson(self.request, self.graph, batch)
        size = sum(x.nbytes for x in _tensors(made))
        if size <= self._room:
            self._room -= size
            self._kept[key] = made
        return made


class Runs:
    """Circuits on all prompts, one set after another: their metric, and the gradient in their masks.

    Args:
        request: verified, with constants.
        examples: how many prompts a group has.
        tokens: the most that a pass has.
        per_batch: the most that a batch has; by default as many.
    """

    def __init__(
        self, request: Request, graph: Graph, examples: int, tokens: int, per_batch: int | None = None
    ) -> None:
        self.request, self.graph, self.tokens = request, graph, tokens
        self.lessons = Lessons(request, graph, examples, 0, per_batch or tokens)
        self._group = torch.empty(len(request.data), dtype=torch.int64)  # of each example
        for number, members in enumerate(self.lessons.groups):
            self._group[members] = number

    def values(self, circuits: Sequence[Tensor]) -> Tensor:
        """The metric of circuits on all examples, float64 [C, E]."""
        found = torch.empty(len(circuits), len(self.request.data), dtype=torch.float64)

        def run(lesson: Lesson, tokens: int) -> Tensor:
            with torch.no_grad():
                return lesson.values(self.request, self.graph, circuits, tokens)

        for batch, values in self._each(run):
            found[:, batch.index] = values
        return found

    def slopes(
        self, mask: Tensor, edges: Tensor, signed: bool = True, progress: Progress | None = None
    ) -> tuple[Tensor, Tensor]:
        """How far a circuit's metric is above the model's, or unsigned, from it, and the gradient of that in its mask
        [S, R] at n edges, bool [S, R], in their order: of each group, [G] and [G, n], float64, means over its
        examples."""
        sizes = torch.tensor([len(members) for members in self.lessons.groups], dtype=torch.float64)
        apart = torch.zeros_like(sizes)
        slopes, done = torch.zeros(len(apart), int(edges.sum()), dtype=torch.float64), 0
        masks = mask[None].to(self.request.arch.accumulate)

        def run(lesson: Lesson, tokens: int) -> tuple[Tensor, Tensor]:
            found, slope = lesson.gradient(self.request, self.graph, masks, tokens, signed=signed, at=edges)
            return found.sum(), slope[0, edges].double()

        for batch, (found, slope) in self._each(run):
            number = int(self._group[batch.index[0]])
            apart[number] += found
            slopes[number] += slope
            done += batch.n_examples
            if progress is not None:
                progress(done, len(self.request.data))
        return apart / sizes, slopes / sizes[:, None]

    def _each(self, run: Callable[[Lesson, int], T]) -> Iterator[tuple[Batch, T]]:
        """(batch, `run(lesson, tokens)`) of all batches of all groups."""

        def within(batch: Batch, tokens: int) -> T:
            self.tokens = tokens  # fewer than before if memory ran out: later circuits begin with as many
            return run(self.lessons.lesson(batch), tokens)

        batches = (batch for number in range(len(self.lessons.groups)) for batch in self.lessons.batches(number))
        return dealt_in_memory(self.request.data, batches, self.tokens, within, self.request.arch.team)


def prepare_lesson(request: Request, graph: Graph, batch: Batch) -> Lesson:
    """Run a batch's two sides."""
    runner = request.runner(graph, batch)
    with torch.no_grad():
        ablated = record_run(runner, True, request.constants)
        clean = runner.logits(runner.embed(batch.clean))
        patched = request.constants is None
        corrupted = ablated.logits if patched else runner.logits(runner.embed(batch.corrupted), None, 1)
    return Lesson(runner, ablated, clean, corrupted)


def _tensors(lesson: Lesson) -> Iterator[Tensor]:
    run = lesson.ablated
    yield from (*run.written, *run.norm_inputs.values(), lesson.clean, lesson.corrupted)
    for layer in run.projections:
        yield from layer.values()


def tokens_together(request: Request, graph: Graph, masks: Tensor) -> int:
    """How many tokens a pass of these circuits may have within the budget."""
    # Of each sender its difference, of each receiver its input, the norm's steps, and its gradient are kept.
    kept = (5 * graph.n_receivers + graph.n_senders) * request.arch.d_model + 2 * numbers_per_token(request)
    rough = TOKENS_PER_PASS * kept * request.arch.accumulate.itemsize

    def measured(few: Batch, copies: int) -> None:
        largest = masks[-1:].expand(copies, -1, -1)
        prepare_lesson(request, graph, few).gradient(request, graph, largest, copies * few.clean.numel())

    def cost(batch: Batch) -> Cost:
        return measure_cost(request.data, batch, measured)

    return tokens_within(request, TOKENS_PER_PASS, rough, cost, TOKENS_PER_PASS, share_kept(request))


def share_kept(request: Request) -> int:
    """The bytes that lessons may hold."""
    return int(budget(request) * _SHARE_KEPT)
