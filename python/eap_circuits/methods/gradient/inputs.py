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
from ...recording import (
    BothSides,
    ReceiverGradients,
    WithinHeads,
    less_clean,
    record_both_sides,
    record_corrupted_side,
)
from ...request import Measurement
from ..quadrature import Path
from ..spec import KEEP, AttributionRequest
from ..statistics import Contractions
from .method import GradientMethod, Passes, loss_of, run_along, weights_of


class InputsMethod(GradientMethod):
    """Gradients along the path between the embeddings."""

    keeps: ClassVar[tuple[str, ...]] = KEEP

    def between_prompts(self, steps: int, quadrature: str) -> bool:
        return any(alpha != 1 for alpha, _ in self.path(steps, quadrature))

    def score(self, request: AttributionRequest, scores: Contractions, passes: Passes) -> None:
        score_along_inputs(request, scores, passes)


def score_along_inputs(request: AttributionRequest, scores: Contractions, passes: Passes) -> None:
    """Add the scores along the path."""
    along = InputPasses(request, scores.batch, passes)

    def contract() -> None:
        scores.add(along.senders, along.receivers)

    run_along(along.path, passes, along.receivers, along.run, contract)
    scores.include(along.measured)
    if along.within_heads is not None:
        scores.within_heads = along.within_heads.sums


class InputPasses:
    """A batch's passes along its path, and what they leave on the device.

    Attributes:
        path: the points, in the order in which they are to run.
        senders: their differences; complete after the first pass.
        receivers: the gradients of the passes that have run.
        within_heads: their scores inside heads, if these are kept.
    """

    def __init__(self, request: AttributionRequest, batch: Batch, passes: Passes) -> None:
        self._request, self._batch = request, batch
        runner = request.runner(request.graph, batch)
        # Where the clean prompts are a point of the path, that pass comes first and is their only one.
        self.path = sorted(passes.path, reverse=True)
        shared = self.path[0][0] == 1.0
        self._side = side = (record_corrupted_side if shared else record_both_sides)(runner, request.constants)
        self.senders = side.senders
        self._measured: Measurement | None = None
        if isinstance(side, BothSides):
            self._measured = Measurement(request, batch, side.clean_logits, side.corrupted_logits)
        self.receivers = ReceiverGradients(runner, request.graph, passes.held, request.rules)
        self.within_heads: WithinHeads | None = None
        if "within-heads" in request.keep:
            spans = len(request.data.span_names) + 1
            self.within_heads = WithinHeads(runner, request.graph, request.constants, spans)

    @property
    def measured(self) -> Measurement:
        """The metric of the passes that have run."""
        assert self._measured is not None
        return self._measured

    def run(self, part: Path) -> None:
        """One pass over some points of the path."""
        side = self._side
        alphas = [alpha for alpha, _ in part]
        points = torch.cat([torch.lerp(side.corrupted_embeddings, side.clean_embeddings, a) for a in alphas])
        weights = weights_of(self._request, part)
        after = None if self.within_heads is None else partial(self.within_heads.register, weights)
        run_pass = partial(self.receivers.run, points, weights, self._loss, alphas=alphas, after=after)
        if self._measured is None:
            self.senders, _ = less_clean(side, self._batch, run_pass)
        else:
            run_pass()

    def _loss(self, logits: Tensor) -> Tensor:
        points = logits.split(self._batch.n_examples)
        if self._measured is None:
            self._measured = Measurement(self._request, self._batch, points[0], self._side.corrupted_logits)
        return loss_of(self._measured, points)
