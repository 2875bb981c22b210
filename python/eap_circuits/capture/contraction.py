"""The one place where senders meet receivers: S[u, v] += Σ_t ⟨Δ_u(t), gradient_v(t)⟩."""

from __future__ import annotations

import torch
from torch import Tensor

from eap_kernels import edge_scores

from .receivers import ReceiverGradients
from .senders import SenderDifferences

WORKSPACE = 256 * 2**20  # bytes for a tile of expanded senders and receivers


def contract(senders: SenderDifferences, receivers: ReceiverGradients) -> Tensor:
    """Edge scores of what has been accumulated, summed over the batch: float32 (or float64) [S, R]."""
    graph, example = senders.graph, senders.embedding
    reach = graph.reach.to(example.device)
    out = example.new_zeros(graph.n_senders, graph.n_receivers)
    per_row = (graph.n_senders + graph.n_receivers) * example.shape[1] * example.element_size()
    tile = max(1, WORKSPACE // per_row)
    with torch.no_grad():
        for start in range(0, senders.n_rows, tile):
            rows = slice(start, start + tile)
            edge_scores(senders.expand(rows), receivers.expand(rows), reach, out=out)
    return out
