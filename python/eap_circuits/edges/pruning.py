"""Which edges of a set are on a path."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .staircase import clear_beyond

if TYPE_CHECKING:
    from .layout import Graph


def prune(graph: Graph, mask: Tensor) -> Tensor:
    """Remove all edges that are on no path from `input` to `logits`. bool [S, R] -> bool [S, R].

    A node stays if it has a kept edge going out and, except for `input`, one coming in; an edge stays if its sender's
    node and its receiver's node do (EAP-IG's rule; a key/value head's input belongs to its whole group). Per-layer
    embeddings need none coming in either: paths start at all `Graph.sources`.
    """
    mask = mask.clone()
    clear_beyond(graph, mask)
    return on_paths(graph, mask)


def on_paths(graph: Graph, mask: Tensor) -> Tensor:
    """The same of a mask that has True only where nodes can have an edge, changed in place."""
    kept = mask.numpy()
    # Edges of nodes that break the rule are removed until none does: as edges lead from earlier to later nodes, what is
    # left is on paths. Only the edges' numbers are looked at, and of the edges only those that go.
    leaving, coming = np.count_nonzero(kept, 1), np.count_nonzero(kept, 0)
    while True:
        unfed = (leaving > 0) & ~graph.fed(torch.from_numpy(coming > 0)).numpy()
        coming -= np.count_nonzero(kept[unfed], 0)
        kept[unfed], leaving[unfed] = False, 0
        unread = (coming > 0) & ~graph.read(torch.from_numpy(leaving > 0)).numpy()
        leaving -= np.count_nonzero(kept[:, unread], 1)
        kept[:, unread], coming[unread] = False, 0
        if not unfed.any() and not unread.any():
            return mask
