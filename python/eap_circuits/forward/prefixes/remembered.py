"""Trials that found nothing wrong, trusted for as long as the model runs the same code in the same way."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial
from types import FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers import masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..hooks import Mark

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_CONTAINERS = {dict, OrderedDict, set}
_REGISTRIES = (ALL_ATTENTION_FUNCTIONS, masking_utils.ALL_MASK_ATTENTION_FUNCTIONS)
# Of each model and each way in which a trial goes: the model's state, and the most tokens that were tried.
_known: WeakKeyDictionary[nn.Module, dict[Hashable, tuple[object, list[int]]]] = WeakKeyDictionary()


def once(model: nn.Module, way: Hashable, tokens: list[int], trial: Callable[[], str | None]) -> str | None:
    """What `trial` finds wrong with a model.

    It is not made, and None returned, if one that went the same way, with at least as many tokens of each kind, found
    nothing wrong with the model as it is now.
    """
    state, most = _known.setdefault(model, {}).get(way, (None, []))
    same = state is not None and state == _state(model)
    if same and all(n <= m for n, m in zip(tokens, most, strict=True)):
        return None
    found = trial()
    if found is None:
        # A first run may leave something with the model.
        _known[model][way] = _state(model), list(map(max, tokens, most)) if same else tokens
    return found


def _state(model: nn.Module) -> object:
    """All that decides how a model runs, except the numbers in its weights, and without keeping any of it alive.

    Code is told apart by identity: the functions of the modules' classes, of the files that define these and the
    attention functions, and of `torch.nn.functional`. What an object of a hook or of a function holds is not looked at.
    """
    seen: dict[int, object] = {}
    modules = list(model.named_modules())
    classes = dict.fromkeys(kind for known in {type(module) for _, module in modules} for kind in known.__mro__)
    registered = [each for registry in _REGISTRIES for each in registry.values()]
    # While a call runs, a function of ours passes on to transformers'.
    functions = [f for each in registered for f in (each.args if isinstance(each, partial) else [each])]
    names = dict.fromkeys(getattr(each, "__module__", None) for each in (*classes, *functions))
    files = [nn.functional, *(sys.modules[name] for name in names if name in sys.modules)]
    return (
        [(name, _The(type(module)), _attributes(module, seen)) for name, module in modules],
        [[_The(f) for f in list(vars(x).values()) if isinstance(f, FunctionType)] for x in (*classes, *files)],
        [_held(dict(registry), seen) for registry in _REGISTRIES],
    )


def _attributes(module: nn.Module, seen: dict[int, object]) -> object:
    """Of a module. Most are dictionaries of hooks without any: as there are so many, these are left out."""
    every = vars(module).items()
    return [(key, _held(value, seen)) for key, value in every if type(value) not in _CONTAINERS or value]


def _held(value: Any, seen: dict[int, object]) -> object:
    """What tells whether a value is still the same; what cannot be referred to weakly never is."""
    kind = type(value)  # `isinstance` asks a configuration for its class, which takes as long as all else here
    if issubclass(kind, _PLAIN):
        return value
    if issubclass(kind, Tensor):
        return _The(kind), value.dtype, value.device, value.shape
    if issubclass(kind, dict):
        return [(_held(key, seen), _held(each, seen)) for key, each in value.items() if not isinstance(each, Mark)]
    if issubclass(kind, (list, tuple, set, frozenset)):
        return [_held(each, seen) for each in value]
    if issubclass(kind, partial):
        return _held((value.func, value.args, value.keywords), seen)
    if issubclass(kind, MethodType):
        return _held((value.__self__, value.__func__), seen)
    if hasattr(kind, "to_diff_dict"):  # a configuration, which many modules share
        if id(value) not in seen:
            seen[id(value)] = None
            seen[id(value)] = _held(vars(value), seen)
        return seen[id(value)]
    try:
        return _The(value)
    except TypeError:
        return object()


class _The:
    """An object, told apart from all others by identity, and not kept alive."""

    def __init__(self, it: object) -> None:
        self._ref = ref(it)  # one for each object, for as long as that lives

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _The) and self._ref is other._ref

    __hash__ = None  # type: ignore[assignment]
