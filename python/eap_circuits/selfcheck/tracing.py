"""Every module's call in one forward pass."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import Call
from ..forward import unhook
from ..modules.loans import Changes


def trace(model: nn.Module, tokens: Tensor) -> list[Call]:
    """The calls of modules that ran once, with a floating input and output, in order of start; tokens int64 [B, T]."""
    order: list[str] = []
    calls: dict[str, Call] = {}

    def before(path: str) -> Any:
        return lambda module, args, kwargs: order.append(path)

    def after(path: str) -> Any:
        def keep(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            given = args[0] if args else kwargs.get("hidden_states")
            output = output[0] if isinstance(output, (tuple, list)) and output else output
            if isinstance(given, Tensor) and isinstance(output, Tensor) and given.is_floating_point():
                calls[path] = Call(
                    path, module, given.to(tokens.device, copy=True), output.to(tokens.device, copy=True)
                )

        return keep

    with Changes() as changes, torch.no_grad():
        for path, module in model.named_modules():
            first, then = before(path), after(path)
            changes.note(partial(unhook, module, first))
            changes.note(partial(unhook, module, then))
            module.register_forward_pre_hook(first, with_kwargs=True)
            module.register_forward_hook(then, with_kwargs=True)
        model(input_ids=tokens, use_cache=False)
    return [calls[path] for path in order if path in calls and order.count(path) == 1]
