"""Where senders write to the residual stream, and where receivers read it.

These are the only walks over them: code that reads, changes or checks a pass takes the sites from here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..graph import Graph
from ..modules.norms import Norm
from ..modules.projections import Place, Projection
from .architecture import Architecture, Layer


@dataclass(frozen=True, eq=False)
class SenderSite:
    """A group of senders that write to the residual stream together: the token embeddings, a layer's heads or its MLP.

    A pass shows the embeddings, the heads' values or the MLP's output, [..., X]; their contribution is `written` of
    these, times `weight` for heads, or times `factor`.

    Args:
        index: of the site itself; sites are in the order of the graph's senders.
        senders: their indices in the graph.
        layer: the layer's index.
        module: its output, times `scale`, is added to the residual stream; None: the embeddings.
        scale: see `module`.
        heads: the layer whose heads they are; None: they are no heads.
        stream: which of the graph's streams they write to.
        begins: whether it is a stream's `input`. That of a decoder is all that its first layer reads, and the same for
            both prompts.
    """

    index: int
    senders: slice
    layer: int = 0
    module: nn.Module | None = None
    scale: float = 1.0
    heads: Layer | None = None
    stream: int = 0
    begins: bool = False

    @property
    def factor(self) -> float:
        """The scale, which of heads is part of `weight`."""
        return 1.0 if self.heads else self.scale

    def written(self, x: Tensor) -> Tensor:
        """Heads' values as `weight` takes them; of other senders x itself."""
        return self.heads.written(x) if self.heads else x

    def weight(self, dtype: torch.dtype, features: slice = slice(None)) -> Tensor | None:
        """Each head's way to the residual stream, [H, K, D], or to some of its D features."""
        return self.heads.out_weight(dtype, features) if self.heads else None


def sender_sites(arch: Architecture) -> list[SenderSite]:
    """All of them: the embeddings, then each layer's heads, if it has any, and its MLP, if it has one."""
    sites, graph = [SenderSite(0, slice(0, 1), begins=True)], arch.graph("kv")  # "query" has the same senders
    for index, layer in enumerate(arch.layers):
        stream = graph.stream_at(index)
        if 0 < index == arch.encoder:
            own, first = (
                slice(graph.input_senders[-1], graph.input_senders[-1] + 1),
                Place(layer.module, True, arch.d_model),
            )
            sites.append(SenderSite(len(sites), own, index, first, stream=stream, begins=True))
        # What a norm after attention writes is the heads' contribution.
        out = layer.out if layer.post_norm is None else layer.post_norm.module
        mlp = slice(graph.mlp_sender(index), graph.mlp_sender(index) + 1)
        if layer.n_heads:
            scale = layer.scale * layer.heads_scale
            sites.append(SenderSite(len(sites), graph.head_senders(index), index, out, scale, layer, stream))
        if graph.has_mlp(index):
            sites.append(SenderSite(len(sites), mlp, index, layer.mlp_out, layer.scale, stream=stream))
    return sites


@dataclass(frozen=True)
class ReceiverSite:
    """A group of receivers that read the residual stream through one norm.

    Args:
        layer: the layer's index; for the logits, one past the last layer.
        name: "mlp", "logits", or of a head's input, usually "q", "k" or "v".
        receivers: their indices in the graph.
        begin, reach: the first sender that they see, and one past the last.
        norm: the norm in front of them.
        projection: what reads the norm's output for each head; None for the MLP and the logits.
        stream: which of the graph's streams they read.
    """

    layer: int
    name: str
    receivers: slice
    begin: int
    reach: int
    norm: Norm
    projection: Projection | None = None
    stream: int = 0

    @property
    def count(self) -> int:
        return self.receivers.stop - self.receivers.start

    @property
    def repeat_kv(self) -> int:
        """Receivers for each head of the projection: query heads that share a key or value head."""
        return self.count // self.projection.n_heads if self.projection else 1


def receiver_sites(arch: Architecture, graph: Graph) -> list[ReceiverSite]:
    """All sites, in the order of the graph's receivers."""
    begins = [stream.senders.start for stream in graph.streams]

    def site(index: int, name: str, receivers: slice, reach: int, norm: Norm, of: Projection | None) -> ReceiverSite:
        stream = graph.stream_at(index, name)
        return ReceiverSite(index, name, receivers, begins[stream], reach, norm, of, stream)

    sites = []
    for index, layer in enumerate(arch.layers):
        for name, _ in graph.sites(index):
            where = graph.receivers_at(index, name), graph.reach_at(index, name)
            sites.append(site(index, name, *where, layer.read_through(name), layer.projections.get(name)))
    final = graph.logits_receiver, graph.n_senders, arch.final_norm
    return [*sites, site(len(arch.layers), "logits", *final, None)]
