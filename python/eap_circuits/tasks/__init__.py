"""Tasks: prompt pairs with their answers, generated or read from files."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .registry import TASKS, Task, load_task

if TYPE_CHECKING:
    from .dataset import PairedDataset
    from .loading import TEXTS, PairsFile, naming, own_records, read_file
    from .mib import ENTRIES as MIB_ENTRIES
    from .mib import MODELS as MIB_MODELS
    from .mib import mib_tasks
    from .scoring.spans import check_spans, spans_in
    from .summary import MANY, Summary
    from .throughout import decoder_prompts, different_throughout, longest
    from .tokens.pictures import Pictures

# Where each is, by which name. Loaded on first use: `eap tasks` must not wait for torch.
_HOME = {
    "MANY": ("summary", "MANY"),
    "MIB_ENTRIES": ("mib", "ENTRIES"),
    "MIB_MODELS": ("mib", "MODELS"),
    "PairedDataset": ("dataset", "PairedDataset"),
    "PairsFile": ("loading", "PairsFile"),
    "Pictures": ("tokens.pictures", "Pictures"),
    "Summary": ("summary", "Summary"),
    "TEXTS": ("loading", "TEXTS"),
    "check_spans": ("scoring.spans", "check_spans"),
    "decoder_prompts": ("throughout", "decoder_prompts"),
    "different_throughout": ("throughout", "different_throughout"),
    "longest": ("throughout", "longest"),
    "mib_tasks": ("mib", "mib_tasks"),
    "naming": ("loading", "naming"),
    "own_records": ("loading", "own_records"),
    "read_file": ("loading", "read_file"),
    "spans_in": ("scoring.spans", "spans_in"),
}
__all__ = sorted([*_HOME, "TASKS", "Task", "load_task"])


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, own = _HOME[name]
    return getattr(importlib.import_module(f".{module}", __name__), own)
