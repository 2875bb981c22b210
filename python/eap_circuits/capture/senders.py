"""Contribution differences Δ of every sender, kept in head space until they are needed (DESIGN (c))."""

from __future__ import annotations

import torch
from torch import Tensor

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

    @property
    def n_rows(self) -> int:
        return len(self.embedding)

    def expand(self, rows: slice) -> Tensor:
        """Δ of some rows in the residual stream: [S, n, D]."""
        first = self.embedding[rows]
        delta = first.new_empty(self.graph.n_senders, *first.shape)
        delta[0] = first
        for index, (layer, values, mlp) in enumerate(zip(self.arch.layers, self.values, self.mlps, strict=True)):
            heads = self.graph.head_senders(index)
            weight = layer.out_weight(first.dtype)  # [H, K, D]
            z = values[rows].unflatten(1, weight.shape[:2]).transpose(0, 1)  # [H, n, K]
            torch.bmm(z, weight, out=delta[heads])
            delta[self.graph.mlp_sender(index)] = mlp[rows]
        return delta
