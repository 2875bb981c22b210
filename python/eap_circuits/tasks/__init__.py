"""Tasks: prompt pairs with their answers, generated or read from files."""

from .dataset import PairedDataset
from .mib import ENTRIES as MIB_ENTRIES
from .mib import MODELS as MIB_MODELS
from .mib import mib_tasks
from .registry import TASKS, Task, load_task
from .scoring.spans import check_spans, spans_in
from .summary import MANY, Summary

__all__ = [
    "MANY",
    "MIB_ENTRIES",
    "MIB_MODELS",
    "TASKS",
    "PairedDataset",
    "Summary",
    "Task",
    "check_spans",
    "load_task",
    "mib_tasks",
    "spans_in",
]
