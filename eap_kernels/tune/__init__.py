"""What `auto` takes on this very machine: measured in a process of its own, and stored; docs/ops/auto.md.

`eap_kernels.tune()` measures all at once, as `python -m eap_kernels.tune` does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import ModuleType

import torch

Device = str | int | torch.device


class _Tune(ModuleType):
    def __call__(self, devices: Device | Iterable[Device] | None = (), again: bool = False) -> list[str]:
        """Measure which backends are right and fastest where that is not stored yet; returns what was found, in lines.

        Args:
            devices: one or several, as torch takes them, such as "cuda:1"; by default every kind of GPU there is, else
                the CPU.
            again: measure anew what is stored.

        Raises:
            RuntimeError: a device cannot be measured now, or the result cannot be stored.

        Example:
            >>> print(*eap_kernels.tune(), sep="\\n")
        """
        from eap_kernels.tune.devices import tune

        return list(tune(devices, again))


sys.modules[__name__].__class__ = _Tune
