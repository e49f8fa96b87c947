"""A task's card: all that a person must know about it, to read in a terminal."""

from __future__ import annotations

import textwrap
from pathlib import Path

from sav_jax.eval.tasks.base import Task, default_data_dir

_INDENT, _WIDTH = 14, 100
_LISTED = 40  # labels
_KINDS = {
    "classification": "classification: the answer is one of the labels",
    "generation": "generation: answers are written freely and scored against references; for methods that write "
    "(--methods list says which do); --shots is their number in all",
}


def card(task: Task, data_dir: Path | None = None) -> str:
    """Describe a task: what is asked, source, data and where they are expected, prompt, labels, split, metrics.

    Args:
      task: the task.
      data_dir: where data are looked for; by default as :func:`default_data_dir` says.
    """
    lines = [task.name, "=" * len(task.name), ""]
    lines += _entry("asked", task.description)
    lines += _entry("kind", _KINDS[task.kind])
    lines += _entry("source", task.source)
    lines += _entry("data", _data(task, data_dir or default_data_dir()))
    lines += _entry("prompt", task.prompt)
    lines += [] if task.generative else _entry("labels", _labels(task))
    lines += _entry("split", task.split)
    own = {metric.name: metric for metric in task.metrics}
    known = {metric.name: metric for metric in task.all_metrics}
    shown = known.get(task.metric)
    lines += _entry("metric", f"{task.metric}: {shown.description}" if shown else task.metric)
    for metric in own.values():
        if metric.name != task.metric:
            lines += _entry("", f"{metric.name}: {metric.description}")
    common = [metric.name for metric in task.all_metrics if metric.name not in own]
    lines += _entry("", f"and what all classification tasks have: {', '.join(common)}" if common else "")
    lines += _entry("version", str(task.version))
    return "\n".join(lines) + "\n"


def _data(task: Task, data_dir: Path) -> str:
    if task.release is None:
        return "nothing needs to be fetched"
    folder = data_dir / task.release.folder
    absent = task.release.missing(folder)
    state = f"NOT THERE ({', '.join(absent)} missing)" if absent else "there"
    return f"in {folder}: {state}. Expected: {task.release}"


def _labels(task: Task) -> str:
    if task.labels is None:
        return "those of the data"
    shown = [
        label if task.answer(label) == label else f"{label} (answered {task.answer(label)!r})" for label in task.labels
    ]
    more = len(shown) - _LISTED
    return ", ".join(shown[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def _entry(name: str, text: str) -> list[str]:
    if not text:
        return []
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=name.ljust(_INDENT),
        subsequent_indent=" " * _INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )
