"""A graph's edges, a block of senders at a time: whoever looks at all of a large graph need not copy all of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .layout import Graph

_ENTRIES = 2**20  # of a block: few enough to stay in a processor's cache


class Block(NamedTuple):
    """The edges of the senders `rows`; `columns` are the receivers from the first that any of them reaches to the last.

    Block after block, flattened, the edges come in the order of the whole mask's. `none` bool [rows, k]: which entries
    of the first k columns are no edges; all other entries are.
    """

    rows: slice
    columns: slice
    none: Tensor


def blocks(graph: Graph) -> Iterator[Block]:
    if graph.spans is not None or graph.encoder:  # whose edges are no staircase
        yield Block(slice(0, graph.n_senders), slice(0, graph.n_receivers), ~graph.edge_mask)
        return
    reach, first = graph.reach, 0  # which grows from receiver to receiver
    while first < graph.n_senders:
        start = int(torch.searchsorted(reach, first, right=True))
        stop = min(first + max(1, _ENTRIES // (graph.n_receivers - start)), graph.n_senders)
        inside = int(torch.searchsorted(reach, stop))
        none = torch.arange(first, stop)[:, None] >= reach[start:inside]
        yield Block(slice(first, stop), slice(start, graph.n_receivers), none)
        first = stop


def beyond(graph: Graph, mask: Tensor) -> tuple[int, int] | None:
    """The first (sender, receiver) of a bool mask [S, R] that is no edge, or None."""
    for rows, columns, none in blocks(graph):
        before, near = mask[rows, : columns.start], mask[rows, columns][:, : none.shape[1]] & none
        if before.any() or near.any():
            u, v = torch.cat([before, near], 1).nonzero()[0].tolist()
            return rows.start + u, v
    return None


def clear_beyond(graph: Graph, mask: Tensor) -> None:
    """Set what is no edge to False, in place."""
    for rows, columns, none in blocks(graph):
        mask[rows, : columns.start] = False
        mask[rows, columns][:, : none.shape[1]] &= ~none
