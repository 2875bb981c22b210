"""The devices on which modules compute, and weights that accelerate fetches only then (`device_map`)."""

from __future__ import annotations

import sys
from itertools import chain
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn


def is_offloaded(module: nn.Module) -> bool:
    """Are the module's weights kept elsewhere until it runs?"""
    # Only accelerate sets this attribute, so without it accelerate need not be installed.
    if not hasattr(module, "_hf_hook"):
        return False
    from accelerate.utils import has_offloaded_params

    return bool(has_offloaded_params(module))


def is_shard(x: object) -> bool:
    """Is it a part of a weight, whose others are on other ranks?"""
    # Only what is in parts has made torch import this module.
    kinds = sys.modules.get("torch.distributed.tensor")
    return kinds is not None and isinstance(x, kinds.DTensor)


def is_in_parts(model: nn.Module) -> bool:
    """Does `fully_shard` keep a part of its weights on each rank? Some may be whole at the moment."""
    kinds = sys.modules.get("torch.distributed.fsdp")
    return kinds is not None and any(isinstance(part, kinds.FSDPModule) for part in model.modules())


def read(module: nn.Module, name: str) -> Tensor | None:
    """A module's parameter without gradient, fetched if it is offloaded or in parts; None if there is none."""
    value: Any = getattr(module, name, None)
    if is_shard(value):
        whole: Tensor = value.detach().full_tensor()  # all ranks take part, and so all have to ask for it
        return whole
    if value is None or not is_offloaded(module):
        return None if value is None else value.detach()
    from accelerate.utils import align_module_device

    with align_module_device(module):
        return getattr(module, name).detach().clone()


def device_of(*modules: nn.Module) -> torch.device:
    """The device on which a module computes; where it has no parameters, the next one's."""
    for part in chain.from_iterable(module.modules() for module in modules):
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


def run_whole(module: nn.Module, *inputs: Tensor) -> Tensor:
    """A module that is run by itself, outside of the model's pass, in which its weights would be made whole."""
    shards = {name: x for name, x in module.named_parameters() if is_shard(x)}
    if not shards:
        return module(*inputs)
    whole = {name: x.detach().full_tensor() for name, x in shards.items()}  # type: ignore[attr-defined]
    return torch.func.functional_call(module, whole, inputs)


def as_given(module: nn.Module, x: Tensor) -> Tensor:
    """x on the device on which the module computes: accelerate moves inputs there, but only after all hooks."""
    return x.to(device_of(module)) if hasattr(module, "_hf_hook") else x
