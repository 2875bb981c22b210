"""Does the model expect the answers as they are spelled, or with their leading space added or left out?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .functions import at_least_float32, of_answers

FAR = 10  # this many times likelier counts as far likelier


def misspelled(logits: Tensor, answers: Tensor, variants: Tensor) -> Tensor:
    """How much likelier an answer's variant is, where it is far likelier and not far less likely than all answers.

    Args:
        logits: [E, V] of the clean prompts.
        answers: int64 [E, 2] or [E, 2, A], as of `MetricBatch`.
        variants: of the same shape, the same words with or without a leading space; -1 where there is none.

    Returns:
        float [E, 2]: how many times likelier the variants of the good and of the bad answers are; 0 where not far.
    """
    values = at_least_float32(logits)
    here, there = (of_answers(values, ids, -torch.inf).logsumexp(2) for ids in (answers, variants))
    relevant = there > here.logsumexp(1, keepdim=True) - math.log(FAR)
    return (there - here).exp().where(relevant & (there - here > math.log(FAR)), 0)
