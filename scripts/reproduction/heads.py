"""Heads read once, looked at in many ways: what any choice of heads would have answered, query by query.

Axes: S support examples, Q queries, L layers, N heads per layer, M = L * N heads, H head width, C classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sav_jax.classifier import SparseAttentionVectors, majority
from sav_jax.eval.tasks import find_tasks
from sav_jax.eval.tasks.base import Data, Digests, Item, Task, default_data_dir, split_task
from sav_jax.examples import Example
from sav_jax.lmm import LMM
from sav_jax.reading import read
from scripts.reproduction.study import Answers, Study

HEADS = 20
"""How many heads vote, as published."""


@dataclass(frozen=True)
class Draw:
    """A task under one seed: what is shown and what is asked.

    Attributes:
      task, seed: which.
      classes: C names, in the order of the columns.
      support, queries: their items.
      clusters: of the queries: their groups, or themselves.
    """

    task: str
    seed: int
    classes: tuple[str, ...]
    support: tuple[Item, ...]
    queries: tuple[Item, ...]
    clusters: tuple[str, ...]

    @property
    def labels(self) -> list[str]:
        """Of the support."""
        return [item.label for item in self.support]

    @cached_property
    def shown_classes(self) -> np.ndarray:
        """Column of each support example's label, int [S]."""
        return np.array([self.classes.index(label) for label in self.labels])

    @cached_property
    def targets(self) -> np.ndarray:
        """Column of each query's label, int [Q]."""
        return np.array([self.classes.index(item.label) for item in self.queries])


def task_and_data(study: Study, name: str) -> tuple[Task, Data]:
    """A task, and what its files hold."""
    return _task_and_data(study.called([name]), study.data_dir or default_data_dir())


@functools.lru_cache(
    maxsize=32
)  # every measurement asks for it again; pictures are drawn, or files are read and checked
def _task_and_data(called: str, folder: Path) -> tuple[Task, Data]:
    (task,) = find_tasks(called)
    return task, task.load(folder / task.name)


def draws(study: Study, task: str, shots: int) -> list[Draw]:
    """The splits of a task that ``sav-jax eval --limit`` makes, a draw per seed of the study."""
    found, data = task_and_data(study, task)
    digests = Digests()
    splits = [(seed, split_task(found, data, shots, seed, study.limit, digests=digests)) for seed in study.seeds]
    return [
        Draw(
            task,
            seed,
            split.labels,
            split.support,
            split.queries,
            tuple(item.group or digests.whole(item)[:16] for item in split.queries),
        )
        for seed, split in splits
    ]


def read_heads(study: Study, lmm: LMM, items: Sequence[Item]) -> np.ndarray:
    """Their heads, float32 [items, L, N, H], from the study's cache where they are there."""
    return read_examples(study, lmm, [item.example for item in items])


def read_examples(study: Study, lmm: LMM, examples: Sequence[Example]) -> np.ndarray:
    """As :func:`read_heads`, of examples."""
    return read(lmm, examples, cache=study.cache, progress=False).heads


def with_heads(study: Study, lmm: LMM, drawn: Sequence[Draw]) -> Iterator[tuple[Draw, np.ndarray, np.ndarray]]:
    """Each draw with the heads of its support and of its queries; all that they share is read once."""
    items = {id(item): item for draw in drawn for item in (*draw.support, *draw.queries)}
    place = {name: row for row, name in enumerate(items)}
    heads = read_heads(study, lmm, list(items.values()))
    for draw in drawn:
        rows = [[place[id(item)] for item in part] for part in (draw.support, draw.queries)]
        yield draw, heads[rows[0]], heads[rows[1]]


@dataclass(frozen=True)
class Ballots:
    """How every head of the model would vote.

    Attributes:
      order: int [M], numbers of the heads (layer * N + place in it), best first.
      votes: int [Q, M], the class that each head votes for, columns by number.
      targets: int [Q], the right class.
      num_classes: C.
      per_layer: N.
      clusters: of the queries.
    """

    order: np.ndarray
    votes: np.ndarray
    targets: np.ndarray
    num_classes: int
    per_layer: int
    clusters: tuple[str, ...]

    @classmethod
    def of(cls, draw: Draw, support: np.ndarray, queries: np.ndarray, **options: Any) -> Ballots:
        """Fit all heads on the support; ``options`` are those of :meth:`SparseAttentionVectors.fit`."""
        layers, per_layer = support.shape[1:3]
        every = SparseAttentionVectors.fit(
            support, draw.labels, layers * per_layer, class_names=draw.classes, **options
        )
        order = np.array([layer * per_layer + head for layer, head in every.heads])
        votes = np.zeros((len(queries), layers * per_layer), np.int64)
        votes[:, order] = every.head_votes(queries)
        return cls(order, votes, draw.targets, len(draw.classes), per_layer, draw.clusters)

    def right(self, heads: np.ndarray) -> np.ndarray:
        """Which queries these heads answer rightly, float [Q]; the best head first, as it decides ties."""
        return (majority(self.votes[:, heads], self.num_classes) == self.targets).astype(np.float64)

    def best(self, number: int = HEADS, depth: int | None = None) -> np.ndarray:
        """The best heads, of the first ``depth`` layers alone if it is given."""
        order = self.order if depth is None else self.order[self.order < depth * self.per_layer]
        return order[:number]


class Sheet:
    """Right and wrong answers under many names, seed by seed, as JSON that is not too long."""

    def __init__(self) -> None:
        self._values: dict[str, list[str]] = {}
        self._clusters: list[list[str]] = []

    def start(self, clusters: Sequence[str]) -> None:
        """The queries of the next seed."""
        self._clusters.append(list(clusters))

    def add(self, name: str, values: np.ndarray) -> None:
        """What one way of answering got right under this seed: 1, 0 or a share, which is kept to a hundredth."""
        self._values.setdefault(name, []).append(" ".join(f"{value:.2f}".rstrip("0").rstrip(".") for value in values))

    def content(self) -> dict[str, Any]:
        """For :meth:`Study.kept`."""
        if any(len(of) != len(self._clusters) for of in self._values.values()):
            raise ValueError("a way of answering lacks a seed")
        return {"clusters": self._clusters, "values": self._values}


def answers(content: Mapping[str, Any], name: str) -> Answers:
    """Of a sheet that was kept, what one way of answering got right."""
    return Answers(
        tuple(np.array(of.split(), float) for of in content["values"][name]),
        tuple(tuple(of) for of in content["clusters"]),
    )


def per_task(
    found: Mapping[str, Any], name: str, tasks: Sequence[str] | None = None, sheet: str = "sheet"
) -> dict[str, Answers]:
    """The same for each task: of all of them, or of these."""
    return {task: answers(found[task][sheet], name) for task in (found if tasks is None else tasks)}


def reworded(item: Item, change: Callable[[str], str]) -> Example:
    """An item's example with another question."""
    return replace(item.example, question=change(item.example.question))
