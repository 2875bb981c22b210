"""Where a model's modules compute, and weights that accelerate keeps elsewhere until then (`device_map`)."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn


def is_offloaded(module: nn.Module) -> bool:
    """Are its weights elsewhere until it runs?"""
    # Only accelerate gives a module this: where it did not, it need not even be installed.
    if not hasattr(module, "_hf_hook"):
        return False
    from accelerate.utils import has_offloaded_params

    return bool(has_offloaded_params(module))


def read(module: nn.Module, name: str) -> Tensor | None:
    """A module's parameter without gradient, fetched where it is offloaded; None where there is none."""
    value: Tensor | None = getattr(module, name, None)
    if value is None or not is_offloaded(module):
        return None if value is None else value.detach()
    from accelerate.utils import align_module_device

    with align_module_device(module):
        return getattr(module, name).detach().clone()


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes."""
    for part in module.modules():
        if is_offloaded(part):
            hook: Any = part._hf_hook
            return torch.device(hook.execution_device)
        for parameter in filter(_there, part._parameters.values()):
            return parameter.device
    return torch.device("cpu")


def devices_of(model: nn.Module) -> set[torch.device]:
    """Every device on which a module with weights computes."""
    return {device_of(part) for part in model.modules() if any(map(_there, part._parameters.values()))}


def _there(parameter: Tensor | None) -> TypeGuard[Tensor]:
    return parameter is not None


def as_given(module: nn.Module, x: Tensor) -> Tensor:
    """What the module will be given for x: accelerate moves it to where the module computes, but after all hooks."""
    return x.to(device_of(module)) if hasattr(module, "_hf_hook") else x
