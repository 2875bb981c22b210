"""Gates of circuits: from one number for every edge, and a size, to a mask with a gradient.

An edge's place a is about the logarithm of the inverse share of edges at which it enters the circuit: of a ranking by
which the i-th of n edges stands at log(n / i), the circuit of k edges are those above log(n / k). Its gates are drawn
from a hard-concrete distribution (Louizos et al. 2018, arXiv 1712.01312) around that threshold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SOFTNESS, NOISE = 0.4, 0.3  # how far from the threshold gates are half open, and are moved at random, in places
LOW, HIGH = -0.1, 1.1  # gates are stretched to this interval and cut off at 0 and 1


def starting_places(scores: Tensor) -> Tensor:
    """Places of edges by their absolute scores [n]; of equal scores the first is the strongest."""
    n = len(scores)
    order = scores.abs().argsort(descending=True, stable=True)
    places = torch.empty(n, dtype=torch.float32)
    places[order] = -torch.log(torch.arange(1, n + 1, dtype=torch.float32) / n)
    return places


def thresholds(places: Tensor, sizes: Sequence[int]) -> Tensor:
    """What this many of the places [n] exceed: halfway between those of the last edge inside and the first outside."""
    ordered = places.detach().sort(descending=True).values
    last = torch.tensor(sizes).clamp(1, len(places)) - 1
    return (ordered[last] + ordered[(last + 1).clamp(max=len(places) - 1)]) / 2


def draw_sizes(count: int, smallest: int, largest: int, generator: torch.Generator) -> list[int]:
    """One size from each of `count` equal parts of the logarithms between the two."""
    part = (torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float32)) / count
    return [round(math.exp(math.log(smallest) + x * math.log(largest / smallest))) for x in part.tolist()]


def open_gates(places: Tensor, sizes: Sequence[int], generator: torch.Generator | None, sharpness: float = 1) -> Tensor:
    """Gates [C, n] of circuits of these sizes, differentiable in the places [n]; without a generator, without noise.

    Both softness and noise are divided by the sharpness.
    """
    above = places - thresholds(places, sizes)[:, None]
    if generator is not None:
        uniform = torch.rand(above.shape, generator=generator, dtype=torch.float32).clamp(1e-6, 1 - 1e-6)
        above = above + NOISE / sharpness * uniform.logit()
    return (torch.sigmoid(above * sharpness / SOFTNESS) * (HIGH - LOW) + LOW).clamp(0, 1)
