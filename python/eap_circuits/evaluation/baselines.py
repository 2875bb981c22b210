"""What a curve is compared with: random circuits, and the complements of its circuits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..graph import Circuit, random_circuit
from .faithfulness import EvaluationResult


@dataclass(frozen=True)
class Baseline:
    """Other circuits at each of a curve's sizes: `circuits[draw][size]` and `results[draw][size]`.

    Circuits that are not drawn at random have one draw.
    """

    fractions: tuple[float, ...]
    circuits: tuple[tuple[Circuit, ...], ...]
    results: tuple[tuple[EvaluationResult, ...], ...]

    @property
    def draws(self) -> tuple[tuple[float, ...], ...]:
        """Faithfulness as [draw][size]."""
        return tuple(tuple(result.faithfulness for result in row) for row in self.results)

    @property
    def faithfulness(self) -> tuple[float, ...]:
        """Mean over the draws, for each size."""
        return tuple(sum(column) / len(column) for column in zip(*self.draws, strict=True))

    @property
    def cpr(self) -> float:
        """The draws' mean circuit performance ratio; see `Curve.cpr`."""
        return sum(cpr(self.fractions, row) for row in self.draws) / len(self.draws)

    @property
    def cmd(self) -> float:
        """The draws' mean circuit–model distance; see `Curve.cmd`."""
        return sum(cmd(self.fractions, row) for row in self.draws) / len(self.draws)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        draws = [list(row) for row in self.draws]
        return {"faithfulness": list(self.faithfulness), "draws": draws, "cpr": self.cpr, "cmd": self.cmd}


@dataclass(frozen=True)
class OtherCircuits:
    """Circuits that a curve is compared with.

    Args:
        name: what they are called by.
        description: one line.
        title: what tables and figures call them.
        of: (a circuit of the curve, seed) -> the circuit that it is compared with.
        drawn: at random, once for each seed.
    """

    name: str
    description: str
    title: str
    of: Callable[[Circuit, int], Circuit]
    drawn: bool = False

    def circuits(self, circuits: Sequence[Circuit], seeds: Sequence[int]) -> tuple[tuple[Circuit, ...], ...]:
        """Those of circuits of growing size: [draw][size]."""
        return tuple(tuple(self.of(c, seed) for c in circuits) for seed in (seeds if self.drawn else (0,)))


BASELINES: dict[str, OtherCircuits] = {
    baseline.name: baseline
    for baseline in (
        OtherCircuits(
            "random",
            "random connected circuits with as many edges, one for each seed",
            "random circuits",
            lambda circuit, seed: random_circuit(circuit.graph, circuit.n_edges, seed=seed),
            drawn=True,
        ),
        # Wang et al. 2022, arXiv 2211.00593, §4
        OtherCircuits(
            "complement",
            "all other edges; if they are faithful, the circuit is incomplete",
            "all other edges",
            lambda circuit, seed: circuit.complement(),
        ),
    )
}


def cpr(fractions: Sequence[float], faithfulness: Sequence[float]) -> float:
    """∫ f(C_k) dk by the trapezoid rule over the measured fractions k, NaN for a single one; see `Curve.cpr`."""
    points = list(zip(fractions, faithfulness, strict=True))
    if len(points) < 2:
        return float("nan")
    return sum((b - a) * (p + q) / 2 for (a, p), (b, q) in pairwise(points))


def cmd(fractions: Sequence[float], faithfulness: Sequence[float]) -> float:
    """∫ |1 − f(C_k)| dk by the same rule; see `Curve.cmd`."""
    return cpr(fractions, [abs(1 - f) for f in faithfulness])
