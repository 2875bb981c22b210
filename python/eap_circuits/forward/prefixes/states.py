"""States that a model's cache holds beside keys and values: of state spaces, linear attention and short convolutions.

A state is that behind the last token that ran. So each length that prefixes have fills a cache of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

_States = dict[int, Tensor | None]  # a layer's, by number
# Where transformers has no such layer, no pass can go on from states.
_StatesLayer: Any = getattr(cache_utils, "LinearAttentionLayer", object)


def holds_states(layer: object) -> bool:
    """Does this layer of a cache?"""
    return hasattr(layer, "recurrent_states")


def cache_with_states(model: Any) -> Cache:
    """The model's own cache, except that attention keeps all keys and values, also those beyond its window."""
    both: Any = getattr(cache_utils, "LinearAttentionAndFullAttentionLayer", None)
    layers: list[Any] = DynamicCache(config=model.config).layers
    for index, layer in enumerate(layers):
        if isinstance(layer, DynamicLayer):
            states = getattr(layer, "number_of_states", None)
            layers[index] = DynamicLayer() if states is None else both(number_of_states=states)
    return Cache(layers=layers)


def put_together(parts: Sequence[tuple[Tensor, Cache]], rows: int) -> Cache:
    """One cache of so many rows, from caches of some rows each, int64 [n]. Rows of none hold zeros."""
    whole = parts[0][1]
    for index, layer in enumerate(whole.layers):
        each = [(which, vars(cache.layers[index])) for which, cache in parts]
        for name in ("keys", "values", "conv_states", "recurrent_states"):
            held = getattr(layer, name, None)
            if isinstance(held, Tensor):
                setattr(layer, name, _by_row([(which, of[name]) for which, of in each], rows))
            elif held is not None:
                numbers = [number for number, x in held.items() if x is not None]
                found = {n: _by_row([(which, of[name][n]) for which, of in each], rows) for n in numbers}
                setattr(layer, name, {**held, **found})
    return whole


def _by_row(parts: Sequence[tuple[Tensor, Tensor]], rows: int) -> Tensor:
    """[n, ..., tokens, X] of some rows each -> [rows, ..., most tokens, X], right padded; states are equally large."""
    most = max((x for _, x in parts), key=lambda x: x.shape[-2])
    whole = most.new_zeros(rows, *most.shape[1:])
    for which, x in parts:
        whole[which.to(x.device), ..., : x.shape[-2], :] = x
    return whole


def _picked(states: _States, rows: Tensor) -> _States:
    return {number: None if x is None else x[rows.to(x.device)] for number, x in states.items()}


class GoesOn(_StatesLayer):
    """The states of a cache's layer, [E, ...], for copies of a batch. A pass goes on from them; what it leaves is
    dropped.

    Args:
        layer: the cache's layer.
        which: int64 [E], the row that holds each example's.
        copies: how many copies of the batch pass side by side.
    """

    def __init__(self, layer: Any, which: Tensor, copies: int) -> None:
        super().__init__(number_of_states=layer.number_of_states)
        self.has_previous_state = layer.has_previous_state
        self.conv_states = _picked(layer.conv_states, which.repeat(copies))
        self.recurrent_states = _picked(layer.recurrent_states, which.repeat(copies))

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
        """What the convolution reads: what came before, then the pass's own."""
        before = self.conv_states[state_idx]
        assert before is not None
        return torch.cat([before, conv_states], -1)

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
        """Nothing is kept."""
        return recurrent_states
