"""Attention of query heads that share keys and values, without a copy of these for each of them.

With a mask, transformers' "sdpa" repeats a group's keys and values for each of its query heads. For short prompts that
costs more than attention itself. Here the query heads of a group stand one after another along the tokens instead.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...modules.loans import SharedChange

_SDPA = "sdpa"


def _exchange() -> tuple[Callable[[], object], Callable[[], object]]:
    theirs = ALL_ATTENTION_FUNCTIONS[_SDPA]

    def put_back() -> None:
        with suppress(KeyError):
            del ALL_ATTENTION_FUNCTIONS[_SDPA]
        if ALL_ATTENTION_FUNCTIONS[_SDPA] is not theirs:  # the user's own, not transformers'
            ALL_ATTENTION_FUNCTIONS[_SDPA] = theirs

    return partial(ALL_ATTENTION_FUNCTIONS.__setitem__, _SDPA, partial(_attend, theirs)), put_back


# Models compute "sdpa" attention this way in the threads that use it; the function that was there comes back.
SHARED_KEYS = SharedChange(_exchange)


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
    # The mask has to be repeated instead, which for long prompts takes more than the keys and values do.
    if (
        groups == 1
        or attention_mask is None
        or kwargs.get("position_bias") is not None
        or query.shape[2] > 2 * key.shape[1] * key.shape[3]
        or not SHARED_KEYS.used_here()
    ):
        return attend(module, query, key, value, attention_mask, *args, **kwargs)
    mask = attention_mask.repeat(1, 1, groups, 1) if attention_mask.shape[1] == 1 else _pack(attention_mask, groups)
    alone = SimpleNamespace(num_key_value_groups=1)
    out, *rest = attend(alone, _pack(query, groups), key, value, mask, *args, **kwargs)
    out = out.unflatten(1, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    return out.contiguous(), *rest  # of one key head it is a view, which some models cannot view again


def _pack(x: Tensor, groups: int) -> Tensor:
    """[B, H, T, X] -> [B, H/g, g·T, X]"""
    return x.unflatten(1, (-1, groups)).flatten(2, 3)
