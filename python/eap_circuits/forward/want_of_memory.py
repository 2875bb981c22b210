"""Errors for want of memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from ..errors import out_of_memory, reason
from ..ranks import in_team

P = ParamSpec("P")
T = TypeVar("T")


def give_back_memory() -> None:
    """Free what an interrupted run has left; called outside `except`, whose traceback keeps its tensors alive."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def tried_twice(run: Callable[[], T]) -> T:
    """`run()`, of what cannot run with less at once, a second time if memory runs out for it."""
    try:
        return run()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error) or in_team():  # a rank cannot run by itself what it runs with others
            raise
    give_back_memory()
    return run()


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
