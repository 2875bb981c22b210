"""Tensors that whoever gets them may change in place."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor


class _Made:
    """A tensor, and its version when it was made. Copies and pickles have none of it: they could not tell."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor, tensor._version

    def __reduce__(self) -> Any:
        return type(None), ()


class unspoilt(cached_property[Tensor]):
    """A cached property whose tensor is made anew after someone has changed it in place, as one does with masks."""

    def __get__(self, it: Any, owner: type | None = None) -> Tensor:  # type: ignore[override]
        if it is None:
            return self  # type: ignore[return-value]
        assert self.attrname is not None
        kept = vars(it).get(self.attrname)
        if not isinstance(kept, _Made) or kept.tensor._version != kept.version:
            with torch.inference_mode(False):  # whose tensors have no version
                kept = vars(it)[self.attrname] = _Made(self.func(it))
        return kept.tensor

    def __set__(self, it: Any, value: object) -> None:  # so that Python asks `__get__` each time
        raise AttributeError(f"{self.attrname} cannot be set")


def usable(x: Tensor) -> Tensor:
    """The tensor; where it was made in `torch.inference_mode`, a copy, which can be changed and learned with later."""
    if not x.is_inference():
        return x
    with torch.inference_mode(False):
        return x.clone()
