"""Which edges of a set are on a path."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .layout import Graph


def prune(graph: Graph, mask: Tensor) -> Tensor:
    """Remove all edges that are on no path from `input` to `logits`. bool [S, R] -> bool [S, R].

    A node stays if it has a kept edge going out and, except for `input`, one coming in; an edge stays if its sender's
    node and its receiver's node do (EAP-IG's rule; a key/value head's input belongs to its whole group).
    """
    return on_paths(graph, mask & graph.edge_mask)


def on_paths(graph: Graph, mask: Tensor) -> Tensor:
    """The same of a mask that has True only where nodes can have an edge."""
    receivers, senders = graph.inputs_of
    steps = []  # (reach, the receivers that have it, and what node each of them feeds: receivers, senders), by depth
    for reach in graph.reach.unique().tolist():
        first, last = torch.searchsorted(graph.reach, torch.tensor([reach, reach + 1])).tolist()
        here = (first <= receivers) & (receivers < last)
        steps.append((reach, slice(first, last), receivers[here], senders[here]))
    fed = torch.zeros(graph.n_senders, dtype=torch.bool)  # on a path from `input`
    leads = torch.zeros_like(fed)  # on a path to `logits`
    read = torch.zeros(graph.n_receivers, dtype=torch.bool)  # on a path to `logits`
    fed[: graph.n_spans] = read[graph.logits_receiver] = True
    for reach, those, feeding, nodes in steps:
        given = torch.zeros_like(read)
        given[those] = mask[:reach, those][fed[:reach]].any(0)
        fed[nodes[given[feeding]]] = True
    for reach, those, feeding, nodes in reversed(steps):
        read[feeding[leads[nodes]]] = True
        leads[:reach] |= mask[:reach, those][:, read[those]].any(1)
    return mask & (fed & leads)[:, None] & read
