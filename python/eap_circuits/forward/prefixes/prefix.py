"""What tokens that clean and corrupted prompts share leave in a model's cache: computed once and put before every pass.

Keys and values of prefixes are padded on the left, so that all end together; `attention_mask` marks the padding.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ..batches import Batch
from .states import GoesOn, cache_with_states, holds_states, put_together

# What `forward` calls the cache: the first name since transformers 5.24, the second before and in other models' code,
# the third before where there are only states (Mamba-2).
_CACHE_NAMES = ("cache", "past_key_values", "cache_params")


def parameters(model: Any) -> set[str]:
    """The names of the parameters of the model's forward, even if a subclass's forward only passes them on."""
    forwards = [model.forward, *(vars(kind)["forward"] for kind in type(model).__mro__ if "forward" in vars(kind))]
    found = (set(inspect.signature(forward).parameters) for forward in forwards)
    return next((names for names in found if "inputs_embeds" in names), set())


def behind(model: Any, cache: Cache) -> dict[str, Any]:
    """Arguments of the model's forward that make it run behind a cache."""
    taken = parameters(model)
    name = next((name for name in _CACHE_NAMES if name in taken), _CACHE_NAMES[1])
    return {name: cache, "use_cache": True}


class Prefix:
    """The prefixes of a batch.

    Args:
        batch: the examples.
        ran: the cache that a run of the prefixes has filled; if it holds no states, perhaps of tokens after them, too.
        which: int64 [E], the row of that run that holds each example's prefix.
        repeat_kv: how many copies of each layer's keys and values that cache holds side by side.
    """

    def __init__(self, batch: Batch, ran: Cache, which: Tensor, repeat_kv: list[int]) -> None:
        start, longest = batch.start, batch.prefix.shape[1]
        self._start = start
        # Place p of an example holds its token p - (longest - start).
        source = (torch.arange(longest, device=start.device) - (longest - start)[:, None]).clamp(min=0)

        def place(x: Tensor) -> Tensor:
            """[rows, G, at least P, K] -> [E, G, P, K], or [1, G, P, K] for all."""
            if len(x) == 1:
                return x[:, :, :longest]
            return x.transpose(1, 2)[which[:, None].to(x.device), source.to(x.device)].transpose(1, 2)

        # Of a layer without states only what is kept stays, as the run's own keys and values take as much again.
        self._which = which
        self._layers: list[tuple[Any, Any]] = []
        for layer, n in zip(ran.layers, repeat_kv, strict=True):
            keys, values = (getattr(layer, name, None) for name in ("keys", "values"))
            kept = None if keys is None or values is None else _Before(place(keys[:, ::n]), place(values[:, ::n]))
            self._layers.append((layer, kept) if holds_states(layer) else (None, kept or layer))
        self._longest = longest
        # Where all layers hold states, nothing can look at places without a token.
        self._masked = not batch.known.even and any(isinstance(kept, _Before) for _, kept in self._layers)

    def arguments(self, model: Any, suffix: int, copies: int) -> dict[str, Any]:
        """Arguments of the model's forward for `copies` of the batch's suffixes of this many tokens."""
        given = behind(model, Cache(layers=[self._ahead(layer, kept, copies) for layer, kept in self._layers]))
        if self._masked:
            place = torch.arange(self._longest + suffix, device=self._start.device)
            used = place >= self._longest - self._start[:, None]
            given["attention_mask"] = used.long().repeat(copies, 1)
        return given

    def _ahead(self, layer: Any, kept: Any, copies: int) -> Any:
        """What a pass goes on from, in place of the layer of the cache that was filled."""
        if layer is None:
            return kept
        if kept is None:
            return GoesOn(layer, self._which, copies)
        return _Both(layer, self._which, copies, kept.keys, kept.values)


class _Before(DynamicLayer):
    """A layer's keys and values [E, G, P, K], or [1, ...] for all, put before those of each pass; these are dropped."""

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
    """`kept`, repeated for every copy of the batch and, if `new` has them, for every query head; then `new`."""
    (rows, groups), heads = kept.shape[:2], new.shape[1] // kept.shape[1]
    parts = new.view(-1, rows, groups, heads, *new.shape[2:])
    ahead = kept[:, :, None].expand(len(parts), -1, -1, heads, -1, -1)
    return torch.cat([ahead, parts], -2).view(len(new), groups * heads, -1, new.shape[3])


class _Both(GoesOn, _Before):
    """Of a layer with attention beside states."""

    def __init__(self, layer: Any, which: Tensor, copies: int, keys: Tensor, values: Tensor) -> None:
        GoesOn.__init__(self, layer, which, copies)
        _Before.__init__(self, keys, values)


class WholePrompts:
    """A batch's suffixes joined to their prefixes again, right padded, without the first `shared` tokens."""

    def __init__(self, batch: Batch, shared: int) -> None:
        start, (examples, suffix) = batch.start[:, None], batch.shape
        place = torch.arange(shared, batch.known.whole, device=start.device)
        self._example = torch.arange(examples, device=start.device)[:, None]
        self._ahead = (place - shared).clamp(max=batch.prefix.shape[1] - shared - 1)
        self._behind = place - start  # [E, W]
        # Padding may reach beyond the prompts; it reads their last position.
        self._suffix = (start - shared + torch.arange(suffix, device=start.device)).clamp(max=len(place) - 1)

    def join(self, prefixes: Tensor, suffixes: Tensor) -> Tensor:
        """[E, P - shared, D] and [E, T, D] -> [E, W, D]."""
        own = suffixes[self._example, self._behind.clamp(0, suffixes.shape[1] - 1)]
        return torch.where((self._behind < 0)[..., None], prefixes[:, self._ahead], own)

    def suffixes(self, x: Tensor) -> Tensor:
        """[E, W, X] -> [E, T, X]."""
        return x[self._example.to(x.device), self._suffix.to(x.device)]


def run_prefixes(model: Any, prefixes: Tensor, shared: int, repeat_kv: list[int]) -> DynamicCache:
    """Run prefixes int64 [U, P] and return their cache; the common `beginning` of `shared` tokens runs alone first."""
    cache = beginning(model, prefixes, shared, repeat_kv)
    model(input_ids=prefixes[:, shared:], **behind(model, cache))
    return cache


def run_by_length(model: Any, batch: Batch) -> Cache:
    """Run a batch's prefixes, those of each length by themselves, and return their cache, states included."""
    lengths, parts = torch.zeros(len(batch.prefix), dtype=torch.long), []
    lengths[batch.host["prefix_of"]] = batch.host["start"]
    for length in lengths[lengths > 0].unique().tolist():
        rows = (lengths == length).nonzero()[:, 0].to(batch.prefix.device)
        cache = cache_with_states(model)
        model(input_ids=batch.prefix[rows, :length], **behind(model, cache))
        parts.append((rows, cache))
    return put_together(parts, len(lengths))


def passes_of(batch: Batch) -> tuple[object, ...]:
    """What decides which passes a batch takes: two for which it is equal take the same, of other tokens."""
    prefixes = batch.host["prefix"]
    return (
        batch.n_examples,
        batch.shape,
        len(batch.rows),
        batch.n_positions,
        prefixes.shape[1] > 0,
        len(prefixes) == batch.n_rows,  # then they run together with the corrupted prompts
        batch.known.shared > 0,
    )


def beginning(model: Any, prefixes: Tensor, shared: int, repeat_kv: list[int]) -> DynamicCache:
    """The cache of the `shared` tokens with which all prefixes begin, if any.

    `repeat_kv`: how many copies of each layer's keys and values the cache is to hold side by side.
    """
    cache = DynamicCache()
    if not shared:
        return cache
    alone: Any = run_prefixes(model, prefixes[:1, :shared], 0, [1] * len(repeat_kv)).layers
    for index, (layer, n) in enumerate(zip(alone, repeat_kv, strict=True)):
        pair = (x.repeat_interleave(n, 1).expand(len(prefixes), -1, -1, -1) for x in (layer.keys, layer.values))
        cache.update(*pair, index)
    return cache
