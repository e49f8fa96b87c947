"""What a task is: where its examples come from, which are shown (support) and which are asked (queries).

A task's module turns an author's files into :class:`Item` objects and says what is asked and how answers are scored.
It knows no model, no method and no device.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sav_jax.classifier import choose_shots
from sav_jax.errors import UserError
from sav_jax.eval.metrics import COMMON, Metric
from sav_jax.eval.tasks.release import Release
from sav_jax.examples import Example


@dataclass(frozen=True)
class Item:
    """An example, and what only its task knows about it.

    Attributes:
      example: question, images and right label; in a task with free answers the label is the one of the references that
        a demonstration shows.
      group: items of one group are kept together: scored together where a metric says so, and never split between
        support and queries. "" for an item by itself.
      role: its place in the group, such as "q0i1" or "positive".
      offered: the labels that the question offers, where it does not offer all of the task's.
      references: answers in people's own words, where the data set has them (VizWiz: ten). What free answers are
        scored against.
      subset: a named part of the data set, which gets results of its own.
    """

    example: Example
    group: str = ""
    role: str = ""
    offered: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    subset: str = ""

    @property
    def label(self) -> str:
        return str(self.example.label)


@dataclass(frozen=True)
class Data:
    """What a task's files hold.

    Attributes:
      pool: items that support may be drawn from.
      queries: items to be asked, or None for all of the pool that is not drawn.
    """

    pool: tuple[Item, ...]
    queries: tuple[Item, ...] | None = None


@dataclass(frozen=True)
class Task:
    """A classification task, whose answers are labels, or a generative one, whose answers are free text.

    A generative task has no ``labels``, ``answers`` or ``class_prompt``; its support are ``shots`` items in all, and
    its metrics are its own alone, each with one unit per query.

    Attributes:
      name: on the command line and in the results.
      description: one line: what is asked about what.
      load: reads the data. It is given the folder of this task's files (``DATA_DIR/NAME``, which need not exist) and
        raises a UserError that says what must be fetched from where, if it is not there.
      source: where the data and its definition come from: paper, address.
      release: the files that must be fetched by hand, None if there are none. Tasks of one benchmark share a folder,
        which lies beside the one that ``load`` is given.
      prompt: the question as a template, for the task's card.
      split: in words, what support and queries are drawn from.
      labels: the class names in the order of the columns; None for those of the pool, sorted.
      answers: what the model has to answer for a label, where that is not the label itself ("Yes" for
        "hallucination").
      parse: reads a label out of what a model wrote about an item, None if there is none in it; by default tolerant
        matching of ``answers`` (``sav_jax.eval.parsing``). In a generative task: reads the answer that is scored; by
        default the text without the space around it.
      metric: the metric that the table shows.
      metrics: metrics besides those that all classification tasks have (``sav_jax.eval.metrics``).
      class_prompt: a text about a class, with ``{label}`` in it, for text prototypes and dual encoders.
      generative: whether answers are written freely and scored against ``references``.
      version: raised whenever prompts, labels or examples change: results of different versions are not comparable.

    Example:
      >>> from pathlib import Path
      >>> from sav_jax.eval.tasks import find_task, split_task
      >>> (task,) = find_task("digits")
      >>> data = task.load(Path("data"))  # this one needs no files
      >>> len(data.pool), data.pool[0].example.question, data.pool[0].label
      (1797, 'What digit is this?', '0')
      >>> split = split_task(task, data, shots=20, seed=0)
      >>> len(split.support), len(split.queries)
      (200, 1597)
    """

    name: str
    description: str
    load: Callable[[Path], Data]
    source: str = ""
    release: Release | None = None
    prompt: str = ""
    split: str = "support is drawn from all examples, the others are queries"
    labels: tuple[str, ...] | None = None
    answers: Mapping[str, str] = field(default_factory=dict)
    parse: Callable[[str, Item], str | None] | None = None
    metric: str = "acc"
    metrics: tuple[Metric, ...] = ()
    class_prompt: str = "a photo of a {label}."
    generative: bool = False
    version: int = 1

    @property
    def kind(self) -> str:
        """ "generation" or "classification"."""
        return "generation" if self.generative else "classification"

    @property
    def all_metrics(self) -> tuple[Metric, ...]:
        """What results are measured by: what all classification tasks have, and the task's own."""
        return self.metrics if self.generative else (*COMMON, *self.metrics)

    def answer(self, label: str) -> str:
        """What the model has to answer for ``label``."""
        return self.answers.get(label, label)


@dataclass(frozen=True)
class Split:
    """What all methods see of a task, for one number of shots and one seed.

    Attributes:
      support: labelled items, the only ones whose labels a method may look at.
      queries: items to be classified.
      labels: class names, in the order of the columns; none in a generative task.
      available: number of queries before any limit.
      leaked: queries that also stand in the support, same question and pixels; 0 unless leaks were allowed.
      digest: SHA-256 of all questions, labels and images, in order. Equal digests: results may be compared.
      corpus: references of all queries before any limit, of generative tasks: what words are rare in them does not
        depend on how many are asked.
    """

    support: tuple[Item, ...]
    queries: tuple[Item, ...]
    labels: tuple[str, ...]
    available: int
    leaked: int
    digest: str
    corpus: tuple[tuple[str, ...], ...] = ()


class Digests:
    """SHA-256 of items, each image read once however many splits there are."""

    def __init__(self) -> None:
        self._prompts: dict[int, tuple[Item, str]] = {}
        self._outlines: dict[int, tuple[Item, tuple[Any, ...]]] = {}
        self._pixels: dict[int, tuple[Item, tuple[str, ...]]] = {}

    def prompt(self, item: Item) -> str:
        """Of question, contents of images and videos, and how many frames are shown."""
        known = self._prompts.get(id(item))  # the item is kept, so that its id stays its own
        if known is None:
            example = item.example
            videos = [[digest, example.frames] for digest in example.video_digests()]
            facts = json.dumps([example.question, *example.image_digests(), *videos])
            known = self._prompts[id(item)] = item, hashlib.sha256(facts.encode()).hexdigest()
        return known[1]

    def leaks(self, support: Sequence[Item], queries: Sequence[Item]) -> list[tuple[Item, Item]]:
        """Queries whose question, pixels and videos also stand in the support, with the support's item.

        Pictures are compared as they are shown, however they are stored. Only those are decoded of which another with
        the same question has the same size; the headers of all are read, so that what is no picture is found here.
        """
        outlines = {self._outline(item) for item in support}
        suspects = [item for item in queries if self._outline(item) in outlines]
        outlines = {self._outline(item) for item in suspects}
        shown = {self._shown(item): item for item in support if self._outline(item) in outlines}
        return [(item, shown[self._shown(item)]) for item in suspects if self._shown(item) in shown]

    def _outline(self, item: Item) -> tuple[Any, ...]:
        """Question, sizes of the images, contents of the videos and how many frames are shown."""
        if id(item) not in self._outlines:
            example = item.example
            videos = (*example.video_digests(), example.frames) if example.videos else ()
            self._outlines[id(item)] = item, (example.question, *example.image_sizes(), *videos)
        return self._outlines[id(item)][1]

    def _shown(self, item: Item) -> tuple[Any, ...]:
        """The same with the images' pixels."""
        if id(item) not in self._pixels:
            self._pixels[id(item)] = item, tuple(item.example.pixel_digests())
        return *self._outline(item), *self._pixels[id(item)][1]

    def whole(self, item: Item) -> str:
        """Of question, image contents, label and references."""
        answers = f"{item.example.label!r}{list(item.references) if item.references else ''}"
        return hashlib.sha256(f"{self.prompt(item)} {answers}".encode()).hexdigest()


def split_task(
    task: Task,
    data: Data,
    shots: int,
    seed: int,
    limit: int | None = None,
    *,
    allow_leak: bool = False,
    digests: Digests | None = None,
) -> Split:
    """Draw the support and the queries; the same arguments give the same split on every machine.

    A class's draw depends on the seed and its own items alone, and fewer shots are part of more
    (:func:`sav_jax.classifier.choose_shots`). Groups of which an item was drawn are asked no questions.

    Args:
      task: the task.
      data: what ``task.load`` returned.
      shots: labelled examples per class; of a generative task, in all.
      seed: of both draws.
      limit: keep only about so many queries, whole groups drawn at random; their order stays.
      allow_leak: go on when a query also stands in the support.
      digests: shared by splits of the same data.

    Raises:
      UserError: if a class has too few examples, too little is left to ask, or the support holds a query.
    """
    digests = digests or Digests()
    pool = data.pool
    labels = ["" if task.generative else item.label for item in pool]
    names = _class_names(task, labels, shots)
    support = [pool[i] for i in choose_shots(labels, shots, seed)]
    taken = {id(item) for item in support}
    groups = {item.group for item in support if item.group}
    asked = pool if data.queries is None else data.queries
    queries = [item for item in asked if id(item) not in taken and item.group not in groups]
    if not queries:
        raise UserError(f"task {task.name}: --shots {shots} leaves no queries")
    for query in queries:
        if not task.generative and query.label not in names:
            raise UserError(f'{query.example.source}: field "label" is {query.label!r}, which no support example has')
    leaks = digests.leaks(support, queries)
    if leaks and not allow_leak:
        asked_again, twin = (item.example for item in leaks[0])
        leaking = f"{len(leaks)} queries also stand" if len(leaks) > 1 else "1 query also stands"
        raise UserError(
            f"task {task.name}: {leaking} in the support, same question and images, the first "
            f"being {asked_again.source or asked_again.id} = {twin.source or twin.id} "
            "(--allow-leak to go on all the same)"
        )
    available = len(queries)
    corpus = tuple(item.references for item in queries) if task.generative else ()
    if limit is not None:
        queries = _limited(queries, limit, seed, digests)
    text = "\n".join(digests.whole(item) for item in [*support, *queries])
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Split(tuple(support), tuple(queries), names, available, len(leaks), digest, corpus)


def _class_names(task: Task, labels: Sequence[str], shots: int) -> tuple[str, ...]:
    """The classes of a pool with these labels, each of which has enough examples; none of a generative task."""
    if task.generative:
        if len(labels) < shots:
            raise UserError(
                f"task {task.name}: there are {len(labels)} examples to draw from, fewer than --shots {shots}"
            )
        return ()
    names = task.labels or tuple(sorted(set(labels)))
    if len(names) < 2:
        raise UserError(f"task {task.name}: every support example has the label {names[0]!r}; at least two are needed")
    for name, count in (dict.fromkeys(names, 0) | Counter(labels)).items():
        if name not in names:
            raise UserError(f"task {task.name}: {name!r} is none of its labels ({', '.join(names)})")
        if count < shots:
            raise UserError(f"task {task.name}: class {name!r} has {count} examples, fewer than --shots {shots}")
    return tuple(names)


def _limited(queries: Sequence[Item], limit: int, seed: int, digests: Digests) -> list[Item]:
    """Whole groups drawn at random until ``limit`` queries are reached.

    The lot of a group is its own: other numbers of shots, which leave other queries, draw the same ones.
    """
    if limit < 1:
        raise UserError(f"--limit must be at least 1, not {limit}")
    members: dict[str, list[int]] = {}
    for place, item in enumerate(queries):
        members.setdefault(item.group or f"\0{digests.whole(item)} {item.example.id}", []).append(place)
    kept: list[int] = []
    for group in sorted(members, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest()):
        if kept and len(kept) + len(members[group]) > limit:
            break
        kept += members[group]
    return [queries[place] for place in sorted(kept)]


def relabelled(item: Item, label: str) -> Item:
    """The same item with another label."""
    return dataclasses.replace(item, example=dataclasses.replace(item.example, label=label))


def default_data_dir() -> Path:
    """Where benchmarks are looked for unless told otherwise: ``$SAV_JAX_DATA``, else ``~/.cache/sav_jax/data``."""
    if chosen := os.environ.get("SAV_JAX_DATA"):
        return Path(chosen)
    from sav_jax._storage import is_url
    from sav_jax.headstore import default_cache_dir, local_cache_dir

    cache = default_cache_dir()
    return Path(local_cache_dir() if is_url(cache) else cache) / "data"
