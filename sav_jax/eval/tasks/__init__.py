"""Tasks by name. Each module reads one benchmark's files as their authors publish them."""

from __future__ import annotations

import difflib

from sav_jax.errors import UserError
from sav_jax.eval.tasks import (
    blink,
    digits,
    drawn,
    drawn_pairs,
    flickr30k,
    gqa,
    hateful_memes,
    mhalubench,
    naturalbench,
    okvqa,
    pope,
    scienceqa,
    sugarcrepe,
    textvqa,
    tfds,
    vizwiz,
    vlguard,
)
from sav_jax.eval.tasks.base import Data, Item, Split, Task, default_data_dir, split_task
from sav_jax.eval.tasks.card import card

_MODULES = (
    digits,
    drawn,
    drawn_pairs,
    tfds,
    mhalubench,
    vlguard,
    blink,
    naturalbench,
    sugarcrepe,
    vizwiz,
    pope,
    hateful_memes,
    flickr30k,
    okvqa,
    textvqa,
    gqa,
    scienceqa,
)

TASKS: dict[str, Task] = {task.name: task for module in _MODULES for task in module.TASKS}
"""The tasks known by name; :func:`find_tasks` knows more."""

GROUPS: dict[str, tuple[str, ...]] = {**blink.GROUPS, **pope.GROUPS}
"""Benchmarks of several tasks, whose score is the mean over them: name -> names of tasks."""

__all__ = [
    "GROUPS",
    "TASKS",
    "Data",
    "Item",
    "Split",
    "Task",
    "card",
    "default_data_dir",
    "find_task",
    "find_tasks",
    "split_task",
]


def find_task(name: str) -> tuple[Task, ...]:
    """Look up a name: a task, a group of tasks (``blink``), or ``tfds:NAME`` for any set of tensorflow-datasets.

    Raises:
      UserError: naming those that are called alike, and how to see all.
    """
    if name in TASKS:
        return (TASKS[name],)
    if name in GROUPS:
        return tuple(TASKS[part] for part in GROUPS[name])
    if name.startswith(tfds.PREFIX) and name != tfds.PREFIX:
        return (tfds.tfds_task(name.removeprefix(tfds.PREFIX)),)
    alike = ", ".join(difflib.get_close_matches(name, [*TASKS, *GROUPS], n=3))
    raise UserError(
        f"no task is called {name!r}{f' (perhaps {alike}?)' if alike else ''}; 'sav-jax eval --tasks list' prints all, "
        f"and {tfds.PREFIX}NAME is any classification set of tensorflow-datasets"
    )


def find_tasks(names: str) -> list[Task]:
    """Look up names separated by commas (:func:`find_task`), each task once.

    Raises:
      UserError: if a name is unknown or none is given.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise UserError("no task is named; 'sav-jax eval --tasks list' prints all")
    return list({task.name: task for name in wanted for task in find_task(name)}.values())
