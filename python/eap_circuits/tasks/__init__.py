"""Tasks: prompt pairs with their answers, generated or read from files."""

from .dataset import PairedDataset
from .registry import TASKS, Task, load_task

__all__ = ["TASKS", "PairedDataset", "Task", "load_task"]
