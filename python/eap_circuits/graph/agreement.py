"""How much two circuits of a graph share, and how alike two scorings of its edges are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..errors import expected, flag, instance
from .checks import edge_flags
from .circuit import Circuit
from .scores import EdgeScores


@dataclass(frozen=True)
class Overlap:
    """How many edges or nodes two circuits have and share.

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
    """Edges in both circuits. Raises `InputError` if they are of different graphs."""
    _same_graph(first, second)
    return Overlap(first.n_edges, second.n_edges, int((first.mask & second.mask).sum()))


def node_overlap(first: Circuit, second: Circuit) -> Overlap:
    """Nodes in both circuits. Raises `InputError` if they are of different graphs."""
    _same_graph(first, second)
    a, b = set(first.nodes), set(second.nodes)
    return Overlap(len(a), len(b), len(a & b))


def edge_auroc(scores: EdgeScores, circuit: Circuit, *, signed: bool = False) -> float:
    """Area under the ROC curve of the scores as a classifier of a known circuit's edges.

    It is the probability that an edge of the circuit scores higher than one outside it; a tie counts half (the
    Mann–Whitney statistic). 1 finds the circuit exactly, ½ is chance. MIB uses it for models whose circuit is known by
    construction (InterpBench; arXiv 2504.13151, §3).

    Args:
        scores: of the same graph as the circuit.
        circuit: the known circuit, neither empty nor the whole graph.
        signed: rank by the score itself; by default by its absolute value.

    Raises:
        InputError: different graphs, scores that are not finite, or no edge inside or outside the circuit.
    """
    instance("scores", scores, EdgeScores)
    instance("circuit", circuit, Circuit)
    signed = flag("signed", signed)
    if scores.graph != circuit.graph:
        raise expected("circuit", f"one of {scores.graph!r}", f"one of {circuit.graph!r}")
    real = scores.graph.edge_mask
    values = scores.values[real].double()
    if not values.isfinite().all():
        raise expected("scores", "finite values", "some that are not")
    inside = circuit.mask[real]
    n_in, n_out = int(inside.sum()), int((~inside).sum())
    if not n_in or not n_out:
        raise expected("circuit", "edges inside and outside it", f"{n_in} inside, {n_out} outside")
    ranks = _ranks(values if signed else values.abs())
    return float((ranks[inside].sum() - n_in * (n_in + 1) / 2) / (n_in * n_out))


@dataclass(frozen=True)
class Agreement:
    """How alike two methods score the edges: Pearson's correlation of the scores, Spearman's of their ranks."""

    pearson: float
    spearman: float


def score_agreement(first: EdgeScores, second: EdgeScores, *, among: Tensor | None = None) -> Agreement:
    """Correlations of two scorings of the edges of one graph; NaN if either gives all edges the same score.

    Args:
        first, second: scores of the same graph.
        among: bool [S, R], the edges that count; by default all.

    Raises:
        InputError: different graphs, scores that are not finite, or a mask of another shape.
    """
    instance("first scores", first, EdgeScores)
    instance("second scores", second, EdgeScores)
    if first.graph != second.graph:
        raise expected("second scores", f"those of {first.graph!r}", f"those of {second.graph!r}")
    edges = first.graph.edge_mask
    if among is not None:
        edges = edges & edge_flags("among", among, first.graph)
    a, b = (scores.values[edges].double() for scores in (first, second))
    if not (a.isfinite().all() and b.isfinite().all()):
        raise expected("scores", "finite values", "some that are not")
    return Agreement(_correlation(a, b), _correlation(_ranks(a), _ranks(b)))


def _correlation(a: Tensor, b: Tensor) -> float:
    if not len(a):
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    norm = a.norm() * b.norm()
    return float(a @ b / norm) if norm else float("nan")


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1; equal values share their mean rank."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    ranks: Tensor = count.cumsum(0).double() - (count - 1) / 2
    return ranks[place]


def _same_graph(first: Circuit, second: Circuit) -> None:
    instance("first circuit", first, Circuit)
    instance("second circuit", second, Circuit)
    if first.graph != second.graph:
        raise expected("second circuit", f"one of {first.graph!r}", f"one of {second.graph!r}")
