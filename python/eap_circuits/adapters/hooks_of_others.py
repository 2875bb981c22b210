"""Hooks on a model that are neither ours nor those of a library that records or places with them."""

from __future__ import annotations

from typing import Any

from torch import nn

KINDS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_LIBRARIES = ("transformers.", "accelerate.", "eap_circuits.", "torch.distributed.fsdp.")


def foreign_hooks(module: nn.Module, kinds: tuple[str, ...] = KINDS) -> list[Any]:
    """A module's hooks, except those by which libraries, or runs in other threads, record and place."""
    found = [hook for kind in kinds for hook in vars(module).get(kind, {}).values()]
    return [hook for hook in found if not f"{getattr(hook, '__module__', '')}.".startswith(_LIBRARIES)]
