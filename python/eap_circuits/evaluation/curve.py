"""Faithfulness against circuit size, and the two areas that sum it up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from ..capture import Progress
from ..errors import expected
from ..graph import Circuit, EdgeScores
from ..tasks import PairedDataset
from .evaluate import EvaluationResult, evaluate

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True, eq=False)
class Curve:
    """Circuits of growing size by the same scores, and their faithfulness.

    `fractions` are the shares of all edges asked for, `n_edges` the edges left after pruning.
    """

    fractions: tuple[float, ...]
    circuits: tuple[Circuit, ...]
    results: tuple[EvaluationResult, ...]

    @property
    def n_edges(self) -> tuple[int, ...]:
        return tuple(circuit.n_edges for circuit in self.circuits)

    @property
    def faithfulness(self) -> tuple[float, ...]:
        return tuple(result.faithfulness for result in self.results)

    @property
    def cpr(self) -> float:
        """Circuit performance ratio: the area under faithfulness over the fractions (MIB, arXiv 2504.13151)."""
        return _area(self.fractions, self.faithfulness)

    @property
    def cmd(self) -> float:
        """Circuit–model distance: the area between faithfulness and 1 over the fractions (MIB); 0 is best."""
        return _area(self.fractions, [abs(1 - f) for f in self.faithfulness])

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {
            "fractions": list(self.fractions),
            "n_edges": list(self.n_edges),
            "faithfulness": list(self.faithfulness),
            "mean": [result.mean for result in self.results],
            "clean": self.results[0].clean,
            "corrupted": self.results[0].corrupted,
            "cpr": self.cpr,
            "cmd": self.cmd,
        }

    def __repr__(self) -> str:
        return f"Curve({len(self.fractions)} circuits, cpr={self.cpr:.4g}, cmd={self.cmd:.4g})"


def faithfulness_curve(
    model: nn.Module,
    scores: EdgeScores,
    data: PairedDataset,
    fractions: Sequence[float] = FRACTIONS,
    metric: Any = "logit_diff",
    how: str = "top",
    signed: bool = False,
    ablation: str = "patching",
    batch_size: int | None = None,
    reuse_prefix: bool = True,
    progress: Progress | None = None,
) -> Curve:
    """Select circuits of several sizes and measure each one's faithfulness, all in one go over the data.

    Args:
        scores: edge scores of this model.
        fractions: shares of all edges, growing, each in (0, 1].
        how, signed: as in `EdgeScores.select` ("top" or "greedy").
        model, data, metric, ablation, batch_size, reuse_prefix, progress: as in `evaluate`.

    Raises:
        InputError: fractions that do not grow within (0, 1], or anything that `evaluate` or `select` refuses.
    """
    fractions = tuple(float(f) for f in fractions)
    grows = all(a < b for a, b in pairwise(fractions))
    if not fractions or not grows or not 0 < fractions[0] <= fractions[-1] <= 1:
        raise expected("fractions", "growing numbers in (0, 1]", fractions)
    circuits = tuple(scores.select(int(f * scores.graph.n_edges), how, signed) for f in fractions)
    results = evaluate(model, circuits, data, metric, ablation, batch_size, reuse_prefix, progress)
    return Curve(fractions, circuits, tuple(results))


def _area(x: Sequence[float], y: Sequence[float]) -> float:
    """The trapezoid rule between the first and the last fraction, as MIB has it."""
    points = list(zip(x, y, strict=True))
    return sum((b - a) * (p + q) / 2 for (a, p), (b, q) in pairwise(points))
