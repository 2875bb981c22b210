"""Edges in order of their scores, of which a large graph has too many to sort or to copy them all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..edges import Graph, blocks

_SAMPLE = 2**17
_PRIME = 1_000_003  # no pattern of a layer's nodes fits it


@dataclass(frozen=True, eq=False)
class Ranking:
    """Scores by which edges are chosen, the strongest highest.

    Args:
        graph: whose edges these are.
        values: floating-point [S, R]; finite where there is an edge.
        signed: whether the score itself counts; else its absolute value.
        among: bool [S, R], the only edges that may be taken; None for all.
    """

    graph: Graph
    values: Tensor
    signed: bool
    among: Tensor | None = None

    def without(self, mask: Tensor) -> Ranking:
        """The ranking of the other edges."""
        return replace(self, among=~mask if self.among is None else self.among & ~mask)

    @cached_property
    def whole(self) -> Tensor:
        """Ranks of all edges, [S, R]; -inf where none may be taken."""
        whole = torch.full(self.values.shape, -torch.inf, dtype=self.values.dtype)
        for rows, columns, ranks in self.blocks():
            whole[rows, columns] = ranks
        return whole

    def blocks(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Rows, columns, and the edges' ranks there, -inf where none may be taken: see `edges.blocks`."""
        for rows, columns, none in blocks(self.graph):
            values = self.values[rows, columns]
            ranks = values.clone() if self.signed else values.abs()
            ranks[:, : none.shape[1]].masked_fill_(none, -torch.inf)
            if self.among is not None:
                ranks.masked_fill_(~self.among[rows, columns], -torch.inf)
            yield rows, columns, ranks

    def highest(self, sizes: Sequence[int]) -> list[Tensor]:
        """For each size the edges of the highest ranks, bool [S, R]: of equal ones the first, and fewer if no more may
        be taken. What is sorted serves all sizes."""
        floor, above = self._above(max(sizes, default=0))
        # The rank down to which edges are taken, and how many of exactly that rank.
        least = [float(above[-n]) if 0 < n <= len(above) else floor for n in sizes]
        left = [n - (len(above) - int(np.searchsorted(above, x, "right"))) for n, x in zip(sizes, least, strict=True)]
        masks = [torch.zeros(self.values.shape, dtype=torch.bool) for _ in sizes]
        for rows, columns, ranks in self.blocks():
            for i, (mask, n) in enumerate(zip(masks, sizes, strict=True)):
                if n < 1:
                    continue
                taken = torch.gt(ranks, least[i], out=mask[rows, columns])
                if left[i] and least[i] > -torch.inf:
                    equal = (ranks == least[i]).nonzero()[: left[i]]
                    taken[tuple(equal.T)] = True
                    left[i] -= len(equal)
        return masks

    def _above(self, n: int) -> tuple[float, Any]:
        """A rank that at least n edges reach, -inf if there are fewer, and the ranks above it, sorted."""
        step = max(1, self.graph.n_edges // _SAMPLE)
        sample, expected = self._sample(step), n / step
        # So far down in the sample that hardly ever too few are above.
        place = 1 + expected + 4 * expected**0.5
        while True:
            floor = float(sample[-int(place)]) if place <= len(sample) else -torch.inf
            above, equal = [], 0
            for _, _, ranks in self.blocks():
                above.append(ranks[ranks > floor])
                equal += int(torch.count_nonzero(ranks == floor))
            found = torch.cat(above).numpy()
            if floor == -torch.inf or len(found) + equal >= n:
                found.sort()
                return floor, found
            place *= 4

    def _sample(self, step: int) -> Any:
        """About one of so many ranks, sorted."""
        sample = []
        for _, _, ranks in self.blocks():
            flat = ranks.flatten()
            sample.append(flat[torch.arange(0, len(flat), step) * _PRIME % len(flat)])
        found = torch.cat(sample).numpy()
        found.sort()
        return found[np.searchsorted(found, -np.inf, "right") :]
