"""Where receivers read the residual stream: each layer's queries, keys, values and MLP, and the logits.

This is the only walk over them: code that reads, changes or checks a pass takes the sites from here.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..graph import Graph
from .architecture import Architecture
from .norms import Norm
from .projections import Projection


@dataclass(frozen=True)
class ReceiverSite:
    """A group of receivers that read the residual stream through one norm.

    Args:
        layer: the layer's index; for the logits, one past the last layer.
        name: "q", "k", "v", "mlp" or "logits".
        receivers: their indices in the graph.
        reach: how many senders they see.
        norm: the norm in front of them.
        projection: what reads the norm's output for each head; None for the MLP and the logits.
    """

    layer: int
    name: str
    receivers: slice
    reach: int
    norm: Norm
    projection: Projection | None = None

    @property
    def count(self) -> int:
        return self.receivers.stop - self.receivers.start

    @property
    def repeat_kv(self) -> int:
        """Receivers for each head of the projection: query heads that share a key or value head."""
        return self.count // self.projection.n_heads if self.projection else 1


def receiver_sites(arch: Architecture, graph: Graph) -> list[ReceiverSite]:
    """All sites, in the order of the graph's receivers."""
    sites = []
    for index, layer in enumerate(arch.layers):
        reach = graph.attention_reach(index)
        for letter in ("q", "k", "v"):
            receivers = graph.receivers_at(index, letter)
            sites.append(ReceiverSite(index, letter, receivers, reach, layer.attention_norm, layer.projections[letter]))
        sites.append(
            ReceiverSite(index, "mlp", graph.receivers_at(index, "mlp"), graph.mlp_reach(index), layer.mlp_norm)
        )
    final = ReceiverSite(len(arch.layers), "logits", graph.logits_receiver, graph.n_senders, arch.final_norm)
    return [*sites, final]
