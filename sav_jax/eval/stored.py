"""Results folders, read back: ``results.json`` and ``samples_KEY.jsonl`` as ``sav-jax eval`` writes them.

Everything is checked on the way in, so that whoever compares or draws works on whole results.

Axes: Q queries, C classes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar, cast

import numpy as np

from sav_jax._storage import AnyPath, Location, location
from sav_jax.errors import UserError
from sav_jax.eval.metrics import Answers
from sav_jax.eval.tasks.base import Item
from sav_jax.examples import Example

T = TypeVar("T")
_KINDS: dict[Any, str] = {str: "text", int: "a whole number", float: "a number", dict: "an object", list: "a list"}


@dataclass(frozen=True)
class Query:
    """What was asked.

    Attributes:
      digest: SHA-256 of question, images and right label ("doc_hash").
      id, group, subset, role: of the item; "" for none.
      question, target: as asked, and the right label (of a task with free answers: one of the references).
      references: people's answers, of a task with free answers.
    """

    digest: str
    id: str
    group: str
    subset: str
    question: str
    target: str
    role: str = ""
    references: tuple[str, ...] = ()

    @property
    def cluster(self) -> str:
        """Name of what is independent of other clusters: the group, or the query by itself."""
        return self.group or self.digest


@dataclass(frozen=True)
class Answered:
    """One method's answers under one seed.

    Attributes:
      queries: Q.
      predictions: Q class names or free answers; "" for none.
      scores: float [Q], what each scores: 1 for right and 0 for wrong, or in a task with free answers its metric.
      probabilities: float [Q, C], None if the method has none.
      labels: C class names, the order of the columns.
      graded: the metric that ``scores`` are of.
    """

    queries: tuple[Query, ...]
    predictions: tuple[str, ...]
    scores: np.ndarray
    probabilities: np.ndarray | None
    labels: tuple[str, ...] = ()
    graded: str = "acc"

    @property
    def right(self) -> np.ndarray:
        """Whether each is fully right, bool [Q]."""
        return self.scores == 1

    @cached_property
    def answers(self) -> Answers:
        """What metrics are computed from, as far as it is stored: images, offered labels and references are not."""
        items = tuple(
            Item(Example("(stored)", label=q.target, id=q.id), group=q.group, role=q.role, subset=q.subset)
            for q in self.queries
        )
        names = tuple(query.digest for query in self.queries)
        return Answers(items, self.labels, self.predictions, probabilities=self.probabilities, names=names)

    def take(self, index: np.ndarray) -> Answered:
        """The answers to some queries, int [Q']."""
        rows = index.tolist()
        return Answered(
            tuple(self.queries[row] for row in rows),
            tuple(self.predictions[row] for row in rows),
            self.scores[index],
            None if self.probabilities is None else self.probabilities[index],
            self.labels,
            self.graded,
        )


@dataclass(frozen=True)
class Estimate:
    """A metric over the seeds of a run; what was not computed is None."""

    mean: float
    sd: float | None
    stderr: float | None
    ci: tuple[float, float] | None
    per_seed: tuple[float, ...]


@dataclass(frozen=True)
class Stored:
    """One method on one task with one number of shots, over all seeds: an entry of "runs"."""

    task: str
    key: str
    method: str
    shots: int
    seeds: tuple[int, ...]
    metric: str
    uses_support: bool
    metrics: Mapping[str, Estimate]
    subsets: Mapping[str, Mapping[str, float]]
    seconds: float | None

    @property
    def primary(self) -> Estimate:
        return self.metrics[self.metric]


class Results:
    """A results folder.

    Attributes:
      folder: its path.
      content: results.json, whole.
      ours: its part "sav_jax".
      runs: what was run, in the order of the file.
    """

    def __init__(self, folder: AnyPath) -> None:
        """Read ``results.json``.

        Raises:
          UserError: if it is missing or damaged.
        """
        self.folder = location(folder)
        self.file = self.folder / "results.json"
        try:
            if not self.folder.is_dir():
                raise UserError(f"{self.folder}: is no folder of results; 'sav-jax eval' writes one (--output-path)")
            if not self.file.is_file():
                raise UserError(f"{self.file}: does not exist; 'sav-jax eval' writes it")
            content = json.loads(self.file.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{self.file}: cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise UserError(f"{self.file}: is not JSON, perhaps cut short: {error}") from None
        if not isinstance(content, dict) or "sav_jax" not in content:
            raise UserError(f'{self.file}: has no field "sav_jax"; it was not written by this version of sav-jax eval')
        self.content: dict[str, Any] = content
        self.ours = self._get(content, "sav_jax", dict)
        entries = self._get(self.ours, "runs", list, "sav_jax.")
        self.runs = tuple(self._run(entry, f"sav_jax.runs[{i}]") for i, entry in enumerate(entries))
        if not self.runs:
            raise UserError(f'{self.file}: field "sav_jax.runs" is empty')

    @property
    def model(self) -> str:
        """The model's name, "no model" if none was needed."""
        return str(self.content.get("model_name") or "no model")

    @cached_property
    def tasks(self) -> dict[str, dict[str, Any]]:
        """Task -> "labels" (checked), "kind", "metric", "description", "version", "source", "prompt"."""
        tasks = self._get(self.ours, "tasks", dict, "sav_jax.")
        for name in dict.fromkeys(run.task for run in self.runs):
            task = self._get(tasks, name, dict, "sav_jax.tasks.")
            labels = self._get(task, "labels", list, f"sav_jax.tasks.{name}.")
            if task.get("kind") == "generation":
                self._get(task, "metric", str, f"sav_jax.tasks.{name}.")
            elif not labels or not all(isinstance(label, str) for label in labels):
                raise UserError(f'{self.file}: field "sav_jax.tasks.{name}.labels" is no list of class names')
        return tasks

    def generative(self, task: str) -> bool:
        """Whether a task's answers are written freely."""
        return bool(self.tasks[task].get("kind") == "generation")

    def graded(self, task: str) -> str:
        """The metric that every single answer to a task has: accuracy, or a generative task's own."""
        return str(self.tasks[task]["metric"]) if self.generative(task) else "acc"

    def run(self, task: str, shots: int, method: str) -> Stored | None:
        for run in self.runs:
            if (run.task, run.shots, run.method) == (task, shots, method):
                return run
        return None

    def part(self, name: str, key: str) -> dict[str, Any] | list[Any]:
        """What "sav_jax" holds of a key under a name such as "heads"; empty if there is none."""
        whole = self.ours.get(name) or {}
        found = whole.get(key) if isinstance(whole, dict) else None
        return found if isinstance(found, dict | list) else {}

    def higher_is_better(self, key: str, metric: str) -> bool:
        known = self.content.get("higher_is_better")
        of_key = known.get(key) if isinstance(known, dict) else None
        return bool(of_key.get(metric, True)) if isinstance(of_key, dict) else True

    def has_answers(self, key: str) -> bool:
        """Whether single answers were written (``--log-samples``)."""
        return (self.folder / f"samples_{key}.jsonl").exists()

    def answers(self, key: str) -> dict[tuple[str, int], Answered]:
        """Read ``samples_KEY.jsonl``: (method, seed) -> answers. Methods without predictions are not among them.

        Raises:
          UserError: if the file is missing, damaged or cut short.
        """
        if key not in self._answers:
            self._answers[key] = self._read_answers(key)
        return self._answers[key]

    @cached_property
    def _answers(self) -> dict[str, dict[tuple[str, int], Answered]]:
        return {}

    def _get(self, mapping: Mapping[str, Any], name: str, kind: type[T], above: str = "") -> T:
        return _field(mapping, name, kind, str(self.file), above)

    def _run(self, entry: Any, where: str) -> Stored:
        if not isinstance(entry, dict):
            raise UserError(f'{self.file}: field "{where}" is not an object')
        above = f"{where}."
        metrics = {}
        for name, values in self._get(entry, "metrics", dict, above).items():
            metrics[name] = self._estimate(values, f"{above}metrics.{name}")
        run = Stored(
            task=self._get(entry, "task", str, above),
            key=self._get(entry, "key", str, above),
            method=self._get(entry, "method", str, above),
            shots=self._get(entry, "shots", int, above),
            seeds=tuple(self._get(entry, "seeds", list, above)),
            metric=self._get(entry, "metric", str, above),
            uses_support=bool(entry.get("uses_support", True)),
            metrics=metrics,
            subsets=entry.get("subsets") or {},
            seconds=entry.get("seconds"),
        )
        if run.metric not in metrics:
            raise UserError(f'{self.file}: field "{above}metrics" lacks {run.metric!r}, which is the run\'s metric')
        if not run.seeds or not all(isinstance(seed, int) for seed in run.seeds):
            raise UserError(f'{self.file}: field "{above}seeds" is no list of whole numbers')
        if os.sep in run.key or run.key in ("", ".", ".."):
            raise UserError(f'{self.file}: field "{above}key" is {run.key!r}, which can be no part of a file name')
        return run

    def _estimate(self, values: Any, where: str) -> Estimate:
        if not isinstance(values, dict):
            raise UserError(f'{self.file}: field "{where}" is not an object')
        mean = self._get(values, "mean", float, f"{where}.")
        ci = values.get("ci")
        if ci is not None and not (isinstance(ci, list) and len(ci) == 2 and all(map(_is_number, ci))):
            raise UserError(f'{self.file}: field "{where}.ci" is neither null nor two numbers')
        for name in ("sd", "stderr"):
            if values.get(name) is not None:
                self._get(values, name, float, f"{where}.")
        per_seed = values.get("per_seed") or []
        return Estimate(mean, values.get("sd"), values.get("stderr"), tuple(ci) if ci else None, tuple(per_seed))

    def _read_answers(self, key: str) -> dict[tuple[str, int], Answered]:
        file = self.folder / f"samples_{key}.jsonl"
        runs = [run for run in self.runs if run.key == key]
        task = runs[0].task
        labels = {label: i for i, label in enumerate(self.tasks[task]["labels"])}
        free, graded = self.generative(task), self.graded(task)
        rows: dict[tuple[str, int], list[_Row]] = {}
        known: dict[Query, Query] = {}  # one object per query, however many methods and seeds
        try:
            with file.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    method, seed, row = _read_row(line, f"{file} row {number}", labels, graded, free=free)
                    row.query = known.setdefault(row.query, row.query)
                    rows.setdefault((method, seed), []).append(row)
        except FileNotFoundError:
            raise UserError(f"{file}: does not exist; 'sav-jax eval' writes it (--log-samples)") from None
        except UnicodeDecodeError:
            raise UserError(f"{file}: is not UTF-8 text") from None
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from None
        self._check_counts(file, runs, {name: len(of) for name, of in rows.items()})
        return {
            name: _gather(of, tuple(labels), graded, f"{file}, method {name[0]}, seed {name[1]}")
            for name, of in rows.items()
        }

    def _check_counts(self, file: Location, runs: list[Stored], counts: dict[tuple[str, int], int]) -> None:
        """A file that was cut short at the end of a row looks whole: the splits say how many rows there must be."""
        for run in runs:
            for seed in run.seeds:
                split = cast(dict[str, Any], self.part("splits", run.key)).get(str(seed))
                asked = split.get("queries") if isinstance(split, dict) else None
                if not isinstance(asked, int):
                    name = f"sav_jax.splits.{run.key}.{seed}.queries"
                    raise UserError(f'{self.file}: field "{name}" is missing or no whole number')
                found = counts.get((run.method, seed), 0)
                # Without a standard error a method has no predictions, only an expected accuracy.
                answered = any(estimate.stderr is not None for estimate in run.metrics.values())
                if found != asked and (found or answered):
                    raise UserError(
                        f"{file}: holds {found} rows of method {run.method}, seed {seed}, where {asked} queries were "
                        "asked; it is damaged, cut short or of another run"
                    )


@dataclass
class _Row:
    query: Query
    prediction: str
    score: float
    probabilities: np.ndarray | None


def _read_row(line: str, where: str, labels: Mapping[str, int], graded: str, *, free: bool) -> tuple[str, int, _Row]:
    """A row of a task with these labels, or with free answers graded by a metric: method, seed and the rest."""
    try:
        row = json.loads(line)
    except ValueError:
        raise UserError(f"{where}: is not JSON, perhaps cut short") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: is not an object")
    doc = _field(row, "doc", dict, where)
    query = Query(
        digest=_field(row, "doc_hash", str, where),
        id=str(doc.get("id", "")),
        group=str(doc.get("group") or ""),
        subset=str(doc.get("subset") or ""),
        question=_field(row, "input", str, where),
        target=_field(row, "target", str, where),
        role=str(doc.get("role") or ""),
        references=tuple(map(str, _field(row, "references", list, where))) if free else (),
    )
    if not free and query.target not in labels:
        raise UserError(f'{where}: field "target" is {query.target!r}, which is no label of the task')
    answers = _field(row, "filtered_resps", list, where)
    if len(answers) != 1 or not isinstance(answers[0], str):
        raise UserError(f'{where}: field "filtered_resps" is not one text in a list')
    score = _field(row, graded, float, where)
    if not free and score not in (0, 1):
        raise UserError(f'{where}: field "acc" is {score}, neither 0 nor 1')
    shares = row.get("probabilities")
    vector = None
    if shares is not None:
        if not isinstance(shares, dict) or shares.keys() != labels.keys() or not all(map(_is_number, shares.values())):
            raise UserError(f'{where}: field "probabilities" is not one number for each label of the task')
        vector = np.array([shares[label] for label in labels], np.float64)
    method, seed = _field(row, "filter", str, where), _field(row, "seed", int, where)
    return method, seed, _Row(query, answers[0], score, vector)


def _gather(rows: list[_Row], labels: tuple[str, ...], graded: str, where: str) -> Answered:
    vectors = [row.probabilities for row in rows if row.probabilities is not None]
    if vectors and len(vectors) < len(rows):
        raise UserError(f'{where}: only {len(vectors)} of {len(rows)} rows have the field "probabilities"')
    return Answered(
        queries=tuple(row.query for row in rows),
        predictions=tuple(row.prediction for row in rows),
        scores=np.array([row.score for row in rows], np.float64),
        probabilities=np.stack(vectors) if vectors else None,
        labels=labels,
        graded=graded,
    )


def _field(mapping: Mapping[str, Any], name: str, kind: type[T], where: str, above: str = "") -> T:
    """A field that must be there and of this kind."""
    if name not in mapping:
        raise UserError(f'{where}: field "{above}{name}" is missing')
    value = mapping[name]
    good = _is_number(value) if kind is float else isinstance(value, kind) and not isinstance(value, bool)
    if not good:
        raise UserError(f'{where}: field "{above}{name}" is not {_KINDS[kind]}')
    return cast(T, value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))
