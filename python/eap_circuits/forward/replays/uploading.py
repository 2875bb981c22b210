"""Tensors go to a device in one piece, for which nothing waits, and come back in one, for which the host waits once."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar

import torch
from torch import Tensor

_ALIGNED = 16  # bytes; every dtype may begin there
# Set where passes are captured: replayed, they would read what was sent from memory that the host has given back.
NOTHING_IS_SENT: ContextVar[bool] = ContextVar("nothing is sent", default=False)
_Key = tuple[torch.device, torch.dtype, bytes]  # where a list is sent, and what it holds


def upload(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """Tensors of the CPU on a device, in order: one copy for all of them, which the host does not wait for.

    On the CPU they are returned as they are.
    """
    return packed(device, *tensors)[0]


def packed(device: torch.device, *tensors: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """The same, and the memory in which they lie on the device, uint8; None on the CPU."""
    if device.type == "cpu" or not tensors:
        return list(tensors), None
    if NOTHING_IS_SENT.get():
        raise RuntimeError("something is sent to the device in the midst of the passes")
    sizes = [x.numel() * x.element_size() for x in tensors]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // _ALIGNED) * _ALIGNED)
    together = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    for x, start, size in zip(tensors, starts, sizes, strict=False):
        together[start : start + size] = _bytes(x)
    there = together.to(device, non_blocking=True)
    return [
        there[start : start + size].view(x.dtype).view(x.shape)
        for x, start, size in zip(tensors, starts, sizes, strict=False)
    ], there


def _bytes(x: Tensor) -> Tensor:
    # One number alone may have any stride and is contiguous.
    return x.contiguous().as_strided([x.numel()], [1]).view(torch.uint8)


def download(*tensors: Tensor) -> list[Tensor]:
    """Tensors of one device on the CPU, in order: one copy for all of them, for which the host waits once.

    Those of the CPU are returned as they are.
    """
    if all(x.device.type == "cpu" for x in tensors):
        return list(tensors)
    # Those of the widest dtypes come first, so that each begins at a multiple of its own width.
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())
    together = torch.cat([_bytes(tensors[i]) for i in order]).cpu()
    found, start = list(tensors), 0
    for i in order:
        x = tensors[i]
        stop = start + x.numel() * x.element_size()
        found[i] = together[start:stop].view(x.dtype).view(x.shape)
        start = stop
    return found


class Indices:
    """Lists of the host as tensors of a device, each sent once."""

    def __init__(self) -> None:
        self._there: dict[_Key, Tensor] = {}

    def on(self, device: torch.device, values: Sequence[int] | Tensor) -> Tensor:
        """A list, or a tensor of the CPU, on a device."""
        if device.type == "cpu":
            return torch.as_tensor(values)
        key, host = _keyed(device, values)
        if key not in self._there:
            self.send(device, [host])
        return self._there[key].view(host.shape)

    def send(self, device: torch.device, lists: Sequence[Sequence[int] | Tensor], *others: Tensor) -> list[Tensor]:
        """Send lists that are wanted later in one piece with other tensors, which are returned."""
        if device.type == "cpu":
            return list(others)
        new = dict(_keyed(device, values) for values in lists)
        new = {key: host.flatten() for key, host in new.items() if key not in self._there}
        there = upload(device, *new.values(), *others)
        self._there |= zip(new, there, strict=False)
        return there[len(new) :]


def _keyed(device: torch.device, values: Sequence[int] | Tensor) -> tuple[_Key, Tensor]:
    host = torch.as_tensor(values)
    return (device, host.dtype, host.numpy().tobytes()), host
