"""Devices that do not exist: tensors that say they are on one of two devices, and compute on the CPU.

What may meet on them is what may on the one GPU of `bench/pretended`, which also has kernels, waits and addresses. Here
the devices keep names that torch itself takes in a build for CPUs, so that other libraries can place models on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from bench.pretended.tensors import CPU, index_of, one_device, tensors_of

# "meta" is the one kind of device that a tensor may claim, with a number, in a build for CPUs.
DEVICES = torch.device("meta", 0), torch.device("meta", 1)


class Pretend(Tensor):
    """A tensor on the CPU, `held`, that claims another device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> Pretend:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device,
        )
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:
        return f"{self.held!r} on {self.device}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copy = Pretend(self.held.clone(), self.device)
        return torch.nn.Parameter(copy, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copy

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, **_: Any) -> Any:
        return self.held.numpy(force=True)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _FromData(TorchFunctionMode):
    """torch would not even look at data that is meant for the device "meta"."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") in DEVICES:
            return torch.tensor(*args, **{**kwargs, "device": CPU}).to(kwargs["device"])
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            return func(args[0], index_of(args[1]), *args[2:])
        return func(*args, **kwargs)


_is_autocast_enabled = torch.is_autocast_enabled


def _no_autocast(device_type: str = "meta") -> bool:
    """Models ask, and torch before 2.11 does not answer for "meta"."""
    return device_type != "meta" and _is_autocast_enabled(device_type)


@contextmanager
def pretending() -> Iterator[None]:
    """Inside, tensors can be made on the pretended devices."""
    with _FromData(), _Factories(), mock.patch.object(torch, "is_autocast_enabled", _no_autocast):
        yield


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    tensors = tensors_of([*args, *kwargs.values()])
    device = kwargs.get("device") or _common(func, tensors)
    given = tree_map(_held, kwargs)
    if "device" in given:
        given["device"] = CPU
    out = func(*tree_map(_held, args), **given)
    changed = {id(_held(x)): x for x in tensors}  # in place
    return tree_map(lambda y: _on(y, device, changed), out)


def _held(x: Any) -> Any:
    return x.held if isinstance(x, Pretend) else x


def _common(func: Any, tensors: list[Tensor]) -> torch.device:
    """The device of all of them; raises where there are several."""
    if tensors and func is torch.ops.aten.copy_.default:
        return tensors[0].device
    return one_device(func, tensors, [x.device for x in tensors]) or CPU


def _on(y: Any, device: torch.device, changed: dict[int, Tensor]) -> Any:
    if not isinstance(y, Tensor) or id(y) in changed:
        return changed.get(id(y), y)
    return y if device == CPU else Pretend(y, device)
