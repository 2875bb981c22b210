"""EAP-IG along paths of activations (Hanna et al. 2024, arXiv 2403.17806; `eap-ig-activations`).

There is a path for each of the 2L + 1 groups of senders: the input embedding, each layer's heads, each layer's MLP. At
its point α the clean prompts run with the whole group's contribution replaced by corrupted + α (clean − corrupted); all
of a layer's heads move together. The edges of a sender take the gradients of its own group's path:

    S[u, v] = Σ_t ⟨Δ_u(t), Σ_k w_k ∂loss/∂x_v(t) at point k of the path of u's group⟩.

The published package adds every path's gradients to every edge and divides by the number of paths (`every_edge`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...adapters import SenderSite, sender_sites
from ...intervention import record_paths
from ...recording import ReceiverGradients
from ..quadrature import Path
from ..spec import AttributionRequest
from ..statistics import Contractions
from .inputs import score_along_inputs
from .method import GradientMethod, Passes, loss_of, run_along, weights_of


class ActivationsMethod(GradientMethod):
    """Gradients along a path of each group of senders."""

    def repeated(self, request: AttributionRequest) -> Path:
        if _every_edge(request):
            return request.path
        # The clean prompts are a point of every group's path: one pass over them is that point of all.
        return [point for point in request.path if point[0] != 1.0] or request.path

    def times_added(self, request: AttributionRequest) -> int:
        return 1 + len(sender_sites(request.arch))

    def score(self, request: AttributionRequest, scores: Contractions, passes: Passes) -> None:
        clean = [point for point in passes.path if point[0] == 1.0 and not _every_edge(request)]
        if clean:
            score_along_inputs(request, scores, Passes(clean, 1, 1))
        path = [point for point in passes.path if point not in clean]
        if path:
            _add_groups(request, scores, passes._replace(path=path))


def _every_edge(request: AttributionRequest) -> bool:
    return request.compat == "eap-ig"


def _add_groups(request: AttributionRequest, scores: Contractions, passes: Passes) -> None:
    """Add the scores along the groups' paths.

    A run starts at its group's layer, from the clean run's residual stream: what comes before is the clean run.
    """
    graph, batch, every_edge = request.graph, scores.batch, _every_edge(request)
    runner = request.runner(graph, batch)
    paths = record_paths(runner, request.constants, every_edge, request.sent)
    sides, groups = paths.sides, paths.sides.senders.sites

    measured = scores.measurement(sides.clean_logits, sides.corrupted_logits)

    def loss(logits: Tensor) -> Tensor:
        return loss_of(measured, logits.split(batch.n_examples))

    def add_group(group: SenderSite) -> None:
        since = group.senders.start
        if every_edge:
            # In the package input embeddings are constants on their own path: what reads only them has no gradient.
            since = 1 if group.module is None and paths.only_tokens else 0
        receivers = ReceiverGradients(runner, graph, passes.held, request.rules, since)
        readers = slice(int((graph.reach <= since).sum()), None)  # the last ones of the graph

        def run(part: Path) -> None:
            alphas = [alpha for alpha, _ in part]
            start, watch = paths.embeddings(group, alphas), paths.watch(group, alphas)
            receivers.run(start, weights_of(request, part), loss, watch)

        def contract() -> None:
            reach = graph.reach[readers]
            if every_edge:
                whole = slice(None), readers
                scores.add(sides.senders, receivers, reach, whole, 1 / len(groups))
            else:
                own = replace(sides.senders, sites=[group])
                seen = torch.full_like(reach, group.senders.stop - group.senders.start)
                scores.add(own, receivers, seen, (group.senders, readers))

        run_along(passes.path, passes, receivers, run, contract)

    for group in groups:
        add_group(group)
