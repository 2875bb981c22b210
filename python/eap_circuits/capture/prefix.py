"""Keys and values of the tokens that clean and corrupted prompts share: run once, put before those of every pass.

Prefixes of different lengths end together: shorter ones have unused places before them, which `attention_mask` marks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .batches import Batch

# Tokens saved from which prefixes' own common beginning is run once for all, which takes one pass more.
_WORTH_A_PASS = 64


class Prefix:
    """The prefixes of a batch.

    Args:
        batch: the examples; each has a prefix or none has.
        ran: what a run of the prefixes, and maybe of more after them, left in its cache.
        which: int64 [E], the row of that run with each example's prefix.
        spread: how often the run's keys and values of each layer stand side by side.
    """

    def __init__(self, batch: Batch, ran: DynamicCache, which: Tensor, spread: list[int]) -> None:
        start, longest = batch.start, batch.prefix.shape[1]
        self._start = start
        self._aligned = bool((start == longest).all())
        # Place p of an example holds its token p - (longest - start).
        source = (torch.arange(longest, device=start.device) - (longest - start)[:, None]).clamp(min=0)

        def place(x: Tensor) -> Tensor:
            """[rows, G, at least P, K] -> [E, G, P, K], or [1, G, P, K] for all."""
            return x[:, :, :longest] if len(x) == 1 else x.transpose(1, 2)[which[:, None], source].transpose(1, 2)

        layers: Any = ran.layers
        kept = [(place(x.keys[:, ::n]), place(x.values[:, ::n])) for x, n in zip(layers, spread, strict=True)]
        self.cache = Cache(layers=[_Before(*pair) for pair in kept])
        self._longest = longest

    def arguments(self, suffix: int, copies: int) -> dict[str, Any]:
        """Arguments of the model's forward for `copies` of the batch's suffixes of so many tokens."""
        given: dict[str, Any] = {"past_key_values": self.cache, "use_cache": True}
        if not self._aligned:
            place = torch.arange(self._longest + suffix, device=self._start.device)
            used = place >= self._longest - self._start[:, None]
            given["attention_mask"] = used.long().repeat(copies, 1)
        return given


class _Before(DynamicLayer):
    """A layer's keys and values [E, G, P, K], or [1, ...] for all, before those of each pass, of which none is kept."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return _before(self.keys, key_states), _before(self.values, value_states)


def _before(kept: Tensor, new: Tensor) -> Tensor:
    """kept for every copy of the batch, and for every query head where `new` has them, then new."""
    (rows, groups), heads = kept.shape[:2], new.shape[1] // kept.shape[1]
    parts = new.view(-1, rows, groups, heads, *new.shape[2:])
    ahead = kept[:, :, None].expand(len(parts), -1, -1, heads, -1, -1)
    return torch.cat([ahead, parts], -2).view(len(new), groups * heads, -1, new.shape[3])


def run_prefixes(model: Any, prefixes: Tensor) -> DynamicCache:
    """The cache of a run of prefixes int64 [U, P], of which `beginning` ran alone where that pays."""
    cache, shared = beginning(model, prefixes)
    model(input_ids=prefixes[:, shared:], past_key_values=cache, use_cache=True)
    return cache


def beginning(model: Any, prefixes: Tensor) -> tuple[DynamicCache, int]:
    """The cache of the tokens with which all prefixes begin, and how many; none where a pass costs more."""
    cache = DynamicCache()
    shared = int((prefixes == prefixes[0]).all(0).cumprod(0).sum())
    if shared * (len(prefixes) - 1) < _WORTH_A_PASS or shared == prefixes.shape[1]:
        return cache, 0
    alone: Any = run_prefixes(model, prefixes[:1, :shared]).layers
    for index, layer in enumerate(alone):
        cache.update(*(x.expand(len(prefixes), -1, -1, -1) for x in (layer.keys, layer.values)), index)
    return cache, shared
