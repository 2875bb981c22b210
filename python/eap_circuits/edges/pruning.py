"""Which edges of a set are on a path."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import Graph


def prune(graph: Graph, mask: Tensor) -> Tensor:
    """Remove all edges that are on no path from `input` to `logits`. bool [S, R] -> bool [S, R].

    A node stays if it has a kept edge going out and, except for `input`, one coming in; an edge stays if its sender's
    node and its receiver's node do (EAP-IG's rule; a key/value head's input belongs to its whole group).
    """
    mask = mask & graph.edge_mask
    while True:
        alive = mask.any(1) & graph.fed(mask)
        kept = mask & alive[:, None] & graph.read(alive)
        if torch.equal(kept, mask):
            return kept
        mask = kept
