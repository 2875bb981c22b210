"""How sure the sign of an edge's score is, given its scores on single examples.

An edge whose sign depends on the examples drawn says little; `EdgeScores.select(among=confidence >= 0.95)` leaves such
edges out (Nikankin et al. 2025, arXiv 2510.25786). With few examples this leaves out many edges that matter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..edges import finite, numbers
from ..errors import SEEDS, expected, whole

_MOST_DRAWS = 10**6
_CHUNK = 2**22  # entries of the resampled means held at once


def bootstrap_confidence(values: Tensor, *, draws: int = 1000, seed: int = 0) -> Tensor:
    """The share of bootstrap resamples of the examples whose mean score has the sign of the mean over all examples.

    Args:
        values: [E, S, R] scores of each example, E ≥ 2.
        draws: how many resamples of E examples to draw, with replacement.
        seed: of the resamples, which are the same for every edge.

    Returns:
        float64 [S, R], from 0 to 1; 0 where the mean is 0, and hence where there is no edge.

    Raises:
        InputError: values without three dimensions, two examples or finite scores, or fewer than one draw.

    Example:
        >>> scores = eap.attribute(model, data, keep="examples")
        >>> sure = eap.bootstrap_confidence(scores.per_example) >= 0.95
    """
    values = numbers("values", values, ["E", "S", "R"])
    if len(values) < 2:
        raise expected("values", "shape [E, S, R] with at least 2 examples", list(values.shape))
    draws, seed = whole("draws", draws, 1, _MOST_DRAWS), whole("seed", seed, *SEEDS)
    if not finite(values):
        raise expected("values", "finite scores", "some that are not")
    n = len(values)
    picked = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(seed))
    weights = torch.zeros(draws, n, dtype=torch.float64).scatter_add_(
        1, picked, torch.full(picked.shape, 1 / n, dtype=torch.float64)
    )
    columns = values.flatten(1)
    shares = []
    for part in columns.split(max(1, _CHUNK // draws), dim=1):
        mean = part.double().mean(0)
        agree = (weights @ part.double()).sign() == mean.sign()
        shares.append(agree.double().mean(0).masked_fill(mean == 0, 0))
    return torch.cat(shares).view(values.shape[1:])


def normal_confidence(mean: Tensor, variance: Tensor, n_examples: int) -> Tensor:
    """The share of `bootstrap_confidence` in the limit of many examples: Φ(|mean| / √(variance / E)).

    Args:
        mean, variance: [S, R] of the scores over examples; the variance is divided by E, not E − 1, because resamples
            have that variance.
        n_examples: E ≥ 2.

    Returns:
        float64 [S, R], from ½ to 1; 0 where the mean is 0.

    Raises:
        InputError: different shapes, a variance below 0 or not a number, or fewer than two examples.

    Example:
        >>> scores = eap.attribute(model, data, keep="variance")
        >>> sure = eap.normal_confidence(scores.values, scores.variance, len(data)) >= 0.95
    """
    mean = numbers("mean", mean, ["S", "R"]).double()
    variance = numbers("variance", variance, list(mean.shape), ", that of the mean").double()
    n_examples = whole("n_examples", n_examples, 2)
    if not finite(mean) or not (variance >= 0).all():
        raise expected("mean and variance", "finite means and variances of 0 or more", "others")
    share: Tensor = torch.special.ndtr(mean.abs() / (variance / n_examples).sqrt())
    return share.masked_fill(mean == 0, 0)
