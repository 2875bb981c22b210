"""Conductance of edges along the path between the two prompts' embeddings (`eap-conductance`).

The conductance of a hidden unit (Dhamdhere et al. 2018, arXiv 1805.12233) is the integral of its own change times the
output's gradient with respect to it. Of an edge, with c_u(α) what the sender writes at the point x' + α (x − x'):

    S[u, v] = −Σ_t ∫ ⟨d c_u(t) / dα, ∂loss/∂x_v(t) at α⟩ dα,

where EAP-IG takes the sender's whole difference Δ_u at every point. Over any set of edges that separates `input` from
`logits` the scores add up to m(clean) − m(corrupted), except for the error of the sum over M segments. That sum is
the trapezoid rule: the gradients of a segment's two ends are averaged. The error falls with M².
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ...recording import ReceiverGradients, record_both_sides, record_contributions
from ..spec import AttributionRequest
from ..statistics import Contractions
from .method import GradientMethod, Passes, loss_of, weights_of


class ConductanceMethod(GradientMethod):
    """Each sender's own change along the path times the gradients there."""

    ablated: ClassVar[bool] = False
    planned: ClassVar[bool] = False
    replayed: ClassVar[bool] = False  # of two sets of receivers each is used again

    def between_prompts(self, steps: int, quadrature: str) -> bool:
        return True

    def score(self, request: AttributionRequest, scores: Contractions, passes: Passes) -> None:
        """The path has the segments' ends after α = 0.

        With half of each segment's gradient at either end, the gradient at point k meets ½ (c_u(k − 1) − c_u(k + 1)): a
        point's scores can be taken once the next has run. One point runs at a time.
        """
        graph, batch = request.graph, scores.batch
        runner = request.runner(graph, batch)
        sides = record_both_sides(runner)
        clean, corrupted = sides.clean_embeddings, sides.corrupted_embeddings

        measured = scores.measurement(sides.clean_logits, sides.corrupted_logits)

        def loss(x: Tensor) -> Tensor:
            return loss_of(measured, [x])

        weights = weights_of(request, [(1.0, 1.0)])
        spare, latest = (ReceiverGradients(runner, graph, 1, request.rules) for _ in range(2))
        before = here = None  # what senders write at the point before the latest, and there
        for alpha in (0.0, *(alpha for alpha, _ in passes.path)):
            point = torch.lerp(corrupted, clean, alpha)
            spare.clear()
            following = record_contributions(runner, point, partial(spare.run, point, weights, loss, alphas=[alpha]))
            if here is not None:
                scores.add((before or here).minus(following), latest, times=0.5)
            before, here = here, following
            spare, latest = latest, spare
        assert before is not None and here is not None, "a path has two ends"
        scores.add(before.minus(here), latest, times=0.5)
