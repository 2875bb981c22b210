"""Grids of integrated gradients: the points of the path from corrupted to clean, and their weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Path = list[tuple[float, float]]  # (α_k, w_k)


@dataclass(frozen=True)
class Quadrature:
    """A grid of integrated gradients.

    Args:
        name: what it is called by.
        description: one line.
        points: steps M -> the path's points and weights.
    """

    name: str
    description: str
    points: Callable[[int], Path]


def right(steps: int) -> Path:
    return [(k / steps, 1 / steps) for k in range(1, steps + 1)]


def _gauss_legendre(steps: int) -> Path:
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    return [(float(x + 1) / 2, float(w) / 2) for x, w in zip(nodes, weights, strict=True)]


QUADRATURES: dict[str, Quadrature] = {
    quadrature.name: quadrature
    for quadrature in (
        Quadrature("right", "α = k/M, k = 1 … M: the paper's", right),
        Quadrature(
            "left",
            "α = k/M, k = 0 … M − 1: the published package's, version 2",
            lambda steps: [(k / steps, 1 / steps) for k in range(steps)],
        ),
        Quadrature(
            "midpoint",
            "α = (k − ½)/M, k = 1 … M; the error falls with M²",
            lambda steps: [((k + 0.5) / steps, 1 / steps) for k in range(steps)],
        ),
        Quadrature(
            "gauss-legendre",
            "Gauss–Legendre nodes; exact for polynomials up to degree 2M − 1",
            _gauss_legendre,
        ),
    )
}
