"""A circuit: a set of edges; every other edge carries the corrupted value."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import formats
from ..display import Result, drawn
from ..edges import Graph, beyond, edge_flags, numbers, prune, usable
from ..errors import expected, instance, warn
from . import exports

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Circuit(Result):
    """Edges kept, of one graph.

    Args:
        graph: the graph whose edges these are.
        mask: bool [S, R], True where the edge is kept; only real edges may be True.
        values: float32 [S, R] edge scores it was selected by, or None.
        info: where it came from (method, metric, task, selection …), as plain JSON values.
    """

    graph: Graph
    mask: Tensor
    values: Tensor | None = None
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        instance("graph", self.graph, Graph)
        object.__setattr__(self, "info", dict(instance("info", self.info, dict, "a dictionary")))
        object.__setattr__(self, "mask", usable(edge_flags("circuit mask", self.mask, self.graph).clone()))
        if self.values is not None:
            shape = [self.graph.n_senders, self.graph.n_receivers]
            values = numbers("circuit values", self.values, shape, " [senders, receivers]")
            object.__setattr__(self, "values", values)
        if (first := beyond(self.graph, self.mask)) is not None:
            n = int((self.mask & ~self.graph.edge_mask).sum())
            found = f"{n} that do not, the first {self.graph.edge_name(*first)}"
            raise expected("circuit mask", "only edges that exist", found)

    @classmethod
    def from_mask(cls, graph: Graph, mask: Tensor) -> Circuit:
        """A circuit from a bool mask [S, R], a tensor or what becomes one."""
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            mask = torch.as_tensor(mask)
        return cls(graph, mask)

    @property
    def n_edges(self) -> int:
        return int(np.count_nonzero(self.mask.numpy()))  # a third of the library's time

    @property
    def nodes(self) -> list[str]:
        """Names of the senders in the circuit: those with a kept edge going out or, except for `input`, coming in."""
        present = self.graph.connected(self.mask).tolist()
        return [name for name, here in zip(self.graph.senders, present, strict=True) if here]

    @property
    def edges(self) -> list[tuple[str, str]]:
        """(sender, receiver) names of the kept edges."""
        return [(self.graph.senders[u], self.graph.receivers[v]) for u, v in self.mask.nonzero().tolist()]

    def pruned(self) -> Circuit:
        """The circuit without edges that lead nowhere or come from nowhere."""
        return Circuit(self.graph, prune(self.graph, self.mask), self.values, self.info)

    def complement(self) -> Circuit:
        """The circuit of all other edges."""
        return Circuit(self.graph, self.graph.edge_mask & ~self.mask, info={**self.info, "complement": True})

    def node_circuit(self) -> Circuit:
        """The circuit of all edges among this one's heads and MLPs, those on its paths, with `input` and `logits`.

        Under zero ablation it is what `export_model` writes.
        """
        kept = prune(self.graph, self.mask).any(1)
        return Circuit(self.graph, self.graph.between(kept), info={**self.info, "node_circuit": True})

    def across_spans(self) -> Circuit:
        """The circuit of the edges that are kept at any span, of the graph without spans."""
        values = None if self.values is None else self.graph.per_span(self.values.double()).sum(0).float()
        return Circuit(self.graph.base, self.graph.per_span(self.mask).any(0), values, self.info)

    def to_query(self) -> Circuit:
        """The same circuit over query heads: an edge to a key/value head becomes one to each head of its group."""
        if self.graph.heads == "query":
            return self
        values = None if self.values is None else self.graph.to_query(self.values)
        return Circuit(self.graph.with_heads("query"), self.mask[:, self.graph.kv_receiver], values, self.info)

    def to_pandas(self) -> Any:
        """A pandas DataFrame of the kept edges: sender, receiver and, if the circuit has scores, score."""
        scores = {} if self.values is None else {"score": self.values}
        return exports.to_frame(self.graph, self.mask, scores)

    def to_networkx(self) -> Any:
        """A networkx MultiDiGraph, in which paths lead through heads: an edge into a head's query, key or value enters
        the head itself, and each of the heads that share a key or value.

        An edge's key is "q", "k", "v", "mlp" or "logits"; it has the attribute `score` if the circuit has scores.

        Example:
            >>> graph = circuit.to_networkx()
            >>> networkx.has_path(graph, "input", "logits")
        """
        return exports.to_networkx(self)

    def to_dot(self) -> str:
        """The same graph in Graphviz's language."""
        return exports.to_dot(self)

    def plot(self, max_edges: int = 300) -> Figure:
        """The circuit's picture; of more edges only the strongest are drawn. See `report.draw_circuit`."""
        return drawn("draw_circuit", self, max_edges)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `.safetensors`, or EAP-IG's `.json` or `.pt`; whole or not at all.

        `.safetensors` has only the kept edges and their scores, EAP-IG's formats all edges.
        """
        values = {} if self.values is None else {"values": self.values}
        formats.save(path, "circuit", formats.Content(self.graph, {"mask": self.mask, **values}, self.info))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Circuit:
        """Read what `save` or EAP-IG wrote; nothing is unpickled. Raises `InputError` for anything else.

        From our own format `values` are 0 outside the circuit.

        Warns of a file with scores and no edge: EAP-IG's formats do not tell scores from an empty circuit.
        """
        graph, tensors, info = formats.load(path)
        if "mask" not in tensors:
            raise expected(str(path), "a circuit", "edge scores only; choose a circuit with EdgeScores.select")
        if "values" in tensors and "selection" not in info and tensors["values"].any() and not tensors["mask"].any():
            warn(f"{path}: a circuit without edges, but with scores; EdgeScores.load(...).select chooses one.")
        return cls(graph, tensors["mask"], tensors.get("values", tensors.get("kept")), info)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Circuit) and self.graph == other.graph and bool((self.mask == other.mask).all())

    def __repr__(self) -> str:
        asked = self.info.get("selection", {}).get("n_edges") or 0
        taken = f"; {asked} were asked for" if self.n_edges < asked else ""
        return f"Circuit({self.n_edges} of {self.graph.n_edges} edges{taken}, {self.graph!r})"
