"""The devices on which modules compute, and weights that accelerate fetches only then (`device_map`)."""

from __future__ import annotations

from itertools import chain
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from .parts import computes_in_parts, is_shard


def is_offloaded(module: nn.Module) -> bool:
    """Are the module's weights kept elsewhere until it runs?"""
    # Only accelerate sets this attribute, so without it accelerate need not be installed.
    if "_hf_hook" not in vars(module):
        return False
    from accelerate.utils import has_offloaded_params

    return bool(has_offloaded_params(module))


def forward_of(module: nn.Module) -> Any:
    """The function that computes what a module does: its class's, unless another was put in its place.

    What fetches its weights and moves its inputs does not count, nor a tensor parallel module's exchange, nor what
    takes its place in a pass of ours.
    """
    own: Any = type(module).forward
    if computes_in_parts(module):
        return own
    put = vars(module).get("_old_forward" if "_hf_hook" in vars(module) else "forward", own)
    ours = str(getattr(getattr(put, "func", put), "__module__", "")).startswith("eap_circuits.")
    return own if ours else getattr(put, "__func__", put)


def read(module: nn.Module, name: str) -> Tensor | None:
    """A module's parameter without gradient, fetched if it is offloaded or in parts; None if there is none."""
    value: Any = getattr(module, name, None)
    if is_shard(value):
        whole: Tensor = value.detach().full_tensor()  # all ranks take part, and so all have to ask for it
        return whole
    if not isinstance(value, Tensor):  # there may be a method of this name
        return None
    if not is_offloaded(module):
        return value.detach()
    from accelerate.utils import align_module_device

    with align_module_device(module):
        return getattr(module, name).detach().clone()


def read_part(module: nn.Module, name: str, dim: int, features: slice) -> Tensor:
    """Some features of an offloaded module's parameter, fetched by themselves."""
    hook: Any = module._hf_hook
    whole: Tensor = hook.weights_map[name]
    return whole.narrow(dim, features.start, features.stop - features.start).to(hook.execution_device, copy=True)


def device_of(*modules: nn.Module) -> torch.device:
    """The device on which a module computes; where it has no parameters, the next one's."""
    parts = chain.from_iterable(module.modules() for module in modules)
    return next(filter(None, map(_own_device, parts)), torch.device("cpu"))


def devices_of(model: nn.Module) -> set[torch.device]:
    """Every device on which a module with weights computes."""
    weighted = (part for part in model.modules() if any(map(_there, part._parameters.values())))
    return set(filter(None, map(_own_device, weighted)))


def _own_device(module: nn.Module) -> torch.device | None:
    """Where a module's own weights compute; None if it has none."""
    if is_offloaded(module):
        hook: Any = module._hf_hook
        device = torch.device(hook.execution_device)
        # As tensors there say it: `cpu_offload(model, "cuda")` names no card.
        return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device
    return next((parameter.device for parameter in filter(_there, module._parameters.values())), None)


def _there(parameter: Tensor | None) -> TypeGuard[Tensor]:
    return parameter is not None


def as_given(module: nn.Module, x: Tensor) -> Tensor:
    """x on the device on which the module computes: accelerate moves inputs there, but only after all hooks."""
    return x.to(device_of(module)) if hasattr(module, "_hf_hook") else x
