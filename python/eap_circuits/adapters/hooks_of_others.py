"""Hooks on a model that are neither ours nor those of a library that records or places with them."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules import module as modules

from ..errors import expected

KINDS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_LIBRARIES = ("transformers.", "accelerate.", "eap_circuits.", "torch.distributed.fsdp.")


def refuse_hooks_of_all() -> None:
    """Refuse hooks on all modules of the process, before and behind which ours cannot look; torch's own only look."""
    every = [hook for kind in KINDS for hook in getattr(modules, f"_global{kind}").values()]
    if found := [hook for hook in every if not str(getattr(hook, "__module__", "")).startswith("torch.")]:
        raise expected("hooks of all modules", "none (those of a module may stay)", f"{len(found)} in torch.nn.modules")


def foreign_hooks(module: nn.Module, kinds: tuple[str, ...] = KINDS) -> list[Any]:
    """A module's hooks, except those by which libraries, or runs in other threads, record and place."""
    found = [hook for kind in kinds for hook in vars(module).get(kind, {}).values()]
    return [hook for hook in found if not f"{getattr(hook, '__module__', '')}.".startswith(_LIBRARIES)]
