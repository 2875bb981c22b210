"""All that can be measured on this machine, at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from eap_kernels import _auto
from eap_kernels.tune import Device, choices


def tune(devices: Device | Iterable[Device] | None = (), again: bool = False) -> Iterator[str]:
    """Measure what is not stored yet, and say in lines what was found.

    Raises:
        RuntimeError: a device cannot be measured now, or the result cannot be stored.
    """
    for device in _chosen(devices):
        for arithmetic in choices.ARITHMETICS[device.type]:
            try:
                if again or arithmetic not in choices.stored(device):
                    choices.measured(device, arithmetic, again)
            except choices.Unable as error:
                raise RuntimeError(f"{choices.name_of(device)} in {arithmetic}: {error}") from error
            yield from (
                f"{choices.name_of(device)}, {what}: {line}" for what, line in _auto.told(device, arithmetic).items()
            )
        yield f"stored in {choices.path(device)}"


def _chosen(devices: Device | Iterable[Device] | None) -> list[torch.device]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    given = () if devices is None else [devices] if isinstance(devices, Device) else devices
    named = list(given) or [f"cuda:{index}" for index in range(count)] or ["cpu"]
    found: dict[str, torch.device] = {}
    for name in named:
        try:
            device = torch.device(name)
        except (RuntimeError, TypeError) as error:
            raise RuntimeError(f"tune: expected devices or names of devices, got {name!r}") from error
        if device.type not in choices.ARITHMETICS or (device.type == "cuda" and (device.index or 0) >= count):
            raise RuntimeError(f"tune: expected a GPU of this machine or the CPU, got {name!r}")
        found.setdefault(choices.name_of(device), device)
    return list(found.values())
