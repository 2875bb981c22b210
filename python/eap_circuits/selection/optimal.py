"""The circuit of at most n edges with the greatest sum of scores, all of them on a path from `input` to `logits`.

It is the solution of an integer program (Nikankin et al. 2025, arXiv 2510.25786, use one too), which HiGHS solves
through scipy. Variables: x_e, whether edge e is in; a_u, whether sender u's node is in. Maximise Σ s_e x_e, where

    Σ x_e ≤ n,    a_u ≤ Σ x_e over edges out of u,    a_u ≤ Σ x_e over edges into u's inputs (u no source),
    x_e ≤ a_u for e = (u, v),    x_e ≤ Σ a_w over the nodes w that read v (v ≠ logits).

Senders are ordered by depth, so these local rules imply that each edge is on a path. The linear relaxation is tight in
practice. It holds only edges that could matter: columns and rows are added when a solution needs them. An edge stays
out if its reduced cost shows that no better circuit contains it, so the result is exact.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..edges import Graph, prune
from ..errors import InputError

_TOLERANCE = 1e-7  # relative to the largest score; the solver's own tolerance
_EAGER = 5000  # up to this many columns all their rules are in, so that one search is enough
_SPARE = 500  # columns at the start beyond twice the edges asked for


def optimal_edges(
    graph: Graph, rank: Tensor, n_edges: int, seconds: float, starts: Sequence[Tensor]
) -> tuple[Tensor, float]:
    """The connected edges with the greatest sum of ranks, and how far from optimal they may be.

    Args:
        rank: [S, R] scores to be maximised; -inf for edges that may not be taken.
        seconds: time limit; then the best circuit found so far is returned.
        starts: known circuits, bool [S, R] with at most `n_edges` edges each; the result is no worse than these.

    Returns:
        mask: bool [S, R], at most `n_edges` edges.
        gap: (bound − value) / bound, from 0 to 1; 0 if the circuit is proven to be the best.

    Raises:
        InputError: scipy is not installed.
    """
    try:
        import scipy.optimize  # noqa: F401
    except ImportError as error:
        raise InputError("select(how='optimal'): expected scipy, found none; pip install scipy") from error
    # The fewest edges of a path through each edge; edges that need more than n_edges are out.
    path = torch.ones_like(rank)
    path[~graph.sources] += 1
    path[:, : graph.logits_receiver.start] += 1
    rank = rank.masked_fill(path > n_edges, -torch.inf)
    if not (rank > -torch.inf).any():
        return torch.zeros_like(graph.edge_mask), 0.0
    return _Problem(graph, rank, n_edges, time.monotonic() + seconds).solve(starts)


@dataclass
class _Problem:
    """The edges that may be taken; `columns`, `below_u`, `below_v`: those in the program, and those whose rules are."""

    graph: Graph
    rank: Tensor
    n_edges: int
    deadline: float
    sender: Any = field(init=False)  # int [E]
    receiver: Any = field(init=False)  # int [E]
    weight: Any = field(init=False)  # float [E], the largest is 1 in size

    def __post_init__(self) -> None:
        from scipy import sparse

        graph = self.graph
        self.edges = (graph.edge_mask & ~self.rank.isneginf()).nonzero()
        self.sender, self.receiver = self.edges.T.numpy()
        scores = self.rank[self.edges[:, 0], self.edges[:, 1]].double()
        self.weight = (scores / scores.abs().max().clamp(min=1e-300)).numpy()
        edges, nodes = len(self.edges), graph.n_senders
        receivers, senders = (t.numpy() for t in graph.inputs_of)
        ones = np.ones(max(edges, len(senders)))
        every = np.arange(edges)
        shape = (graph.n_receivers, nodes)
        self.owners = sparse.csr_matrix((ones[: len(senders)], (receivers, senders)), shape=shape)
        self.out = sparse.csc_matrix((ones[:edges], (self.sender, every)), shape=(nodes, edges))
        into = sparse.csc_matrix((ones[:edges], (self.receiver, every)), shape=(graph.n_receivers, edges))
        self.into = (self.owners.T @ into).tocsc()
        self.inner = np.nonzero(~graph.sources.numpy())[0]  # senders that tokens do not reach by themselves
        self.inner_u = np.isin(self.sender, self.inner)  # neither `input`
        self.inner_v = self.receiver < graph.logits_receiver.start  # nor `logits`

        order = np.argsort(-self.weight, kind="stable")
        self.columns = np.zeros(edges, bool)
        self.columns[order[: 2 * self.n_edges + _SPARE]] = True
        # With the best edge of each receiver and of each sender, paths can be completed.
        for ends in (self.sender, self.receiver):
            self.columns[order[np.unique(ends[order], return_index=True)[1]]] = True
        # What the relaxation loses if it must take an edge that it leaves out, or leave out an edge that it takes.
        self.out_costs, self.in_costs = np.zeros(edges), np.zeros(edges)
        self.below_u, self.below_v = self.inner_u.copy(), self.inner_v.copy()
        for rule in (self.below_u, self.below_v):
            rule[order[self.n_edges :]] = False

    def solve(self, starts: Sequence[Tensor]) -> tuple[Tensor, float]:
        bound, reduced, rounded = self._relaxation()
        known = [rounded, *(self._places(mask) for mask in starts), np.zeros(0, int)]
        best, value = max((self._circuit(edges) for edges in known), key=lambda circuit: circuit[1])
        while bound > value + _TOLERANCE and self._left() > 0:
            found, within, finished = self._integers(bound, value)
            if found[1] > value:
                best, value = found
            beyond = ~self.columns & (bound + reduced > value + _TOLERANCE)
            # Any better circuit has an edge that was not in the program, and loses at least that edge's reduced cost.
            bound = min(bound, max(within, value, float((bound + reduced)[~self.columns].max(initial=-np.inf))))
            if not finished or not beyond.any():
                break
            self.columns |= beyond
        return best, max(bound - value, 0.0) / bound if bound > value + _TOLERANCE else 0.0

    def _relaxation(self) -> tuple[float, Any, Any]:
        """Solve the linear relaxation over all edges: a bound, each edge's reduced cost, the edges with x over ½."""
        from scipy.optimize import linprog

        nodes = self.graph.n_senders
        while True:
            chosen = np.nonzero(self.columns)[0]
            matrix, right = self._rules(chosen)
            cost = np.concatenate([-self.weight[chosen], np.zeros(nodes)])
            found = linprog(
                cost, A_ub=matrix, b_ub=right, bounds=(0, 1), options={"time_limit": max(self._left(), 0.1)}
            )
            if found.status != 0:
                # Out of time: the largest scores, connected or not, give a bound.
                largest = np.argsort(-self.weight, kind="stable")[: self.n_edges]
                bound = float(self.weight[largest].clip(min=0).sum())
                return bound, np.zeros_like(self.weight), largest
            price = -found.ineqlin.marginals
            fed = np.zeros(nodes)
            fed[self.inner] = price[1 + nodes : 1 + nodes + len(self.inner)]
            reduced = self.weight - price[0] + price[1 : 1 + nodes][self.sender] + (self.owners @ fed)[self.receiver]
            asked = ~self.columns & (reduced > _TOLERANCE)
            if not self._broken(chosen, found.x) and not asked.any():
                self.out_costs[chosen] = found.lower.marginals[: len(chosen)]
                self.in_costs[chosen] = -found.upper.marginals[: len(chosen)]
                x = found.x[: len(chosen)]
                rounded = np.argsort(-x, kind="stable")[: self.n_edges]
                return float(-found.fun), reduced, chosen[rounded[x[rounded] > 0.5]]
            self.columns |= asked

    def _integers(self, bound: float, value: float) -> tuple[tuple[Tensor, float], float, bool]:
        """Search among the columns in the program: (the best circuit, its value), a bound, whether it finished."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        nodes = self.graph.n_senders
        if self.columns.sum() <= _EAGER:
            self.below_u |= self.inner_u & self.columns
            self.below_v |= self.inner_v & self.columns
        while True:
            chosen = np.nonzero(self.columns)[0]
            matrix, right = self._rules(chosen)
            # An edge stays as in the relaxation if changing it costs more than could be gained over the known circuit.
            least, most = np.zeros(len(chosen) + nodes), np.ones(len(chosen) + nodes)
            least[: len(chosen)] = bound - self.in_costs[chosen] < value - _TOLERANCE
            most[: len(chosen)] = bound - self.out_costs[chosen] >= value - _TOLERANCE
            found = milp(
                np.concatenate([-self.weight[chosen], np.zeros(nodes)]),
                integrality=np.ones(len(chosen) + nodes),
                bounds=Bounds(least, most),
                constraints=LinearConstraint(matrix, -np.inf, right),
                options={"time_limit": max(self._left(), 0.1), "mip_rel_gap": 0.0},
            )
            finished = found.status == 0
            if found.x is None:
                return self._circuit(np.zeros(0, int)), bound, False
            if not self._broken(chosen, found.x) or not finished:
                edges = chosen[found.x[: len(chosen)] > 0.5]
                return self._circuit(edges), float(-found.mip_dual_bound), finished

    def _circuit(self, edges: Any) -> tuple[Tensor, float]:
        """The connected part of the edges, and its value."""
        mask = torch.zeros_like(self.graph.edge_mask)
        taken = self.edges[torch.as_tensor(edges)]
        mask[taken[:, 0], taken[:, 1]] = True
        mask = prune(self.graph, mask)
        return mask, float(self.weight[self._places(mask)].sum())

    def _places(self, mask: Tensor) -> Any:
        """The indices of a mask's edges in the list of edges."""
        return np.nonzero(mask[self.edges[:, 0], self.edges[:, 1]].numpy())[0]

    def _rules(self, chosen: Any) -> tuple[Any, Any]:
        """Matrix and right-hand side of the rules in the program, over x of the chosen edges and a of all senders."""
        from scipy import sparse

        place = np.full(len(self.weight), -1)
        place[chosen] = np.arange(len(chosen))
        own = sparse.identity(self.graph.n_senders, format="csr")
        count = sparse.csr_matrix(np.concatenate([np.ones(len(chosen)), np.zeros(self.graph.n_senders)])[None])
        blocks = [count, sparse.hstack([-self.out[:, chosen], own])]
        blocks.append(sparse.hstack([-self.into[:, chosen][self.inner], own[self.inner]]))
        for rule, nodes, ends in ((self.below_u, own, self.sender), (self.below_v, self.owners, self.receiver)):
            edges = np.nonzero(rule & self.columns)[0]
            each = (np.ones(len(edges)), (np.arange(len(edges)), place[edges]))
            left = sparse.csr_matrix(each, shape=(len(edges), len(chosen)))
            blocks.append(sparse.hstack([left, -nodes[ends[edges]]]))
        matrix = sparse.vstack(blocks).tocsr()
        right = np.zeros(matrix.shape[0])
        right[0] = self.n_edges
        return matrix, right

    def _broken(self, chosen: Any, solution: Any) -> bool:
        """Add the rules that a solution breaks; were there any?"""
        x, a = np.zeros(len(self.weight)), solution[len(chosen) :]
        x[chosen] = solution[: len(chosen)]
        u = self.inner_u & ~self.below_u & (x > a[self.sender] + _TOLERANCE)
        v = self.inner_v & ~self.below_v & (x > (self.owners @ a)[self.receiver] + _TOLERANCE)
        self.below_u |= u
        self.below_v |= v
        return bool(u.any() or v.any())

    def _left(self) -> float:
        return self.deadline - time.monotonic()
