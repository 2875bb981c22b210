"""Contribution differences Δ of every sender, kept in head space until they are needed (DESIGN (c))."""

from __future__ import annotations

import torch
from torch import Tensor

from eap_kernels import Nodes

from ..adapters import Architecture
from ..graph import Graph
from .borrow import Hooks
from .runner import Runner


class SenderDifferences:
    """Δ_u = corrupted − clean contribution of every sender at the batch's rows.

    A head's contribution is its values times its slice of the output projection; only the difference of the values
    is kept: per token L·(H·K + D) + D numbers instead of S·D. Also holds what the two runs gave besides:
    `clean_embeddings`, `corrupted_embeddings` [E, T, D] and `clean_logits`, `corrupted_logits` [E, V].
    """

    def __init__(self, runner: Runner, graph: Graph) -> None:
        self.arch: Architecture = runner.arch
        self.graph = graph
        batch = runner.batch
        self.clean_embeddings, self.corrupted_embeddings = (
            runner.embed(batch.clean),
            runner.embed(batch.corrupted),
        )
        dtype = self.arch.accumulate

        def difference(both: Tensor) -> Tensor:
            corrupted, clean = both.detach().flatten(0, 1).chunk(2)  # [2E, T, X] -> [E·T, X] each
            return corrupted[batch.rows].to(dtype) - clean[batch.rows].to(dtype)

        self.embedding = difference(torch.cat([self.corrupted_embeddings, self.clean_embeddings]))  # [n, D]
        self.values: list[Tensor] = []  # per layer [n, H·K]
        self.mlps: list[Tensor] = []  # per layer [n, D]

        def register(hooks: Hooks) -> None:
            for layer in self.arch.layers:
                hooks.on_input(layer.out, lambda z: self.values.append(difference(z)))
                hooks.on_output(layer.mlp, lambda y: self.mlps.append(difference(y)))

        with torch.no_grad():
            logits = runner.logits(torch.cat([self.corrupted_embeddings, self.clean_embeddings]), register)
        self.corrupted_logits, self.clean_logits = logits.chunk(2)

    def nodes(self) -> list[Nodes]:
        """The senders, in the graph's order."""
        nodes = [Nodes(self.embedding[:, None])]
        for layer, values, mlp in zip(self.arch.layers, self.values, self.mlps, strict=True):
            weight = layer.out_weight(values.dtype)  # [H, K, D]
            nodes += [Nodes(values.unflatten(1, weight.shape[:2]), weight), Nodes(mlp[:, None])]
        return nodes
