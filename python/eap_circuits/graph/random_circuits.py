"""Random circuits of a given size: the baseline that a selected circuit has to beat."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..edges import Graph
from ..errors import SEEDS, expected, instance, whole
from ..selection import select_edges
from .circuit import Circuit

_TRIES = 20
_AT_ONCE = 2**16  # edges


def random_circuit(graph: Graph, n_edges: int, *, seed: int = 0) -> Circuit:
    """A random circuit of exactly `n_edges` edges, all of them on a path from `input` to `logits`.

    `prune` leaves a selected circuit with the same rule. Without it most random edges would lead nowhere, and the
    baseline would be nearly an empty circuit. Edges are added in a random order; if an edge is on no path yet, random
    edges that complete one come with it. (The draw is not uniform among all such circuits, which would be expensive.)

    Args:
        n_edges: from 0 to the number of edges of the graph.
        seed: the same seed gives the same circuit.

    Raises:
        InputError: a number that the graph does not have, or for which no connected circuit was found.

    Example:
        >>> chance = eap.random_circuit(scores.graph, circuit.n_edges, seed=1)
    """
    instance("graph", graph, Graph)
    n_edges = whole("n_edges", n_edges, 0, graph.n_edges, ", the edges of the graph")
    seed = whole("seed", seed, *SEEDS)
    rng = random.Random(seed)
    for _ in range(_TRIES):
        grows = graph.spans is None and not graph.encoder
        mask = _grown(graph, n_edges, rng) if grows else _selected(graph, n_edges, rng)
        if mask.sum() == n_edges:
            return Circuit(graph, mask, None, {"random": {"n_edges": n_edges, "seed": seed}})
    raise expected("n_edges", "a size that a connected circuit of this graph can have", n_edges)


def _grown(graph: Graph, n_edges: int, rng: random.Random) -> Tensor:
    growth = _Growth(graph, rng)
    growth.grow(n_edges)
    return growth.mask


def _selected(graph: Graph, n_edges: int, rng: random.Random) -> Tensor:
    """By random scores: a path that changes span, or stream, is completed as that of a selected circuit is."""
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    rank = torch.rand(graph.edge_mask.shape, generator=generator, dtype=torch.float32)
    return select_edges(graph, rank, [n_edges], "top", True, exactly=True)[0][0]


class _Growth:
    """A growing circuit in which every edge is on a path.

    `fed`: senders that the graph's `sources` reach; `read`: receivers that reach `logits`. All others have no edge yet.
    """

    def __init__(self, graph: Graph, rng: random.Random) -> None:
        self.graph, self.rng = graph, rng
        self.mask = torch.zeros_like(graph.edge_mask)
        self.reach = graph.reach.tolist()
        self.inputs, self.owners = graph.inputs, graph.owners
        # Receivers sorted by reach: sender u reaches those from `first[u]` on.
        order = graph.reach.argsort(stable=True)
        self.by_reach = order.tolist()
        self.first = torch.searchsorted(graph.reach[order], torch.arange(graph.n_senders), right=True).tolist()
        # Of edge number e, counted sender by sender: who sends it, and how far from e its place in the flat mask is.
        first = np.array(self.first)
        leaving = graph.n_receivers - first
        self.sender = np.repeat(np.arange(graph.n_senders, dtype=np.int32), leaving)
        self.shift = np.arange(graph.n_senders) * graph.n_receivers + first - (leaving.cumsum() - leaving)
        self.fed: list[bool] = graph.sources.tolist()
        self.read = [False] * (graph.n_receivers - 1) + [True]
        self.missing = self.fed.count(False) + graph.n_receivers - 1

    def grow(self, n_edges: int) -> None:
        """Add edges until there are `n_edges`, or fewer if no remaining edge can be completed to a path within that."""
        generator = torch.Generator().manual_seed(self.rng.getrandbits(62))
        # The edges' numbers, in a random order. In parts: a circuit needs few of them, and a list of all edges of a
        # large model would take gigabytes.
        order = torch.randperm(self.graph.n_edges, generator=generator, dtype=torch.int32).numpy()
        parts = [order[start : start + _AT_ONCE] for start in range(0, len(order), _AT_ONCE)]
        remaining = n_edges
        for place in (place for part in parts for place in self._places(part).tolist()):
            if not remaining or not self.missing:
                break
            u, v = divmod(place, self.graph.n_receivers)
            if not self.mask[u, v]:
                paths = (self._completed(u, v, shortest) for shortest in (False, True))
                path = next((path for path in paths if len(path) <= remaining), set())
                self._take(path)
                remaining -= len(path)
        # Any edge between nodes of the circuit is on a path already.
        fits = torch.tensor(self.fed)[:, None] & torch.tensor(self.read) & self.graph.edge_mask & ~self.mask
        if torch.count_nonzero(fits) <= remaining:
            remaining -= int(torch.count_nonzero(fits))
            self.mask |= fits
            return
        flags, mask = fits.numpy().reshape(-1), self.mask.numpy().reshape(-1)
        for part in parts:
            if not remaining:
                break
            here = self._places(part)
            chosen = here[flags[here]][:remaining]
            mask[chosen] = True
            remaining -= len(chosen)

    def _places(self, edges: Any) -> Any:
        """Where edges of these numbers, counted sender by sender, are in the flat mask."""
        return edges + self.shift[self.sender[edges]]

    def _completed(self, u: int, v: int, shortest: bool) -> set[tuple[int, int]]:
        """The edge and the new edges that connect it with `input` and with `logits`."""
        path = {(u, v)}
        sender = u
        while not self.fed[sender]:
            receiver = self.rng.choice(self.inputs[sender])
            sender = 0 if shortest else self.rng.randrange(self.reach[receiver])
            path.add((sender, receiver))
        receiver = v
        while not self.read[receiver]:
            sender = self.rng.choice(self.owners[receiver])
            last = len(self.by_reach) - 1
            receiver = self.by_reach[last if shortest else self.rng.randint(self.first[sender], last)]
            path.add((sender, receiver))
        return path

    def _take(self, path: set[tuple[int, int]]) -> None:
        for u, v in path:
            self.mask[u, v] = True
            for sender in self.owners[v]:
                self.missing -= not self.fed[sender]
                self.fed[sender] = True
            for receiver in self.inputs[u]:
                self.missing -= not self.read[receiver]
                self.read[receiver] = True
