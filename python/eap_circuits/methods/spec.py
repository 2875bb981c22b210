"""Attribution methods as data: what each computes, what it costs, how settled it is.

A gradient method's score is S[u, v] = Σ_t ⟨Δ_u(t), Σ_k w_k ∂loss/∂x_v(t) at point k⟩, the points being embeddings
x' + α_k (x − x'). EAP (Syed et al. 2023, arXiv 2310.10348) takes the gradient at the clean prompt, EAP-IG
(Hanna et al. 2024, arXiv 2403.17806, eq. 4) integrates it along the path, clean-corrupted averages the two ends.
The other methods score a batch in modules of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from . import activations, conductance, flow
from .gradient import Scorer, score_batch
from .quadrature import QUADRATURES, Path, right

Tier = Literal["stable", "experimental"]


@dataclass(frozen=True)
class Method:
    """An attribution method.

    Args:
        name: what it is called by.
        description: one line.
        passes: what it costs, in passes of the model over the data.
        tier: "stable": the definition will not change; "experimental": it may, with a note in the changelog.
        path: (steps, quadrature) -> path points and weights; None for "exact".
        scorer: how a batch is scored; None for "exact".
        published: the same by the published EAP-IG package's definition, where it is another (`compat="eap-ig"`).
        grids: takes `quadrature`; else its path has one grid.
        ablated: takes `ablation`s other than patching.
        planned: `plan` can tell what memory it takes, and `memory=` bounds it.
    """

    name: str
    description: str
    passes: str
    tier: Tier
    path: Callable[[int, str], Path] | None
    scorer: Scorer | None
    published: Scorer | None = None
    grids: bool = False
    ablated: bool = True
    planned: bool = False

    def scorer_of(self, compat: str | None) -> Scorer | None:
        """How a batch is scored, by the published package's definition where `compat` asks for it."""
        return self.published if compat and self.published else self.scorer

    @property
    def stepped(self) -> bool:
        """Does the path depend on `steps`?"""
        return self.path is not None and len(self.path(2, "right")) != len(self.path(3, "right"))


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "eap",
            "edge attribution patching: the gradient at the clean prompt",
            "2 forwards, 1 forward and backward",
            "stable",
            lambda steps, quadrature: [(1.0, 1.0)],
            score_batch,
            planned=True,
        ),
        Method(
            "eap-ig-inputs",
            "EAP with integrated gradients along the path between the two prompts' embeddings",
            "2 forwards, M forwards and backwards",
            "stable",
            lambda steps, quadrature: QUADRATURES[quadrature](steps),
            score_batch,
            grids=True,
            planned=True,
        ),
        Method(
            "eap-ig-activations",
            "EAP with integrated gradients along a path of each sender group's own activations",
            "3 forwards, about (L + 2)·M forwards and backwards",
            "stable",
            lambda steps, quadrature: QUADRATURES[quadrature](steps),
            activations.score_batch,
            partial(activations.score_batch, every_edge=True),
            grids=True,
            planned=True,
        ),
        Method(
            "clean-corrupted",
            "the mean of the gradients at the clean and at the corrupted prompt",
            "2 forwards, 2 forwards and backwards",
            "stable",
            lambda steps, quadrature: [(0.0, 0.5), (1.0, 0.5)],
            score_batch,
            planned=True,
        ),
        Method(
            "eap-conductance",
            "along the path between the embeddings, each sender's own change times the gradients there",
            "2 forwards, M + 1 forwards and backwards",
            "experimental",
            lambda steps, quadrature: right(steps),
            conductance.score_batch,
            ablated=False,
        ),
        Method(
            "information-flow-routes",
            "what share of a receiver's input each sender brings, without metric and gradients",
            "1 forward of the clean prompts",
            "stable",
            lambda steps, quadrature: [],
            flow.score_batch,
            ablated=False,
        ),
        Method(
            "exact",
            "patching each edge alone: what the gradient methods approximate",
            "2 forwards, and for each edge a forward from its receiver's layer on",
            "stable",
            None,
            None,
        ),
    )
}
