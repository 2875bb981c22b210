"""All that a call could leave changed: of a model, and of the process."""

from __future__ import annotations

import torch
from torch.overrides import _len_torch_function_stack
from transformers import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from eap_circuits.modules import loans


def snapshot(model):
    """All that can be seen of a model."""
    state = {"config": model.config.to_dict(), "attention": model.config._attn_implementation}
    for name, module in model.named_modules():
        fields = {}
        for key, value in vars(module).items():
            if isinstance(value, dict) and key.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
                # Some models hook themselves in their first run, to return what every layer gave.
                fields[key] = [
                    hook for hook, f in value.items() if "output_capturing" not in str(getattr(f, "__module__", ""))
                ]
            elif key == "_output_capturing_hooks_installed":
                continue
            elif isinstance(value, (bool, int, float, str, type(None))):
                fields[key] = value
            else:
                fields[key] = id(value)
        state[name] = fields
    # What accelerate casts for a run is elsewhere afterwards.
    cast = {p for module in model.modules() if "_hf_hook" in vars(module) for p in module._parameters.values()}
    for name, parameter in model.named_parameters():
        there = parameter.data_ptr() if parameter.layout == torch.strided else id(parameter)
        state[f"weight {name}"] = (
            parameter.requires_grad,
            None if parameter.grad is None else parameter.grad.tolist(),
            parameter in cast or there,
            0 if parameter.is_inference() else parameter._version,
        )
    return state


def process_state():
    """What all models share, and what of torch belongs to this thread."""
    return {
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "function modes": _len_torch_function_stack(),
        "operator modes": torch._C._len_torch_dispatch_stack(),
        "compiler": torch._dynamo.eval_frame._stance,
        "attention": dict(ALL_ATTENTION_FUNCTIONS.items()),
        "masks": dict(AttentionMaskInterface._global_mapping),
        "open": list(loans._open),
    }


def differences(before, after):
    """The names of what differs between two such states, and how."""
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    found = {}
    for name in names:
        old, new = before.get(name), after.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            old, new = ({key: x[key] for key in x if old.get(key) != new.get(key)} for x in (old, new))
        found[name] = old, new
    return found
