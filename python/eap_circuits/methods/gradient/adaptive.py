"""Gradients along a path that the model's own output bends (`eap-gp`: Zhang et al. 2025, arXiv 2502.06852, eq. 8).

The straight path of EAP-IG may lead through regions where the metric hardly changes. GradPath begins at the clean
prompt's embeddings, γ_0 = x, and at each point goes a step of length 1 down the squared distance between the model's
logits there and those of the corrupted prompt:

    γ_k = γ_{k−1} − g / ‖g‖,  g = ∂‖G(γ_{k−1}) − G(x')‖² / ∂γ,  k = 1 … M.

The gradients of the M points are averaged. G are the logits at the scored positions, and ‖g‖ is taken over all of a
prompt's tokens, so prefixes that both prompts share move, too, and are not run once for all.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ...budget import end_of_phase
from ...forward import Batch, Runner
from ...recording import ReceiverGradients, record_both_sides
from ..spec import AttributionRequest
from ..statistics import Contractions
from .method import GradientMethod, Passes, loss_of, run_along, weights_of


class AdaptiveMethod(GradientMethod):
    """Gradients along a path down the distance from the corrupted prompt's logits."""

    reuses: ClassVar[bool] = False

    def between_prompts(self, steps: int, quadrature: str) -> bool:
        return True

    def score(self, request: AttributionRequest, scores: Contractions, passes: Passes) -> None:
        """Of the path's points only the weights count."""
        batch = scores.batch
        runner = request.runner(request.graph, batch)
        side = record_both_sides(runner, request.constants)
        measured = scores.measurement(side.clean_logits, side.corrupted_logits)
        points = list(zip(_descent(request, batch, side.clean_embeddings, len(passes.path)), passes.path, strict=True))
        end_of_phase()

        def loss(logits: Tensor) -> Tensor:
            return loss_of(measured, logits.split(batch.n_examples))

        receivers = ReceiverGradients(runner, request.graph, passes.held, request.rules)

        def run(part: list[tuple[Tensor, tuple[float, float]]]) -> None:
            weights = weights_of(request, [weighted for _, weighted in part])
            receivers.run(torch.cat([point for point, _ in part]), weights, loss)

        run_along(points, passes, receivers, run, lambda: scores.add(side.senders, receivers))


def _descent(request: AttributionRequest, batch: Batch, clean: Tensor, steps: int) -> list[Tensor]:
    """γ_1 … γ_M, each [E, T, D], from the clean prompts' embeddings on."""
    runner = Runner(request.arch, request.graph, batch)  # all tokens' logits, whatever the metric looks at
    here, points = clean.to(request.arch.accumulate), []
    with torch.no_grad():
        goal = runner.logits(runner.embed(batch.corrupted), None, 1).to(here.dtype)
    for _ in range(steps):
        here.requires_grad_()
        apart = (runner.logits(here.to(clean.dtype)).to(here.dtype) - goal).square().sum()
        (slope,) = torch.autograd.grad(apart, here)
        # Where the logits are the corrupted prompt's already, there is nowhere to go.
        length = slope.flatten(1).norm(dim=1)[:, None, None]
        here = here.detach() - torch.where(length > 0, slope / length, 0)
        points.append(here.to(clean.dtype))
    return points
