"""The two residual streams of an encoder-decoder, each with its own tokens.

Every edge is in one of them: a sender writes to one stream, and a receiver reads one. The keys and values of
cross-attention read what the encoder has written, at its tokens, so paths from one stream to the other lead through
the decoder's heads.

The encoder's nodes are `enc.input`, `enc.a{l}.h{h}` and `enc.m{l}`, the decoder's `dec.input`, `dec.a{l}.h{h}`
(self-attention), `dec.n{l}` (where a norm of the stream stands between the two), `dec.x{l}.h{h}` (cross-attention) and
`dec.m{l}`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..errors import expected

if TYPE_CHECKING:
    from .layout import Graph


class Stream(NamedTuple):
    """A residual stream.

    Args:
        senders: what writes to it; the first is its `input`.
        receivers: what reads it, a slice or int64 [r].
        reach: int64 [r], how many of these senders each of these receivers sees.
    """

    senders: slice
    receivers: slice | Tensor
    reach: Tensor


def streams_of(graph: Graph) -> tuple[Stream, ...]:
    """`Graph.streams`."""
    if not graph.encoder:
        return (Stream(slice(0, graph.n_senders), slice(0, graph.n_receivers), graph.reach),)
    reads = torch.ones(graph.n_receivers, dtype=torch.int64)  # which stream
    for layer in range(graph.n_layers):
        for site, _ in graph.sites(layer):
            reads[graph.receivers_at(layer, site)] = graph.stream_at(layer, site)
    first, found = graph.input_senders[-1], []
    for number, senders in enumerate((slice(0, first), slice(first, graph.n_senders))):
        receivers = (reads == number).nonzero()[:, 0]
        found.append(Stream(senders, receivers, graph.reach[receivers] - senders.start))
    return tuple(found)


def names_of(graph: Graph, layer: int) -> tuple[str, str]:
    """What a layer's heads, and what its MLP or other block, are called: "a3" and "m3", or "p3"."""
    if not graph.encoder:
        number, block = graph.numbers[layer], "p" if graph.per_layer and graph.per_layer[layer] else "m"
        letter = chr(ord("a") + layer - graph.first_beside(layer))
        return f"{letter}{number}", f"{block}{number}"
    if layer < graph.encoder:
        return f"enc.a{layer}", f"enc.m{layer}"
    own = (layer - graph.encoder) // 2
    return (f"dec.x{own}", f"dec.m{own}") if graph.crosses(layer) else (f"dec.a{own}", f"dec.n{own}")


def layer_name(graph: Graph, layer: int) -> str:
    """What pictures call a layer: "layer 3", "p3" of per-layer embeddings, "b3" of heads beside, and whose."""
    heads, block = names_of(graph, layer)
    apart = graph.encoder or graph.first_beside(layer) != layer
    return heads if apart else block.replace("m", "layer ")


def check_one_stream(what: str, graph: Graph) -> None:
    """Refuse an encoder-decoder's graph."""
    if graph.encoder:
        raise expected(what, "a graph of one residual stream", "an encoder-decoder's")
