"""Steps of Adam on the places of edges, a number for each, along the gradient of what circuits do on prompts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...budget import in_memory
from ...checkpoint import Checkpoint
from ...forward import Batch, Constants
from ...graph import Graph
from ...ranks import exchange
from ...request import Progress, Request
from ..lessons import Lessons, tokens_together

_MOMENTUM, DECAY = 0.9, 0.999  # what a step leaves of Adam's running mean, and of its running squares


class Descent:
    """Where learning is: the places of edges, and Adam's state. All of it is in the checkpoint.

    Args:
        request: verified, with constants.
        start: the places at first, float32 [n], or [P, n] of several rankings.
        widest: gates [n] of a circuit that computes as much as any will; the tokens of a pass follow from it.
        examples: how many pairs a step has.
        seed: of the pairs' order.

    Attributes:
        places: as `start`, with a gradient.
        squares: Adam's running mean of their gradient's squares.
    """

    def __init__(
        self,
        request: Request,
        graph: Graph,
        start: Tensor,
        widest: Tensor,
        examples: int,
        seed: int,
        checkpoint: Checkpoint,
    ) -> None:
        self._request, self._graph, self._seed, self._checkpoint = request, graph, seed, checkpoint
        self.places, self._done = start.clone().requires_grad_(), torch.tensor(0)
        self._mean, self.squares = torch.zeros_like(start), torch.zeros_like(start)
        checkpoint.keep({"places": self.places, "done": self._done, "mean": self._mean, "squares": self.squares})
        fitting = checkpoint.tokens(tokens_together(request, graph, self._masks(widest[None])))
        self._lessons = Lessons(request, graph, examples, seed, fitting)

    def steps(self, count: int, progress: Progress | None) -> Iterator[int]:
        """The number of each step that is left; each has to end with a `move`."""
        while self._done < count:
            yield int(self._done)
            if progress is not None:
                progress(int(self._done), count)

    def generator(self, seed: int) -> torch.Generator:
        """Of what this step draws."""
        return _generator(seed, int(self._done))

    def slope(self, gates: Tensor, target: Tensor | None = None, ablated: Constants | None = None) -> Tensor:
        """The gradient, in the gates [C, n] of circuits, of how far their metric is from the target, its mean over this
        step's pairs.

        Args:
            target: what the metric is to be on each of the data's pairs, [E]; by default the model's own value.
            ablated: what edges outside carry in this step; by default the request's ablation.
        """
        request, lessons, edges = self._request, self._lessons, self._graph.edge_mask
        masks, total, group = self._masks(gates), torch.zeros_like(gates), self._group()

        def run(batch: Batch, tokens: int) -> Tensor:
            lessons.tokens = tokens  # fewer than before if memory ran out: later steps begin with as many
            lesson = lessons.lesson(batch)
            if ablated is not None:
                lesson = lesson.ablated_to(ablated)
            return lesson.gradient(request, self._graph, masks, tokens, target)[1]

        for _, found in in_memory(request.data, lessons.batches(group), lessons.tokens, run):
            total += found[:, edges].to(total.dtype)
        (total, *_) = exchange(total)  # one rank's, so that all run the same circuits next
        return total / len(lessons.groups[group])

    def move(self, slope: Tensor, rate: float, floor: Tensor | float) -> None:
        """Take a step against a gradient of the places; `floor` is added to its usual size, by which Adam divides.

        Args:
            floor: a number, or one for each ranking, [P, 1].
        """
        with self._checkpoint.changing(), torch.no_grad():
            self._done += 1
            steps = int(self._done)
            self._mean.lerp_(slope, 1 - _MOMENTUM)
            self.squares.lerp_(slope.square(), 1 - DECAY)
            usual = (self.squares / (1 - DECAY**steps)).sqrt() + floor
            self.places -= rate / (1 - _MOMENTUM**steps) * self._mean / usual

    def _group(self) -> int:
        """Which pairs this step has: every epoch has all of them, in another order."""
        epoch, place = divmod(int(self._done), len(self._lessons.groups))
        order = torch.randperm(len(self._lessons.groups), generator=_generator(self._seed, epoch))
        return int(order[place])

    def _masks(self, gates: Tensor) -> Tensor:
        edges = self._graph.edge_mask
        masks = torch.zeros(len(gates), *edges.shape, dtype=self._request.arch.accumulate)
        masks[:, edges] = gates.detach().to(masks.dtype)
        return masks


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**64)
