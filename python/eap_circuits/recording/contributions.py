"""Contribution differences Δ of every sender, kept in head space until they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from eap_kernels import Nodes

from ..adapters import Architecture, Layer
from ..forward import Constants, Hooks, Runner, at_tokens
from ..graph import Graph


class SenderDifferences:
    """Δ_u = ablated − clean contribution of every sender at the batch's rows.

    A head's contribution is its values times its slice of the output projection; only the difference of the values
    is kept: per token L·(H·K + D) + D numbers instead of S·D. Also holds what the two runs gave besides:
    `clean_embeddings` and (aligned) `corrupted_embeddings` [E, T, D] and `clean_logits`, `corrupted_logits` [E, V].

    Args:
        runner: the model on one batch.
        graph: its edge graph.
        clean: run the clean prompts too. Without, a later pass over them, which `register_clean` is to watch,
            completes the differences, and `clean_logits` are for its caller to set.
        constants: what the ablated senders give, if not what they give in the corrupted run.
        watch: adds hooks to the pass, in which the clean prompts come after the corrupted ones.
    """

    def __init__(
        self,
        runner: Runner,
        graph: Graph,
        clean: bool = True,
        constants: Constants | None = None,
        watch: Callable[[Hooks], None] | None = None,
    ) -> None:
        self.arch: Architecture = runner.arch
        self.graph = graph
        self._batch = batch = runner.batch
        self.clean_embeddings, own = runner.embed(batch.clean), runner.embed(batch.corrupted)
        self.values: list[Tensor] = []  # per layer [n, H·K]
        self.mlps: list[Tensor] = []  # per layer [n, D]

        def begin(x: Tensor) -> None:
            self.corrupted_embeddings = batch.aligned_input(own, x[: batch.n_examples])

        def keep_values(layer: Layer, constant: Tensor | None, z: Tensor) -> None:
            self.values.append(self._difference(layer.written(z), constant))

        def keep_mlp(layer: Layer, constant: Tensor | None, y: Tensor) -> None:
            self.mlps.append(self._difference(y, constant) * layer.scale)

        def register(hooks: Hooks) -> None:
            hooks.on_input(self.arch.layers[0].module, begin)
            for index, layer in enumerate(self.arch.layers):
                values, mlp = (None, None) if constants is None else (constants.values[index], constants.mlps[index])
                hooks.on_input(layer.out, partial(keep_values, layer, values))
                hooks.on_output(layer.mlp_out, partial(keep_mlp, layer, mlp))
            if watch is not None:
                watch(hooks)

        runs = [own, self.clean_embeddings] if clean else [own]
        self.corrupted_logits, *logits = runner.record(torch.cat(runs), register, 1).split(batch.n_examples)
        self.clean_logits: Tensor | None = logits[0] if clean else None
        ablated = self.corrupted_embeddings if constants is None else at_tokens(constants.embedding, batch)
        (self.embedding,) = self._rows(ablated) - self._rows(self.clean_embeddings)  # [n, D]

    def register_clean(self, hooks: Hooks) -> None:
        """Watch a pass whose first copy of the batch is the clean prompts."""
        for layer, values, mlp in zip(self.arch.layers, self.values, self.mlps, strict=True):
            hooks.on_input(layer.out, partial(self._subtract_values, layer, values))
            hooks.on_output(layer.mlp_out, partial(self._subtract, mlp, layer.scale))

    def _rows(self, x: Tensor) -> Tensor:
        """[m·E, T, X] -> [m, n, X] at the batch's rows, in the accumulation dtype; may share memory with x."""
        return self._batch.active(x).to(self.arch.accumulate)

    def _difference(self, x: Tensor, constant: Tensor | None) -> Tensor:
        if self._batch.alignment is not None:
            x = torch.cat([self._batch.aligned(x[: self._batch.n_examples]), x[self._batch.n_examples :]])
        ablated, *clean = self._rows(x)
        if constant is not None:
            (ablated,) = self._rows(at_tokens(constant, self._batch))
        return ablated - clean[0] if clean else ablated.clone()  # later changed in place

    def _subtract_values(self, layer: Layer, corrupted: Tensor, z: Tensor) -> None:
        self._subtract(corrupted, 1.0, layer.written(z[: self._batch.n_examples].detach()))

    def _subtract(self, corrupted: Tensor, scale: float, x: Tensor) -> None:
        corrupted.sub_(self._rows(x[: self._batch.n_examples])[0], alpha=scale)

    def nodes(self) -> Iterator[Nodes]:
        """The senders, in the graph's order, each made when it is asked for: its weights may be a copy."""
        return (self.group(index) for index in range(1 + 2 * len(self.arch.layers)))

    def group(self, index: int) -> Nodes:
        """One of `nodes`: the embedding, then each layer's heads and its MLP."""
        if index == 0:
            return Nodes(self.embedding[:, None])
        layer, is_mlp = divmod(index - 1, 2)
        if is_mlp:
            return Nodes(self.mlps[layer][:, None])
        return heads_of(self.arch.layers[layer], self.values[layer])


def heads_of(layer: Layer, values: Tensor) -> Nodes:
    """A layer's heads, given their values [n, H·K]."""
    weight = layer.out_weight(values.dtype)  # [H, K, D]
    return Nodes(values.unflatten(1, weight.shape[:2]), weight)


class Contributions:
    """Every sender's contribution at the batch's rows in one pass, in head space, without gradient.

    Args:
        runner: the model on one batch.
        embeddings: what the pass starts with, [E, T, D].
    """

    def __init__(self, runner: Runner, embeddings: Tensor) -> None:
        self._arch, self._batch = runner.arch, runner.batch
        self.embedding = self._rows(embeddings)  # [n, D]
        self.values: list[Tensor] = []  # per layer [n, H·K]
        self.mlps: list[Tensor] = []  # per layer [n, D]

    def watch(self, hooks: Hooks) -> None:
        """Record the pass that has these hooks."""
        for layer in self._arch.layers:
            hooks.on_input(layer.out, partial(self._keep_values, layer))
            hooks.on_output(layer.mlp_out, partial(self._keep_mlp, layer))

    def less(self, other: Contributions) -> list[Nodes]:
        """The senders' differences, this pass's contributions less another's, in the graph's order."""
        nodes = [Nodes((self.embedding - other.embedding)[:, None])]
        for index, layer in enumerate(self._arch.layers):
            heads = heads_of(layer, self.values[index] - other.values[index])
            nodes += [heads, Nodes((self.mlps[index] - other.mlps[index])[:, None])]
        return nodes

    def _rows(self, x: Tensor) -> Tensor:
        # A copy: some models add to the MLP's output in place.
        return self._batch.active(x)[0].to(self._arch.accumulate, copy=True)

    def _keep_values(self, layer: Layer, z: Tensor) -> None:
        self.values.append(self._rows(layer.written(z.detach())))

    def _keep_mlp(self, layer: Layer, y: Tensor) -> None:
        self.mlps.append(self._rows(y) * layer.scale)
