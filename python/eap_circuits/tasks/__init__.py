"""Tasks: prompt pairs with their answers, generated or read from files."""

from .dataset import PairedDataset
from .registry import TASKS, Task, load_task
from .scoring.spans import check_spans, spans_in
from .summary import MANY, Summary

__all__ = ["MANY", "TASKS", "PairedDataset", "Summary", "Task", "check_spans", "load_task", "spans_in"]
