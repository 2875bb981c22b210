"""How much two circuits of one graph share."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import expected
from .circuit import Circuit


@dataclass(frozen=True)
class Overlap:
    """Counts of what two circuits share, and the shares they make up.

    `iou` is intersection over union; `of_first` and `of_second` are the share of each circuit that the other has.
    """

    n_first: int
    n_second: int
    n_shared: int

    @property
    def iou(self) -> float:
        return self.n_shared / max(self.n_first + self.n_second - self.n_shared, 1)

    @property
    def of_first(self) -> float:
        return self.n_shared / max(self.n_first, 1)

    @property
    def of_second(self) -> float:
        return self.n_shared / max(self.n_second, 1)


def edge_overlap(first: Circuit, second: Circuit) -> Overlap:
    """Edges in both circuits. Raises `InputError` when they are of different graphs."""
    _same_graph(first, second)
    return Overlap(first.n_edges, second.n_edges, int((first.mask & second.mask).sum()))


def node_overlap(first: Circuit, second: Circuit) -> Overlap:
    """Nodes in both circuits. Raises `InputError` when they are of different graphs."""
    _same_graph(first, second)
    a, b = set(first.nodes), set(second.nodes)
    return Overlap(len(a), len(b), len(a & b))


def _same_graph(first: Circuit, second: Circuit) -> None:
    if first.graph != second.graph:
        raise expected("second circuit", f"one of {first.graph!r}", f"one of {second.graph!r}")
