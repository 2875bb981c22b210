"""Tasks: prompt pairs with their answers, generated or read from files."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .registry import TASKS, Task, load_task

if TYPE_CHECKING:
    from .dataset import PairedDataset
    from .scoring.spans import check_spans, spans_in
    from .summary import MANY, Summary

# Loaded on first use: `eap tasks` must not wait for torch.
_HOME = {
    "MANY": "summary",
    "PairedDataset": "dataset",
    "Summary": "summary",
    "check_spans": "scoring.spans",
    "spans_in": "scoring.spans",
}
__all__ = ["MANY", "TASKS", "PairedDataset", "Summary", "Task", "check_spans", "load_task", "spans_in"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
