"""Run a batch through the model: embeddings in, logits at the scored positions out, shared prefixes from the cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import Architecture, concatenate, group
from ..graph import Graph
from .batches import Batch
from .borrow import Hooks
from .prefix import Prefix


class Runner:
    """The model as a function of the suffix's embeddings.

    Args:
        arch: the bound model.
        graph: its edge graph; with query-head receivers under grouped-query attention, keys and values are given
            to attention per query head (the value is the same, the gradient and the mask are per head).
    """

    def __init__(self, arch: Architecture, graph: Graph, batch: Batch) -> None:
        self.arch = arch
        self.batch = batch
        self.spread = [
            layer.groups if graph.heads == "query" else 1 for layer in arch.layers
        ]  # key/value copies per layer
        self._model: Any = arch.model
        accepted = inspect.signature(self._model.forward).parameters
        self._keep, self._place = "logits_to_keep" in accepted, "position_ids" in accepted
        self._prefix = None
        if batch.prefix.shape[1]:
            # As a tensor: an integer slices, and a batched product with a slice reads the weights for every example.
            first = {"logits_to_keep": torch.zeros(1, dtype=torch.int64, device=arch.device)} if self._keep else {}
            self._prefix = Prefix(self._model, batch, first)

    def embed(self, tokens: Tensor) -> Tensor:
        """What the tokens' embeddings write to the residual stream: int64 [E, T] -> [E, T, D], without gradient."""
        with torch.no_grad():
            return self.arch.embed(tokens)

    def projection_sites(self, index: int) -> Iterator[tuple[nn.Module, dict[str, slice]]]:
        """Each projection module of a layer, with its features for "q", "k" or "v", concatenated and spread."""
        for module, sites in self.arch.layers[index].projection_modules.items():
            columns, start = {}, 0
            for letter, projection in sites.items():
                stop = start + projection.width * (1 if letter == "q" else self.spread[index])
                columns[letter] = slice(start, stop)
                start = stop
            yield module, columns

    def logits(self, embeddings: Tensor, register: Callable[[Hooks], None] | None = None, corrupted: int = 0) -> Tensor:
        """Logits at the scored positions: [m·E, T, D] -> [m·E, V], for m copies of the batch, one after another.

        `register` adds hooks for this run. Those on a projection see its output concatenated and spread. The first
        `corrupted` copies are the corrupted prompts, scored at their own positions.
        """
        copies = embeddings.shape[0] // self.batch.n_examples
        own, clean = self.batch.corrupted_scored, self.batch.scored
        scored = torch.cat([own.repeat(corrupted), clean.repeat(copies - corrupted)])
        positions, which = scored.unique(return_inverse=True)
        given: dict[str, Any] = {"use_cache": False}
        if self._prefix is not None:
            given = self._prefix.arguments(embeddings.shape[1], copies)
            if self._place:
                offset = torch.arange(embeddings.shape[1], device=scored.device)
                # Padding may reach beyond the positions that a model has.
                last = self.batch.start + torch.maximum(clean, own)
                given["position_ids"] = (self.batch.start[:, None] + offset).minimum(last[:, None]).repeat(copies, 1)
        if self._keep:
            given["logits_to_keep"] = positions
        inputs = embeddings if self.arch.embedding_scale == 1 else embeddings / self.arch.embedding_scale
        with Hooks(tokens=embeddings.shape[1]) as hooks:
            if self.arch.embedding_norm is not None:
                hooks.on_output(self.arch.embedding_norm, lambda _: embeddings)
            self._arrange(hooks)
            if register is not None:
                register(hooks)
            self._restore(hooks)
            out = self._model(inputs_embeds=inputs, **given).logits
        if out.shape[1] == 1:
            return out.squeeze(1)  # a view, whose backward costs nothing
        return out[torch.arange(len(out), device=out.device), which if self._keep else scored]

    def _arrange(self, hooks: Hooks) -> None:
        """Projections give their features concatenated, keys and values spread."""
        for layer, spread in zip(self.arch.layers, self.spread, strict=True):
            for change in layer.per_query_head() if spread > 1 else ():
                hooks.set_attribute(*change)
            for module, projections in layer.projection_modules.items():
                if layer.grouped or spread > 1:
                    hooks.on_output(module, partial(concatenate, projections, layer.grouped, spread))

    def _restore(self, hooks: Hooks) -> None:
        """Attention gets them in the order it knows."""
        for layer, spread in zip(self.arch.layers, self.spread, strict=True):
            if layer.grouped:
                hooks.on_output(layer.q.module, partial(group, layer.projections, spread))
