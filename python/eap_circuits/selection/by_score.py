"""Ways to choose edges by score."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..edges import Graph, edge_flags
from ..errors import expected, one_of, whole
from .exactly import counted_edges, exact_edges
from .optimal import optimal_edges


def select_edges(
    graph: Graph,
    values: Tensor,
    n_edges: int | None,
    how: str,
    signed: bool,
    threshold: float | None,
    positive_ratio: float | None = None,
    among: Tensor | None = None,
    seconds: float = 30.0,
    exactly: bool = False,
) -> tuple[Tensor, float | None]:
    """Edges chosen by score, bool [S, R], not yet pruned; and the gap, for "optimal". See `EdgeScores.select`."""
    one_of("how", how, SELECTIONS)
    choose = SELECTIONS[how].choose
    if exactly and choose is None:
        raise expected("select(exactly=True)", "n_edges, and a how that takes them", f"how={how!r}")
    bad = ~values.isfinite() & graph.edge_mask
    if bad.any():
        u, v = bad.nonzero()[0].tolist()
        raise expected("scores", "finite values", f"{values[u, v].item()} at {graph.edge_name(u, v)}")
    allowed = graph.edge_mask if among is None else graph.edge_mask & edge_flags("among", among, graph)
    rank = (values if signed else values.abs()).masked_fill(~allowed, -torch.inf)
    if positive_ratio is not None and (how != "top" or signed or not 0 <= positive_ratio <= 1):
        found = f"positive_ratio={positive_ratio}, how={how!r}, signed={signed}"
        raise expected("select(positive_ratio=)", "a share from 0 to 1, with how='top' and signed=False", found)
    if choose is None:
        if threshold is None or n_edges is not None:
            raise expected(
                "select(how='threshold')",
                "threshold= and no n_edges",
                f"threshold={threshold}, n_edges={n_edges}",
            )
        return rank >= threshold, None
    if threshold is not None or n_edges is None:
        found = f"n_edges={n_edges!r}, threshold={threshold}"
        raise expected(f"select(how={how!r})", "a whole number n_edges and no threshold", found)
    n_edges = whole("n_edges", n_edges, 0, graph.n_edges, ", the edges of the graph")

    def take(n: int) -> tuple[Tensor, float | None]:
        if positive_ratio is None:
            return choose(graph, rank, n, seconds)
        first = _top(values.masked_fill(~allowed | (values <= 0), -torch.inf), round(positive_ratio * n))
        return first | _top(rank.masked_fill(first, -torch.inf), n - int(first.sum())), None

    if exactly and SELECTIONS[how].grows:
        return exact_edges(graph, rank, n_edges, lambda n: take(n)[0], seconds), None
    mask, gap = take(n_edges)
    if exactly and mask.sum() < n_edges:
        return counted_edges(graph, rank, n_edges, seconds, mask)
    return mask, gap


def _top(rank: Tensor, n_edges: int) -> Tensor:
    """The n_edges highest, or fewer if the others may not be taken (-inf)."""
    flat = rank.flatten()
    if n_edges < 1:
        return torch.zeros_like(rank, dtype=torch.bool)
    least = flat.kthvalue(len(flat) - n_edges + 1).values
    mask = flat > least
    # Of equal scores take the first ones.
    mask[(flat == least).nonzero()[: n_edges - int(mask.sum()), 0]] = True
    return mask.view_as(rank) & ~rank.isneginf()


def _greedy(graph: Graph, rank: Tensor, n_edges: int) -> Tensor:
    """From the logits up, take the best edge into a node already reached, n_edges times or until none is left."""
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
    for _ in range(n_edges):
        if not heap:
            break
        _, receiver, position = heapq.heappop(heap)
        sender = candidates[receiver][1][position]
        mask[sender, receiver] = True
        push(receiver, position + 1)
        if not reached[sender]:
            reached[sender] = True
            reach_inputs(graph.inputs[sender])
    return mask


def _optimal(graph: Graph, rank: Tensor, n_edges: int, seconds: float) -> tuple[Tensor, float | None]:
    return optimal_edges(graph, rank, n_edges, seconds, [_top(rank, n_edges), _greedy(graph, rank, n_edges)])


@dataclass(frozen=True)
class Selection:
    """A way to choose edges by score.

    Args:
        name: what it is called by.
        description: one line.
        choose: (graph, rank [S, R], n_edges, seconds) -> mask [S, R], and its gap where it may miss the best; rank is
            -inf where no edge may be taken. None for "threshold", which takes no number of edges.
        grows: more edges contain fewer.
    """

    name: str
    description: str
    choose: Callable[[Graph, Tensor, int, float], tuple[Tensor, float | None]] | None
    grows: bool = True


SELECTIONS: dict[str, Selection] = {
    selection.name: selection
    for selection in (
        Selection("top", "the strongest edges anywhere", lambda graph, rank, n, seconds: (_top(rank, n), None)),
        Selection(
            "greedy",
            "grown from the logits, each edge leading to one taken before",
            lambda graph, rank, n, seconds: (_greedy(graph, rank, n), None),
        ),
        Selection("threshold", "every edge that scores at least `threshold`", None),
        Selection("optimal", "the greatest sum of connected edges (needs scipy)", _optimal, grows=False),
    )
}
