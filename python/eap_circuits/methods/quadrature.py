"""Grids of integrated gradients: the points of the path from corrupted to clean, and their weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Path = list[tuple[float, float]]  # (α_k, w_k)


def right(steps: int) -> Path:
    """α = k/M, k = 1..M: the paper's grid."""
    return [(k / steps, 1 / steps) for k in range(1, steps + 1)]


def left(steps: int) -> Path:
    """α = k/M, k = 0..M−1: the published package's grid, version 2."""
    return [(k / steps, 1 / steps) for k in range(steps)]


def midpoint(steps: int) -> Path:
    """α = (k − ½)/M, k = 1..M; the error falls with M²."""
    return [((k + 0.5) / steps, 1 / steps) for k in range(steps)]


def gauss_legendre(steps: int) -> Path:
    """Gauss–Legendre nodes on [0, 1]; exact for polynomials up to degree 2M − 1."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    return [(float(x + 1) / 2, float(w) / 2) for x, w in zip(nodes, weights, strict=True)]


QUADRATURES: dict[str, Callable[[int], Path]] = {
    "right": right,
    "left": left,
    "midpoint": midpoint,
    "gauss-legendre": gauss_legendre,
}
