"""Errors of runs behind a model's own key/value cache, after which a call goes on without prefix reuse."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from ..errors import InputError, reason

P = ParamSpec("P")
T = TypeVar("T")


class CacheError(RuntimeError):
    """A run behind a model's cache failed; the first line of the model's own error."""


def out_of_memory(error: BaseException) -> bool:
    """Is it for want of memory, on a GPU or on a CPU?"""
    said = ("can't allocate memory", "bad_alloc")  # by torch's allocator, and by C++ that cannot say more
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in str(error) for words in said)


@contextmanager
def behind_cache(cached: bool) -> Iterator[None]:
    """Re-raise errors of a run behind a cache as CacheError."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        if not cached or isinstance(error, (CacheError, InputError)) or out_of_memory(error):
            raise
        raise CacheError(reason(error)) from error


def one_want_of_memory(call: Callable[P, T]) -> Callable[P, T]:
    """`call`, which raises torch.OutOfMemoryError wherever memory runs out for what a smaller pass does not help."""

    @wraps(call)
    def made(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return call(*args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, torch.OutOfMemoryError) or not out_of_memory(error):
                raise
            wanted = f"{call.__name__}: expected enough memory to prepare the run, got {reason(error)}."
            raise torch.OutOfMemoryError(wanted) from error

    return made


def without_cache_where_it_fails(call: Callable[P, T]) -> Callable[P, T]:
    """`call`, made again with reuse_prefix=False, and a warning, where a run behind the model's cache fails."""
    signature = inspect.signature(call)

    @wraps(call)
    def made(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return call(*args, **kwargs)
        except CacheError as error:
            failure = str(error)
        given = signature.bind(*args, **kwargs)
        given.arguments["reuse_prefix"] = False
        model = type(given.arguments["model"]).__name__
        warnings.warn(f"{model}: prefixes are not reused, as its cache cannot serve ({failure}).", stacklevel=2)
        return call(*given.args, **given.kwargs)

    return made
