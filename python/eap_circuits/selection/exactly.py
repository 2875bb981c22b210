"""Circuits of exactly n edges, all of them on a path from `input` to `logits`.

Pruning leaves fewer edges than were taken. So the strongest edges are taken until at least n of them are on paths, and
the weakest that the others do not need are left out again. Where edges hang together so that n is missed, what is left
is filled up with the strongest edges that fit it, and with the shortest detours through new nodes. Where that misses n
too, the integer program of "optimal" decides, in which another edge counts more than any scores.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..edges import Graph, prune
from .optimal import optimal_edges

_TRIES = 20
Edge = tuple[int, int]


def exact_edges(graph: Graph, rank: Tensor, n_edges: int, take: Callable[[int], Tensor], seconds: float) -> Tensor:
    """Exactly n connected edges, or, if none are found, fewer; bool [S, R].

    Args:
        rank: [S, R] scores, the strongest highest; -inf for edges that may not be taken.
        take: n -> the edges that are taken for n before pruning; those for n + 1 contain them.
        seconds: how long the integer program may search.
    """
    enough, fewer = _enough(graph, n_edges, take)
    if enough.sum() <= n_edges:
        return enough
    best = none = torch.zeros_like(enough)
    for mask in (*_trimmed(graph, rank, enough, n_edges), fewer, none):
        filled = _filled(graph, rank, mask, n_edges)
        if filled.sum() == n_edges:
            return filled
        best = max(best, filled, key=torch.sum)
    return counted_edges(graph, rank, n_edges, seconds, best)[0] if importlib.util.find_spec("scipy") else best


def counted_edges(graph: Graph, rank: Tensor, n_edges: int, seconds: float, start: Tensor) -> tuple[Tensor, float]:
    """The most connected edges up to n, of these the greatest sum; and its gap, as `optimal_edges` gives them."""
    finite = rank[~rank.isneginf()].double()
    # More than all scores together can differ.
    worth = 2 * n_edges * float(finite.abs().max()) if finite.any() else 1.0
    mask, gap = optimal_edges(graph, rank.double() + worth, n_edges, seconds, [start])
    total = float(rank[mask].double().sum())
    missing = (total + worth * int(mask.sum())) * gap / (1 - gap) if gap < 1 else float("inf")
    return mask, min(missing / max(abs(total + missing), 1e-300), 1.0) if missing else 0.0


def _enough(graph: Graph, n_edges: int, take: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
    """Pruned: the fewest edges taken that leave n or more, and those taken with one edge fewer."""

    def pruned(taken: int) -> Tensor:
        return prune(graph, take(taken))

    low, high = max(n_edges - 1, 0), n_edges  # fewer than n of `low` edges are connected
    enough, fewer = pruned(high), torch.zeros_like(graph.edge_mask)
    while enough.sum() < n_edges and high < graph.n_edges:
        low, high, fewer = high, min(2 * high, graph.n_edges), enough
        enough = pruned(high)
    while high - low > 1:
        middle = (low + high) // 2
        found = pruned(middle)
        if found.sum() < n_edges:
            low, fewer = middle, found
        else:
            high, enough = middle, found
    return enough, fewer


def _trimmed(graph: Graph, rank: Tensor, mask: Tensor, n_edges: int) -> Iterator[Tensor]:
    """The circuit with its weakest edges left out: with n edges, or with fewer in one way after another."""
    places = mask.nonzero()
    order = rank[mask].argsort(descending=True, stable=True).flip(0)
    weakest: list[Edge] = [(u, v) for u, v in places[order].tolist()]
    circuit = _Connected(graph, weakest)
    # Edges that nothing depends on come first, then those that take others with them.
    for largest in (1, n_edges):
        changed = True
        while changed and circuit.size > n_edges:
            changed = False
            for edge in weakest:
                if circuit.size > n_edges and edge in circuit:
                    gone = circuit.lost(edge, min(largest, circuit.size - n_edges))
                    circuit.leave_out(gone)
                    changed |= bool(gone) and largest > 1
    kept = circuit.mask()
    if circuit.size == n_edges:
        yield kept
        return
    losses = [circuit.lost(edge, circuit.size) for edge in weakest if edge in circuit]
    for gone in sorted(losses, key=len)[:_TRIES]:
        below = kept.clone()
        below[tuple(torch.tensor(sorted(gone)).T)] = False
        yield below


class _Connected:
    """A connected circuit from which edges are removed, together with those that are on no path without them."""

    def __init__(self, graph: Graph, edges: list[Edge]) -> None:
        self._graph, self.size = graph, len(edges)
        self._after: list[set[int]] = [set() for _ in range(graph.n_senders)]
        self._before: list[set[int]] = [set() for _ in range(graph.n_receivers)]
        for u, v in edges:
            self._after[u].add(v)
            self._before[v].add(u)

    def __contains__(self, edge: Edge) -> bool:
        return edge[1] in self._after[edge[0]]

    def lost(self, edge: Edge, limit: int) -> set[Edge]:
        """The edge and those on no path without it; none if they are more than `limit`."""
        inputs, owners, sources = self._graph.inputs, self._graph.owners, self._graph.sources
        gone, left = {edge}, [edge]
        while left and len(gone) <= limit:
            u, v = left.pop()
            follow: list[Edge] = []
            for owner in owners[v]:
                if not sources[owner] and all((w, r) in gone for r in inputs[owner] for w in self._before[r]):
                    follow += [(owner, r) for r in self._after[owner]]
            if all((u, r) in gone for r in self._after[u]):
                for r in inputs[u]:
                    if all((owner, x) in gone for owner in owners[r] for x in self._after[owner]):
                        follow += [(w, r) for w in self._before[r]]
            fresh = set(follow) - gone
            gone |= fresh
            left += fresh
        return gone if len(gone) <= limit else set()

    def leave_out(self, edges: set[Edge]) -> None:
        for u, v in edges:
            self._after[u].remove(v)
            self._before[v].remove(u)
        self.size -= len(edges)

    def mask(self) -> Tensor:
        mask = torch.zeros_like(self._graph.edge_mask)
        for u, receivers in enumerate(self._after):
            mask[u, list(receivers)] = True
        return mask


def _filled(graph: Graph, rank: Tensor, mask: Tensor, n_edges: int) -> Tensor:
    """A connected circuit with more edges, at most n: the strongest that fit it; if these are too few, detours."""
    mask = mask.clone()
    while (missing := n_edges - int(mask.sum())) > 0:
        fed, read = graph.fed(mask.any(0)), graph.read(mask.any(1))
        fits = (~rank.isneginf() & ~mask & fed[:, None] & read).nonzero()
        if len(fits) < missing and (detour := _detour(graph, rank, fed, read, missing)):
            taken = torch.tensor(detour)
        elif len(fits):
            order = rank[tuple(fits.T)].argsort(descending=True, stable=True)
            taken = fits[order[:missing]]
        else:
            break
        mask[tuple(taken.T)] = True
    return mask


def _detour(graph: Graph, rank: Tensor, fed: Tensor, read: Tensor, longest: int) -> list[Edge]:
    """The shortest path of two edges or more through new nodes, of these the strongest; none if it is too long."""
    rank = rank.double()
    # From each receiver on: how many edges to one that is read, and their sum.
    length = torch.where(read, 0.0, torch.inf).double()
    total = torch.zeros(graph.n_receivers, dtype=torch.float64)
    onward: dict[int, Edge] = {}

    def best(sender: int, length: Tensor) -> tuple[float, float, int]:
        steps = length.masked_fill(rank[sender].isneginf(), torch.inf)
        sums = (rank[sender] + total).masked_fill(steps > steps.min(), -torch.inf)
        return float(steps.min()) + 1, float(sums.max()), int(sums.argmax())

    for sender in range(graph.n_senders - 1, graph.n_spans - 1, -1):
        steps, worth, receiver = best(sender, length)
        for r in graph.inputs[sender]:
            if not read[r] and steps < torch.inf and (steps, -worth) < (float(length[r]), -float(total[r])):
                length[r], total[r], onward[r] = steps, worth, (sender, receiver)
    new = length.masked_fill(read, torch.inf)
    starts = [(*best(u, new), u) for u in fed.nonzero()[:, 0].tolist()]
    steps, _, receiver, sender = min(starts, key=lambda start: (start[0], -start[1]))
    if steps > longest:
        return []
    path = [(sender, receiver)]
    while receiver in onward and not read[receiver]:
        path.append(onward[receiver])
        receiver = path[-1][1]
    return path
