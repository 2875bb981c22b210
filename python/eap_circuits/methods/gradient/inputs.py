"""Gradients along the path between the two prompts' embeddings: `eap`, `eap-ig-inputs` and `clean-corrupted`.

The points are x' + α_k (x − x'). EAP (Syed et al. 2023, arXiv 2310.10348) takes the gradient at the clean prompt,
EAP-IG (Hanna et al. 2024, arXiv 2403.17806, eq. 4) integrates it along the path, clean-corrupted averages the ends.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ...forward import Batch
from ...recording import BothSides, ReceiverGradients, less_clean, record_both_sides, record_corrupted_side
from ..quadrature import Path
from ..spec import AttributionRequest
from ..statistics import BatchScores
from .method import GradientMethod, Passes, loss_of, run_along, weights_of


class InputsMethod(GradientMethod):
    """Gradients along the path between the embeddings."""

    streams: ClassVar[bool] = True

    def between_prompts(self, steps: int, quadrature: str) -> bool:
        return any(alpha != 1 for alpha, _ in self.path(steps, quadrature))

    def score(self, request: AttributionRequest, batch: Batch, passes: Passes) -> BatchScores:
        return score_along_inputs(request, batch, passes)


def score_along_inputs(request: AttributionRequest, batch: Batch, passes: Passes) -> BatchScores:
    """Scores of the batch's examples."""
    runner = request.runner(request.graph, batch)
    # Where the clean prompts are a point of the path, that pass comes first and is their only one.
    path = sorted(passes.path, reverse=True)
    shared = path[0][0] == 1.0
    side = (record_corrupted_side if shared else record_both_sides)(runner, request.constants)
    scores, senders = BatchScores(request, batch), side.senders
    measured = scores.measurement(side.clean_logits, side.corrupted_logits) if isinstance(side, BothSides) else None
    receivers = ReceiverGradients(runner, request.graph, passes.held, request.rules)

    def loss(logits: Tensor) -> Tensor:
        nonlocal measured
        points = logits.split(batch.n_examples)
        if measured is None:
            measured = scores.measurement(points[0], side.corrupted_logits)
        return loss_of(measured, points)

    def run(part: Path) -> None:
        nonlocal senders
        points = torch.cat([torch.lerp(side.corrupted_embeddings, side.clean_embeddings, a) for a, _ in part])
        run_pass = partial(receivers.run, points, weights_of(request, part), loss)
        if measured is None:
            senders, _ = less_clean(side, batch, run_pass)
        else:
            run_pass()

    run_along(path, passes, receivers, run, lambda: scores.add(senders, receivers))
    return scores
