"""Scores of nodes, and the circuit of all edges among the best nodes."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import formats
from ..display import Result, drawn, library
from ..edges import Graph, finite, numbers
from ..errors import expected, flag, instance, whole
from .circuit import Circuit

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class NodeScores(Result):
    """Scores of every node that writes to the residual stream: positive if corrupting its contribution hurts.

    A node's score is Σ_t ⟨Δ_u(t), ∂loss/∂c_u(t)⟩, with the gradient at what the node writes. Every receiver after the
    node reads that, so this is the sum of the scores of its outgoing edges.

    Args:
        graph: the graph whose nodes these are; both head graphs have the same nodes.
        values: float32 [S], in units of the metric, in the order of `graph.senders`.
        neurons: float32 [S, D], the scores by dimension of the residual stream, or None; its rows sum to `values`.
        info: where they came from, as plain JSON values.
    """

    graph: Graph
    values: Tensor
    neurons: Tensor | None = None
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        instance("graph", self.graph, Graph)
        object.__setattr__(self, "values", numbers("node score values", self.values, [self.graph.n_senders]))
        if self.neurons is not None:
            shape = [self.graph.n_senders, self.graph.d_model]
            object.__setattr__(self, "neurons", numbers("node score neurons", self.neurons, shape))

    def select(self, n_nodes: int, signed: bool = False) -> Circuit:
        """The circuit of all edges among the n heads and MLPs of highest score, `input` and `logits`.

        An edge into a key/value head is kept if a query head of its group is kept.

        Args:
            n_nodes: how many heads and MLPs.
            signed: rank by the score itself; by default by its absolute value.

        Raises:
            InputError: a number outside the graph, or scores that are not finite.
        """
        inputs = self.graph.input_senders
        signed, nodes = flag("signed", signed), self.graph.n_senders - len(inputs)
        n_nodes = whole("n_nodes", n_nodes, 0, nodes, ", the heads and MLPs of the graph")
        if not finite(self.values):
            raise expected("node scores", "finite values", "some that are not")
        rank = self.values.clone() if signed else self.values.abs()
        rank[inputs] = -torch.inf
        kept = torch.zeros(self.graph.n_senders, dtype=torch.bool)
        kept[rank.argsort(descending=True, stable=True)[:n_nodes]] = True
        info = {**self.info, "selection": {"how": "nodes", "n_nodes": n_nodes, "signed": signed}}
        return Circuit(self.graph, self.graph.between(kept), info=info)

    def top_nodes(self, n: int = 20) -> list[tuple[str, float]]:
        """The n nodes of largest absolute score: (sender, score)."""
        order = self.values.abs().argsort(descending=True, stable=True)[: whole("n", n, 0)]
        return [(self.graph.senders[u], float(self.values[u])) for u in order.tolist()]

    def top_neurons(self, n: int = 20) -> list[tuple[str, int, float]]:
        """The n entries of `neurons` of largest absolute score: (sender, dimension, score)."""
        if self.neurons is None:
            raise expected("neurons", 'scores of attribute(keep="neurons")', "none")
        order = self.neurons.abs().flatten().argsort(descending=True, stable=True)[: whole("n", n, 0)]
        found = zip(*(t.tolist() for t in (order // self.graph.d_model, order % self.graph.d_model)), strict=True)
        return [(self.graph.senders[u], d, float(self.neurons[u, d])) for u, d in found]

    def to_pandas(self) -> Any:
        """A pandas DataFrame: node and score."""
        return library("pandas", "to_pandas()").DataFrame({"node": self.graph.senders, "score": self.values.tolist()})

    def plot(self) -> Figure:
        """Layers × heads and MLPs."""
        return drawn("draw_heatmap", self.graph, self.values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `.safetensors`; or, for EAP-IG and MIB, `.json` with the scores of the nodes or `.pt` with those of
        their dimensions ("neurons"), in both without one of `input`, which is so in every circuit. Whole or not at all.

        Raises:
            InputError: a place that cannot be written to, `.pt` without `neurons`, or a graph that EAP-IG cannot have.
        """
        neurons = {} if self.neurons is None else {"neurons": self.neurons}
        formats.save_nodes(path, formats.Content(self.graph, {"values": self.values, **neurons}, self.info))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> NodeScores:
        """Read the `.safetensors` that `save` wrote. Raises `InputError` for anything else."""
        graph, tensors, info = formats.load_nodes(path)
        return cls(graph, tensors["values"], tensors.get("neurons"), info)

    def __repr__(self) -> str:
        return f"NodeScores({self.info.get('method', '?')}, {self.graph!r})"
