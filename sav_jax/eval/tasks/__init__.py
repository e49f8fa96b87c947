"""Tasks by name. Each module reads one benchmark's files as their authors publish them."""

from __future__ import annotations

from sav_jax.eval.tasks import digits
from sav_jax.eval.tasks.base import Data, Item, Split, Task, default_data_dir, split_task

TASKS: dict[str, Task] = {task.name: task for module in (digits,) for task in module.TASKS}
"""The tasks known by name."""

GROUPS: dict[str, tuple[str, ...]] = {}
"""Benchmarks of several tasks, whose score is the mean over them: name -> names of tasks."""

__all__ = ["GROUPS", "TASKS", "Data", "Item", "Split", "Task", "default_data_dir", "split_task"]


def find_tasks(names: str) -> list[Task]:
    """Look up tasks by their names, separated by commas."""
    return [TASKS[name] for name in names.split(",")]
