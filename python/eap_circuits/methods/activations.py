"""EAP-IG along paths of activations (Hanna et al. 2024, arXiv 2403.17806; `eap-ig-activations`).

There is a path for each of the 2L + 1 groups of senders: the input embedding, each layer's heads, each layer's MLP. At
its point α the clean prompts run with the whole group's contribution replaced by corrupted + α (clean − corrupted); all
of a layer's heads move together. The edges of a sender take the gradients of its own group's path:

    S[u, v] = Σ_t ⟨Δ_u(t), Σ_k w_k ∂loss/∂x_v(t) at point k of the path of u's group⟩.

The published package adds every path's gradients to every edge and divides by the number of paths (`every_edge`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..forward import Batch
from ..graph import Graph
from ..intervention import record_paths
from ..recording import ReceiverGradients
from ..request import Run
from .gradient import chunks, contracted, loss_of, points_held, steps_at_once
from .gradient import score_batch as score_along_inputs
from .quadrature import Path
from .statistics import BatchScores


def score_batch(
    run: Run,
    graph: Graph,
    path: Path,
    batch: Batch,
    tokens: int,
    held: int | None = None,
    phase: Callable[[], None] | None = None,
    every_edge: bool = False,
) -> BatchScores:
    """Scores of the batch's examples.

    A run starts at its group's layer, from the clean run's residual stream: what comes before is the clean run.
    `phase` is called after the passes over each chunk of a group's path, and after its contraction.
    """
    clean = [point for point in path if point[0] == 1.0 and not every_edge]
    if not clean:
        scores = BatchScores(run, graph, batch)
    else:
        # The clean prompts are a point of every group's path: EAP's one pass is that point of all of them.
        path = [point for point in path if point[0] != 1.0]
        scores = score_along_inputs(run, graph, clean, batch, tokens, held, None if path else phase)
        if not path:
            return scores
    runner = run.runner(graph, batch)
    paths = record_paths(runner, run.constants, through=every_edge)
    sides, groups = paths.sides, paths.sides.senders.sites
    held = held or points_held(run, batch, len(path))
    size = min(steps_at_once(batch, len(path), tokens), held)

    def loss(logits: Tensor) -> Tensor:
        return loss_of(run, batch, logits.split(batch.n_examples), sides.clean_logits, sides.corrupted_logits)

    for group in groups:
        since = group.senders.start
        if every_edge:
            # The package's input embeddings are constants on their own path: what reads nothing else has no gradient.
            since = 1 if group.module is None and paths.only_tokens else 0
        receivers = ReceiverGradients(runner, graph, held, run.rules, since)
        readers = graph.reach > since  # the last ones of the graph
        for together in chunks(path, held):
            for part in chunks(together, size):
                alphas, weights = torch.tensor(part, dtype=torch.float64).T
                receivers.run(paths.embeddings(group, alphas), weights, loss, paths.watch(group, alphas))
            with contracted(receivers, phase):
                reach = graph.reach[readers]
                if every_edge:
                    whole = slice(None), readers
                    scores.add(sides.senders.nodes(), receivers.nodes(), reach, whole, 1 / len(groups))
                else:
                    own = sides.senders.at(group)
                    seen = torch.full_like(reach, own.values.shape[1])
                    scores.add([own], receivers.nodes(), seen, (group.senders, readers))
    return scores
