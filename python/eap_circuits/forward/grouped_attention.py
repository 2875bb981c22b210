"""Attention of query heads that share keys and values, without a copy of these for each of them.

Behind a mask transformers' "sdpa" repeats a group's keys and values for each of its query heads, which for short
prompts costs more than attention itself. Here a group's query heads stand one after another along the tokens instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from threading import Lock
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_SDPA = "sdpa"
_lock = Lock()
_replaced: list[Any] = []  # the function that was there, once for everyone inside


@contextmanager
def shared_keys() -> Iterator[None]:
    """Models compute "sdpa" attention so inside; the function that was there is back after the last exit."""
    with _lock:
        _replaced.append(_replaced[0] if _replaced else ALL_ATTENTION_FUNCTIONS[_SDPA])
        ALL_ATTENTION_FUNCTIONS[_SDPA] = partial(_attend, _replaced[0])
    try:
        yield
    finally:
        with _lock:
            own = _replaced.pop()
            if not _replaced:
                del ALL_ATTENTION_FUNCTIONS[_SDPA]
                if ALL_ATTENTION_FUNCTIONS[_SDPA] is not own:  # it was not transformers' own either
                    ALL_ATTENTION_FUNCTIONS[_SDPA] = own


def _attend(
    attend: Any,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """What `attend` gives, [B, T, H, K]; query [B, H, T, K], key and value [B, H/g, T', K], mask [B, 1 or H, T, T']."""
    groups = query.shape[1] // key.shape[1]
    # The mask has to be repeated in turn: for long prompts that is more than the keys and values are.
    if (
        groups == 1
        or attention_mask is None
        or kwargs.get("position_bias") is not None
        or query.shape[2] > 2 * key.shape[1] * key.shape[3]
    ):
        return attend(module, query, key, value, attention_mask, *args, **kwargs)
    mask = attention_mask.repeat(1, 1, groups, 1) if attention_mask.shape[1] == 1 else _pack(attention_mask, groups)
    alone = SimpleNamespace(num_key_value_groups=1)
    out, *rest = attend(alone, _pack(query, groups), key, value, mask, *args, **kwargs)
    return out.unflatten(1, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3), *rest


def _pack(x: Tensor, groups: int) -> Tensor:
    """[B, H, T, X] -> [B, H/g, g·T, X]"""
    return x.unflatten(1, (-1, groups)).flatten(2, 3)
