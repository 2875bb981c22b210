"""What a curve is compared with: random circuits, and the complements of its circuits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..graph import Circuit, random_circuit
from .faithfulness import EvaluationResult

BASELINES = ("random", "complement")


@dataclass(frozen=True, eq=False)
class Baseline:
    """Other circuits at each of a curve's sizes: `circuits[draw][size]` and `results[draw][size]`.

    "random" has one draw for each seed, "complement" has one draw.
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


def baseline_circuits(name: str, circuits: Sequence[Circuit], seeds: Sequence[int]) -> tuple[tuple[Circuit, ...], ...]:
    """The baseline's circuits [draw][size] for selected circuits of growing size.

    "random": for each seed a random connected circuit with as many edges (`graph.random_circuit`). "complement": all
    other edges; if they are faithful, the circuit is incomplete (Wang et al. 2022, arXiv 2211.00593, §4).
    """
    if name == "complement":
        return (tuple(circuit.complement() for circuit in circuits),)
    return tuple(tuple(random_circuit(c.graph, c.n_edges, seed=seed) for c in circuits) for seed in seeds)


def cpr(fractions: Sequence[float], faithfulness: Sequence[float]) -> float:
    """∫ f(C_k) dk by the trapezoid rule over the measured fractions k; see `Curve.cpr`."""
    points = list(zip(fractions, faithfulness, strict=True))
    return sum((b - a) * (p + q) / 2 for (a, p), (b, q) in pairwise(points))


def cmd(fractions: Sequence[float], faithfulness: Sequence[float]) -> float:
    """∫ |1 − f(C_k)| dk by the same rule; see `Curve.cmd`."""
    return cpr(fractions, [abs(1 - f) for f in faithfulness])
