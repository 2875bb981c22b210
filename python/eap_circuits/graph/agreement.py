"""How much two circuits of a graph share, and how alike two scorings of its edges are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..edges import edge_flags, finite
from ..errors import expected, flag, instance
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
    """Edges in both circuits. Raises `InputError` if they are of different graphs.

    Example:
        >>> shared = eap.edge_overlap(circuit, other_circuit).n_shared
    """
    of_one_graph(Circuit, {"first circuit": first, "second circuit": second})
    return Overlap(first.n_edges, second.n_edges, int((first.mask & second.mask).sum()))


def node_overlap(first: Circuit, second: Circuit) -> Overlap:
    """Nodes in both circuits. Raises `InputError` if they are of different graphs.

    Example:
        >>> shared = eap.node_overlap(circuit, other_circuit).n_shared
    """
    of_one_graph(Circuit, {"first circuit": first, "second circuit": second})
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

    Example:
        >>> eap.edge_auroc(scores, scores.select(20))  # 1: the circuit holds the strongest edges
    """
    instance("scores", scores, EdgeScores)
    instance("circuit", circuit, Circuit)
    signed = flag("signed", signed)
    if scores.graph != circuit.graph:
        raise expected("circuit", f"one of {scores.graph!r}", f"one of {circuit.graph!r}")
    real = scores.graph.edge_mask
    values = scores.values[real].double()
    if not finite(values):
        raise expected("scores", "finite values", "some that are not")
    inside = circuit.mask[real]
    n_in, n_out = int(inside.sum()), int((~inside).sum())
    if not n_in or not n_out:
        raise expected("circuit", "edges inside and outside it", f"{n_in} inside, {n_out} outside")
    rank = ranks(values if signed else values.abs())
    return float((rank[inside].sum() - n_in * (n_in + 1) / 2) / (n_in * n_out))


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

    Example:
        >>> agreement = eap.score_agreement(scores, other_scores)
    """
    of_one_graph(EdgeScores, {"first scores": first, "second scores": second})
    edges = first.graph.edge_mask
    if among is not None:
        edges = edges & edge_flags("among", among, first.graph)
    a, b = (scores.values[edges].double() for scores in (first, second))
    if not (finite(a) and finite(b)):
        raise expected("scores", "finite values", "some that are not")
    return agreement_of(a, b)


def agreement_of(a: Tensor, b: Tensor) -> Agreement:
    """Of two scorings of n edges, float64 [n] each."""
    return Agreement(_correlation(a, b), _correlation(ranks(a), ranks(b)))


def diff(first: EdgeScores, second: EdgeScores) -> EdgeScores:
    """How much each edge's score grows from the first scores to the second: base model and tuned one, two checkpoints,
    two kinds of prompts, two methods.

    The result is scores: `top_edges`, `select`, `plot` and `confidence` serve as they do for others.

    Args:
        first, second: scores of the same graph. With `keep="variance"` or `"examples"` the difference has error bars:
            from the pairs' own differences if both have `per_example` of the same data, else as of independent data.

    Raises:
        InputError: different graphs.

    Example:
        >>> change = eap.diff(eap.attribute(base, data, keep="examples"), eap.attribute(tuned, data, keep="examples"))
        >>> change.select(200, among=change.confidence() >= 0.95).plot()
    """
    of_one_graph(EdgeScores, {"first scores": first, "second scores": second})
    infos = [first.info, second.info]
    methods = sorted({str(info.get("method")) for info in infos})
    info: dict[str, Any] = {"method": " and ".join(methods), "difference": infos}
    info["additive"] = all(each.get("additive", True) for each in infos)
    counts = [info["n_examples"] for info in infos if "n_examples" in info]
    examples = variance = None
    one, other = (info.get("data_sha256") for info in infos)
    if one is not None and one == other and first.per_example is not None and second.per_example is not None:
        examples = second.per_example - first.per_example
        variance = examples.var(0, correction=0)
    elif first.variance is not None and second.variance is not None and len(counts) == 2:
        # That of the mean over the smaller number of examples.
        variance = min(counts) * (first.variance / counts[0] + second.variance / counts[1])
    if variance is not None:
        info["n_examples"] = min(counts)
    return EdgeScores(first.graph, second.values - first.values, info, variance, examples)


def _correlation(a: Tensor, b: Tensor) -> float:
    if not len(a):
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    norm = a.norm() * b.norm()
    return float(a @ b / norm) if norm else float("nan")


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1, float64 [n]; equal values share their mean rank."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    ranks: Tensor = count.cumsum(0).double() - (count - 1) / 2
    return ranks[place]


def of_one_graph(kind: type, named: Mapping[str, Any]) -> None:
    """Refuse what is not of this kind, or of another graph than the first."""
    graph = None
    for name, each in named.items():
        instance(name, each, kind)
        graph = graph or each.graph
        if each.graph != graph:
            of = "one" if kind is Circuit else "those"
            raise expected(name, f"{of} of {graph!r}", f"{of} of {each.graph!r}")
