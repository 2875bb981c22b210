"""Gates of circuits: from one number for every edge, and a size, to a mask with a gradient.

An edge's place a is about the logarithm of the inverse share of edges at which it enters the circuit: of a ranking by
which the i-th of n edges stands at log(n / i), the circuit of k edges are those above log(n / k). How far above or
below that threshold it stands gives the log-odds of its gate, which is drawn from one of `GATES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SOFTNESS, NOISE = 0.4, 0.3  # how far from the threshold gates are half open, and are moved at random, in places
LOW, HIGH = -0.1, 1.1  # hard-concrete gates are stretched to this interval and cut off at 0 and 1


def hard_concrete(log_odds: Tensor, uniform: Tensor) -> Tensor:
    """Sigmoids with logistic noise, stretched and cut off (Louizos et al. 2018, arXiv 1712.01312)."""
    noise = NOISE / SOFTNESS * uniform.logit()
    return (torch.sigmoid(log_odds + noise) * (HIGH - LOW) + LOW).clamp(0, 1)


def uniform_window(log_odds: Tensor, uniform: Tensor) -> Tensor:
    """Uniform between 0 and 1 with the probability w = θ(1 − θ), where θ is an edge's probability; else 1 or 0, such
    that the mean is θ (Li & Janson 2024, arXiv 2409.09951).

    A gate between has the slope 1/w in θ. So the mean gradient in θ is the mean difference that the whole edge makes.
    """
    kept = torch.sigmoid(log_odds)
    window = (kept * torch.sigmoid(-log_odds)).detach().clamp(min=torch.finfo(kept.dtype).tiny)
    return ((kept - uniform) / window + 0.5).clamp(0, 1)


@dataclass(frozen=True)
class Gates:
    """How open edges of a circuit are while it is learned.

    Args:
        name: what they are called.
        description: one line.
        draw: (edges' log-odds, numbers drawn evenly from 0 to 1) -> gates, differentiable in the log-odds.
    """

    name: str
    description: str
    draw: Callable[[Tensor, Tensor], Tensor]


GATES: dict[str, Gates] = {
    gates.name: gates
    for gates in (
        Gates("hard-concrete", "a soft step with noise, as in Edge Pruning", hard_concrete),
        Gates("uniform", "kept, cut, or anything between alike, as in uniform gradient sampling", uniform_window),
    )
}


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


def open_gates(
    places: Tensor,
    sizes: Sequence[int],
    generator: torch.Generator | None,
    sharpness: float = 1,
    gates: str = "hard-concrete",
) -> Tensor:
    """Gates [C, n] of circuits of these sizes, differentiable in the places [n]; without a generator, without noise.

    `gates` is a name in `GATES`. Both softness and noise are divided by the sharpness.
    """
    log_odds = (places - thresholds(places, sizes)[:, None]) * sharpness / SOFTNESS
    uniform = torch.full_like(log_odds, 0.5)
    if generator is not None:
        uniform = torch.rand(log_odds.shape, generator=generator, dtype=torch.float32).clamp(1e-6, 1 - 1e-6)
    return GATES[gates].draw(log_odds, uniform)
