"""Gradients along the path between the two prompts' embeddings: `eap`, `eap-ig-inputs` and `clean-corrupted`.

The points are x' + α_k (x − x'). EAP (Syed et al. 2023, arXiv 2310.10348) takes the gradient at the clean prompt,
EAP-IG (Hanna et al. 2024, arXiv 2403.17806, eq. 4) integrates it along the path, clean-corrupted averages the ends.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..forward import Batch
from ..recording import ReceiverGradients, SenderDifferences
from .gradient import GradientMethod, Passes, chunks, contraction, loss_of
from .spec import AttributionRequest
from .statistics import BatchScores


class InputsMethod(GradientMethod):
    """Gradients along the path between the embeddings."""

    def score(self, request: AttributionRequest, batch: Batch, passes: Passes) -> BatchScores:
        return score_along_inputs(request, batch, passes)


def score_along_inputs(request: AttributionRequest, batch: Batch, passes: Passes) -> BatchScores:
    """Scores of the batch's examples."""
    runner = request.runner(request.graph, batch)
    # Where the clean prompts are a point of the path, that pass comes first and is their only one.
    path = sorted(passes.path, reverse=True)
    shared = path[0][0] == 1.0
    senders = SenderDifferences(runner, request.graph, clean=not shared, constants=request.constants)
    corrupted, clean = senders.corrupted_embeddings, senders.clean_embeddings
    receivers = ReceiverGradients(runner, request.graph, passes.held, request.rules)

    def loss(logits: Tensor) -> Tensor:
        points = logits.split(batch.n_examples)
        if senders.clean_logits is None:
            senders.clean_logits = points[0].detach()
        return loss_of(request, batch, points, senders.clean_logits, senders.corrupted_logits)

    scores = BatchScores(request, batch)
    for held in chunks(path, passes.held):
        for part in chunks(held, passes.together):
            points = torch.cat([torch.lerp(corrupted, clean, alpha) for alpha, _ in part])
            watch = senders.register_clean if senders.clean_logits is None else None
            receivers.run(points, torch.tensor([weight for _, weight in part]), loss, watch)
        with contraction(receivers):
            scores.add(senders.nodes(), receivers.nodes())
    return scores
