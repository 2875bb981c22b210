"""Hugging Face models inside other libraries' objects."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..errors import expected


def unwrapped(model: Any) -> nn.Module:
    """The Hugging Face model inside an `undivided` one, a PEFT model or a bridge of TransformerLens.

    Raises:
        InputError: the Hugging Face model inside cannot be reached; the message has the line that loads it.
    """
    model = undivided(model)
    if hasattr(model, "get_base_model"):  # PEFT; its adapters stay where they are, inside the layers
        config = model.active_peft_config
        if getattr(config, "is_prompt_learning", False):
            raise expected("model", "adapters inside the model's layers", "learned prompts before its tokens")
        if getattr(config, "alora_invocation_tokens", None):
            raise expected("model", "adapters that act at every token", "one that begins at its invocation tokens")
        model = undivided(model.get_base_model())
    elif type(model).__name__ == "PeftMixedModel":
        model = model.base_model.model
    if type(model).__module__.partition(".")[0] == "transformer_lens":
        inner = getattr(model, "original_model", None)
        if inner is None or getattr(model, "compatibility_mode", False):
            name = getattr(model.cfg, "tokenizer_name", None) or getattr(model.cfg, "model_name", "NAME")
            line = f"transformers.AutoModelForCausalLM.from_pretrained({name!r})"
            raise expected("model", f"the Hugging Face model itself, {line}", type(model).__name__)
        model = _without_bridges(inner)
    return model


def undivided(model: Any) -> Any:
    """What is inside a compiled or data parallel model, which compute the same."""
    while hasattr(model, "_orig_mod") or isinstance(model, (DataParallel, DistributedDataParallel)):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module  # of torch.compile; one of the copies
    return model


def around(model: Any) -> Any:
    """The PEFT model around a Hugging Face model, if there is one."""
    model = undivided(model)
    return model if hasattr(model, "get_base_model") or type(model).__name__ == "PeftMixedModel" else None


def _without_bridges(module: nn.Module) -> nn.Module:
    """A copy of a module with the same weights in which each bridge is replaced by the module that it wraps."""
    wrapped = module._modules.get("_original_component")
    if wrapped is not None:
        return _without_bridges(wrapped)
    twin = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, dict):  # hooks, parameters and modules: the copy has its own
            vars(twin)[name] = value.copy()
    twin._modules = {name: None if m is None else _without_bridges(m) for name, m in module._modules.items()}
    return twin
