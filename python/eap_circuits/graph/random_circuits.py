"""Random circuits: what a circuit of so many edges does that nobody chose."""

from __future__ import annotations

import random

import torch

from ..errors import expected
from .circuit import Circuit
from .layout import Graph

_TRIES = 20


def random_circuit(graph: Graph, n_edges: int, seed: int = 0) -> Circuit:
    """A random circuit of exactly `n_edges` edges, all of them on a path from `input` to `logits`.

    That is the rule that `prune` leaves a selected circuit with; edges drawn without it would mostly lead nowhere,
    and the baseline would be as good as empty. Edges come in a random order, each with random edges that complete a
    path where there is none yet. (Not uniform among all such circuits, which cannot be drawn cheaply.)

    Args:
        n_edges: 0 to the edges of the graph.
        seed: the same seed gives the same circuit.

    Raises:
        InputError: a size that the graph does not have, or in which no circuit is connected.
    """
    if isinstance(n_edges, bool) or not isinstance(n_edges, int) or not 0 <= n_edges <= graph.n_edges:
        raise expected("n_edges", f"a whole number from 0 to {graph.n_edges}, the edges of the graph", repr(n_edges))
    rng = random.Random(seed)
    for _ in range(_TRIES):
        growth = _Growth(graph, rng)
        if growth.grow(n_edges):
            return Circuit(graph, growth.mask, None, {"random": {"n_edges": n_edges, "seed": seed}})
    raise expected("n_edges", "a size that a connected circuit of this graph can have", n_edges)


class _Growth:
    """A circuit in which every edge is on a path, growing edge by edge.

    `fed`: senders that `input` reaches; `read`: receivers that reach `logits`. What is neither has no edge yet.
    """

    def __init__(self, graph: Graph, rng: random.Random) -> None:
        self.graph, self.rng = graph, rng
        self.mask = torch.zeros_like(graph.edge_mask)
        self.reach = graph.reach.tolist()
        self.inputs: list[list[int]] = [[] for _ in range(graph.n_senders)]
        self.owners: list[list[int]] = [[] for _ in range(graph.n_receivers)]
        for receiver, sender in zip(*(t.tolist() for t in graph.inputs_of), strict=True):
            self.inputs[sender].append(receiver)
            self.owners[receiver].append(sender)
        # Receivers by reach: those that sender u reaches are the ones from `first[u]` on.
        order = graph.reach.argsort(stable=True)
        self.by_reach = order.tolist()
        self.first = torch.searchsorted(graph.reach[order], torch.arange(graph.n_senders), right=True).tolist()
        self.fed = [True] + [False] * (graph.n_senders - 1)
        self.read = [False] * (graph.n_receivers - 1) + [True]
        self.missing = graph.n_senders + graph.n_receivers - 2

    def grow(self, n_edges: int) -> bool:
        """Take edges until there are `n_edges`; False where no edge left can be completed in what remains."""
        generator = torch.Generator().manual_seed(self.rng.getrandbits(62))
        order = self.graph.edge_mask.nonzero()
        order = order[torch.randperm(len(order), generator=generator)]
        remaining = n_edges
        for u, v in order.tolist():
            if not remaining or not self.missing:
                break
            if not self.mask[u, v]:
                paths = (self._completed(u, v, shortest) for shortest in (False, True))
                path = next((path for path in paths if len(path) <= remaining), set())
                self._take(path)
                remaining -= len(path)
        if remaining:
            # Every edge between nodes that are in completes itself.
            fits = torch.tensor(self.fed)[order[:, 0]] & torch.tensor(self.read)[order[:, 1]]
            rest = order[fits & ~self.mask[order[:, 0], order[:, 1]]][:remaining]
            self.mask[rest[:, 0], rest[:, 1]] = True
            remaining -= len(rest)
        return not remaining

    def _completed(self, u: int, v: int, shortest: bool) -> set[tuple[int, int]]:
        """The edge, with new edges that lead from `input` to it and from it to `logits`."""
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
