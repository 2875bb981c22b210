"""Tasks: prompt pairs with their answers, generated or read from files."""

from .dataset import PairedDataset
from .registry import TASKS, Task, load_task
from .summary import MANY, Summary

__all__ = ["MANY", "TASKS", "PairedDataset", "Summary", "Task", "load_task"]
