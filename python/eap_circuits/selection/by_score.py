"""Ways to choose edges by score."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..edges import Graph, edge_flags, finite
from ..errors import expected, one_of, whole
from .exactly import counted_edges, exact_edges
from .optimal import optimal_edges
from .ranking import Ranking

Chosen = tuple[Tensor, float | None]  # a mask [S, R], and its gap, for "optimal"
SECONDS = 30.0  # that "optimal" may search


def select_edges(
    graph: Graph,
    values: Tensor,
    sizes: Sequence[int | None],
    how: str,
    signed: bool,
    threshold: float | None = None,
    positive_ratio: float | None = None,
    among: Tensor | None = None,
    seconds: float = SECONDS,
    exactly: bool = False,
) -> list[Chosen]:
    """Edges chosen by score for each number of edges, not yet pruned. See `EdgeScores.select`."""
    one_of("how", how, SELECTIONS)
    choose = SELECTIONS[how].choose
    if exactly and choose is None:
        raise expected("select(exactly=True)", "n_edges, and a how that takes them", f"how={how!r}")
    values = values.float() if values.itemsize < 4 else values
    # What is no edge may hold anything. At first all is looked at, which needs no memory.
    if not finite(values):
        bad = ~values.isfinite() & graph.edge_mask
        if bad.any():
            u, v = bad.nonzero()[0].tolist()
            raise expected("scores", "finite values", f"{values[u, v].item()} at {graph.edge_name(u, v)}")
    ranking = Ranking(graph, values, signed, None if among is None else edge_flags("among", among, graph))
    if positive_ratio is not None and (how != "top" or signed or not 0 <= positive_ratio <= 1):
        found = f"positive_ratio={positive_ratio}, how={how!r}, signed={signed}"
        raise expected("select(positive_ratio=)", "a share from 0 to 1, with how='top' and signed=False", found)
    if choose is None:
        if threshold is None or any(n is not None for n in sizes):
            raise expected(
                "select(how='threshold')",
                "threshold= and no n_edges",
                f"threshold={threshold}, n_edges={sizes[0]}",
            )
        return [(ranking.whole >= threshold, None)]
    if threshold is not None or any(n is None for n in sizes):
        found = f"n_edges={sizes[0]!r}, threshold={threshold}"
        raise expected(f"select(how={how!r})", "a whole number n_edges and no threshold", found)
    asked = [whole("n_edges", n, 0, graph.n_edges, ", the edges of the graph") for n in sizes]

    def take(*sizes: int) -> list[Chosen]:
        if positive_ratio is None:
            return choose(ranking, sizes, seconds)
        return [(_positive_first(ranking, n, positive_ratio), None) for n in sizes]

    if exactly and SELECTIONS[how].grows:
        return [(exact_edges(graph, ranking.whole, n, lambda n: take(n)[0][0], seconds), None) for n in asked]
    chosen = take(*asked)
    if exactly:
        for i, ((mask, _), n) in enumerate(zip(chosen, asked, strict=True)):
            if mask.sum() < n:
                chosen[i] = counted_edges(graph, ranking.whole, n, seconds, mask)
    return chosen


def _top(ranking: Ranking, sizes: Sequence[int], seconds: float) -> list[Chosen]:
    return [(mask, None) for mask in ranking.highest(sizes)]


def _positive_first(ranking: Ranking, n_edges: int, ratio: float) -> Tensor:
    """A share of the edges by highest positive score, the others by largest absolute score."""
    positive = replace(ranking, signed=True).without(ranking.values <= 0)
    (first,) = positive.highest([round(ratio * n_edges)])
    (others,) = ranking.without(first).highest([n_edges - int(first.sum())])
    return first | others


def _greedy(ranking: Ranking, sizes: Sequence[int], seconds: float) -> list[Chosen]:
    """From the logits up, take the best edge into a node already reached, n times or until none is left."""
    graph, rank = ranking.graph, ranking.whole
    reach = graph.reach.tolist()
    mask = torch.zeros_like(rank, dtype=torch.bool)
    candidates: dict[int, tuple[list[float], list[int]]] = {}  # receiver -> its edges' ranks and senders, best first
    heap: list[tuple[float, int, int]] = []  # (-rank, receiver, position among its candidates)
    reached = [False] * graph.n_senders

    def push(receiver: int, position: int) -> None:
        ranks = candidates[receiver][0]
        if position < len(ranks):
            heapq.heappush(heap, (-ranks[position], receiver, position))

    def reach_inputs(receivers: list[int]) -> None:
        for receiver in receivers:
            if receiver not in candidates:
                ranks, senders = rank[: reach[receiver], receiver].sort(descending=True, stable=True)
                n = int((~ranks.isneginf()).sum())
                candidates[receiver] = ranks[:n].tolist(), senders[:n].tolist()
                push(receiver, 0)

    reach_inputs([*range(graph.n_receivers)[graph.logits_receiver]])
    found, taken = {}, 0
    for n in sorted(set(sizes)):  # larger ones contain smaller ones
        while taken < n and heap:
            _, receiver, position = heapq.heappop(heap)
            sender = candidates[receiver][1][position]
            mask[sender, receiver] = True
            taken += 1
            push(receiver, position + 1)
            if not reached[sender]:
                reached[sender] = True
                reach_inputs(graph.inputs[sender])
        found[n] = mask.clone()
    return [(found[n], None) for n in sizes]


def _optimal(ranking: Ranking, sizes: Sequence[int], seconds: float) -> list[Chosen]:
    starts = zip(ranking.highest(sizes), _greedy(ranking, sizes, seconds), strict=True)
    return [
        optimal_edges(ranking.graph, ranking.whole, n, seconds, [top, greedy])
        for n, (top, (greedy, _)) in zip(sizes, starts, strict=True)
    ]


@dataclass(frozen=True)
class Selection:
    """A way to choose edges by score.

    Args:
        name: what it is called by.
        description: one line.
        choose: (ranking, numbers of edges, seconds) -> for each number a mask [S, R], and its gap where it may miss the
            best. None for "threshold", which takes no number of edges.
        grows: more edges contain fewer.
    """

    name: str
    description: str
    choose: Callable[[Ranking, Sequence[int], float], list[Chosen]] | None
    grows: bool = True


SELECTIONS: dict[str, Selection] = {
    selection.name: selection
    for selection in (
        Selection("top", "the strongest edges anywhere", _top),
        Selection("greedy", "grown from the logits, each edge leading to one taken before", _greedy),
        Selection("threshold", "every edge that scores at least `threshold`", None),
        Selection("optimal", "the greatest sum of connected edges (needs scipy)", _optimal, grows=False),
    )
}
