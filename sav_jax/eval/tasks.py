"""Tasks: where labelled examples come from, and which of them are shown (support) and asked (queries)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image

from sav_jax.classifier import choose_shots
from sav_jax.errors import UserError
from sav_jax.examples import DEFAULT_FRAMES, Example, read_examples


@dataclass(frozen=True)
class Task:
    """A classification task.

    Attributes:
      name: on the command line and in the results.
      description: one line: what is asked about what, and where the data comes from.
      load: returns the examples that support may be drawn from, and the queries; None for the queries means all
        examples not drawn.
      version: raised whenever prompts, labels or examples change.
    """

    name: str
    description: str
    load: Callable[[], tuple[list[Example], list[Example] | None]]
    version: int = 1


@dataclass(frozen=True)
class Split:
    """What all methods see of a task.

    Attributes:
      support: labelled examples, the only ones whose labels a method may look at.
      queries: examples to be classified.
      labels: class names, sorted.
      available: number of queries before any limit.
      digest: SHA-256 of all questions, labels and images, in order. Equal digests: results may be compared.
    """

    support: tuple[Example, ...]
    queries: tuple[Example, ...]
    labels: tuple[str, ...]
    available: int
    digest: str


def split_task(task: Task, shots: int, seed: int, limit: int | None = None) -> Split:
    """Draw the support and the queries; the same arguments give the same split on every machine.

    Args:
      task: the task.
      shots: labelled examples per class.
      seed: of both draws.
      limit: keep only so many queries, drawn at random; their order stays.

    Raises:
      UserError: if a class has too few examples, or too little is left to ask.
    """
    pool, queries = task.load()
    labels = [str(example.label) for example in pool]
    drawn = choose_shots(labels, shots, seed)
    support = [pool[i] for i in drawn]
    names = tuple(sorted(set(labels)))
    if len(names) < 2:
        raise UserError(f"task {task.name}: every support example has the label {names[0]!r}; at least two are needed")
    for name in names:
        if (count := labels.count(name)) < shots:
            raise UserError(f"task {task.name}: class {name!r} has {count} examples, fewer than --shots {shots}")
    if queries is None:
        chosen = set(drawn)
        queries = [example for i, example in enumerate(pool) if i not in chosen]
    if not queries:
        raise UserError(f"task {task.name}: --shots {shots} leaves no queries")
    available = len(queries)
    if limit is not None:
        if limit < 1:
            raise UserError(f"--limit must be at least 1, not {limit}")
        kept = np.random.default_rng(seed).permutation(available)[:limit]
        queries = [queries[i] for i in sorted(kept)]
    digest = hashlib.sha256("\n".join(example_digest(example) for example in [*support, *queries]).encode())
    return Split(tuple(support), tuple(queries), names, available, digest.hexdigest())


def example_digest(example: Example) -> str:
    """SHA-256 of question, label, the contents of images and videos, and how many frames are shown."""
    videos = [[digest, example.frames] for digest in example.video_digests()]
    facts = json.dumps([example.question, example.label, *example.image_digests(), *videos])
    return hashlib.sha256(facts.encode()).hexdigest()


def from_files(
    train: str | os.PathLike[str],
    test: str | os.PathLike[str],
    question: str | None = None,
    frames: int = DEFAULT_FRAMES,
) -> Task:
    """Make a task of two files or folders as :func:`sav_jax.read_examples` takes them, ``frames`` of each video being
    shown.

    Raises:
      UserError: if either cannot be read or lacks labels, or the queries have labels that the support has not.
    """
    pool = read_examples(train, question, require_labels=True, frames=frames)
    queries = read_examples(test, question, require_labels=True, frames=frames)
    known = {example.label for example in pool}
    for query in queries:
        if query.label not in known:
            raise UserError(f'{query.source}: field "label" is {query.label!r}, which no row of {train} has')
    return Task("files", f"{test} with examples from {train}", lambda: (pool, queries))


def _digits() -> tuple[list[Example], None]:
    from sklearn.datasets import load_digits

    data = load_digits()
    examples = []
    for index, (image, digit) in enumerate(zip(data.images, data.target, strict=True)):
        grey = PIL.Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8))  # 17 levels of grey
        examples.append(
            Example(
                question="What digit is this?",
                images=(grey.convert("RGB"),),
                label=str(digit),
                id=str(index),
                source=f"load_digits[{index}]",
            )
        )
    return examples, None


def _registry(tasks: Sequence[Task]) -> dict[str, Task]:
    return {task.name: task for task in tasks}


TASKS = _registry(
    [
        Task(
            "digits",
            "which digit is it? 1,797 real handwritten digits of 8 x 8 pixels, 10 classes (scikit-learn's load_digits)",
            _digits,
        )
    ]
)
"""The tasks known by name."""
