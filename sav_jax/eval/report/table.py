"""The table of results: methods by tasks, and which methods share the first place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sav_jax.eval.compare import ALPHA, paired_p, task_metric
from sav_jax.eval.statistics import holm
from sav_jax.eval.stored import Answered, Results, Stored


@dataclass(frozen=True)
class Row:
    """A method of one results folder.

    Attributes:
      source: place of its folder among the results.
      method: its name.
      uses_support: whether it sees labelled examples.
    """

    source: int
    method: str
    uses_support: bool


@dataclass(frozen=True)
class Column:
    """A task with one number of labelled examples, and the metric that the task is judged by.

    Attributes:
      generative: whether answers are written freely: there are no classes, and the examples are counted in all.
    """

    task: str
    shots: int
    metric: str
    higher_is_better: bool
    generative: bool = False


@dataclass(frozen=True)
class Cell:
    """A result.

    Attributes:
      run: the numbers.
      ranked: whether its metric is the column's, so that it can be the best.
      best: whether no method is better.
      tied: whether it is the best or not clearly worse.
    """

    run: Stored
    ranked: bool
    best: bool
    tied: bool


@dataclass(frozen=True)
class Table:
    """All results. ``cells`` has an entry for each row and column, None where a method was not run."""

    sources: tuple[str, ...]
    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    cells: dict[tuple[Row, Column], Cell | None]

    def name(self, row: Row) -> str:
        """The row's name: the method, and the folder where there are several."""
        return row.method if len(self.sources) == 1 else f"{row.method} ({self.sources[row.source]})"

    def of_column(self, column: Column) -> list[tuple[Row, Cell]]:
        """The results of a column, best first; those of another metric last."""
        found = [(row, cell) for row in self.rows if (cell := self.cells[row, column]) is not None]
        sign = -1 if column.higher_is_better else 1
        return sorted(found, key=lambda pair: (not pair[1].ranked, sign * pair[1].run.primary.mean))


def make_table(results: Sequence[Results]) -> Table:
    """Gather the results of one or several folders.

    The best method of a column is not alone where others are statistically tied with it: a method is tied if a test
    against the best, corrected for their number (Holm), does not find a difference. The test is paired, item by item or
    group by group, on identical items; otherwise it takes the two standard errors as independent.
    """
    columns: dict[tuple[str, int], Column] = {}
    rows: dict[tuple[int, str], Row] = {}
    runs: dict[tuple[int, str, str, int], Stored] = {}
    for source, of in enumerate(results):
        for run in of.runs:
            metric = str(of.tasks[run.task].get("metric") or run.metric)
            better = of.higher_is_better(run.key, metric)
            column = Column(run.task, run.shots, metric, better, of.generative(run.task))
            columns.setdefault((run.task, run.shots), column)
            rows.setdefault((source, run.method), Row(source, run.method, run.uses_support))
            runs[source, run.method, run.task, run.shots] = run
    cells: dict[tuple[Row, Column], Cell | None] = {}
    for column in columns.values():
        found = {}
        for row in rows.values():
            if (stored := runs.get((row.source, row.method, column.task, column.shots))) is not None:
                found[row] = stored
        tied = _tied({row: run for row, run in found.items() if run.metric == column.metric}, column, results)
        for row in rows.values():
            cells[row, column] = None
            if row in found:
                ranked = found[row].metric == column.metric
                cells[row, column] = Cell(found[row], ranked, tied.get(row) == 0, row in tied)
    table = Table(_labels(results), tuple(rows.values()), tuple(columns.values()), cells)
    return Table(table.sources, tuple(_sorted(table)), table.columns, cells)


def _tied(runs: dict[Row, Stored], column: Column, results: Sequence[Results]) -> dict[Row, int]:
    """The rows that are tied with the best -> 0 for the best, 1 for the others."""
    if not runs:
        return {}
    sign = 1 if column.higher_is_better else -1
    top = max(sign * run.primary.mean for run in runs.values())
    best = next(row for row, run in runs.items() if sign * run.primary.mean == top)
    others = [row for row in runs if row != best]
    corrected = holm([_p(best, row, runs, results) for row in others])
    tied = {row: 1 for row, p in zip(others, corrected, strict=True) if p >= ALPHA}
    return {best: 0} | tied | {row: 0 for row in others if sign * runs[row].primary.mean == top}


def _p(best: Row, row: Row, runs: dict[Row, Stored], results: Sequence[Results]) -> float:
    """Of no difference between two methods."""
    metric = task_metric(results[best.source], runs[best].task)
    if metric is not None and metric.name == runs[best].metric:
        pair = [_answers(results[one.source], runs[one]) for one in (best, row)]
        if pair[0] and pair[1] and (p := paired_p(pair[0], pair[1], metric)) is not None:
            return p
    one, other = (runs[of].primary for of in (best, row))
    spread = math.hypot(one.stderr or 0, other.stderr or 0)
    if spread == 0:
        return 1.0 if one.mean == other.mean else 0.0
    return math.erfc(abs(one.mean - other.mean) / spread / math.sqrt(2))


def _answers(results: Results, run: Stored) -> dict[int, Answered]:
    """Seed -> answers; empty if there are none."""
    if not results.has_answers(run.key):
        return {}
    answers = results.answers(run.key)
    found = {seed: answers[run.method, seed] for seed in run.seeds if (run.method, seed) in answers}
    return found if len(found) == len(run.seeds) else {}


def _labels(results: Sequence[Results]) -> tuple[str, ...]:
    """Short names of the folders: their models' where these differ, else their own."""
    models = [of.model.rstrip("/").rpartition("/")[2] for of in results]
    folders = [(of.folder.resolve() if isinstance(of.folder, Path) else of.folder).name for of in results]
    for names in (models, folders):
        if len(set(names)) == len(names):
            return tuple(names)
    return tuple(str(of.folder) for of in results)


def _sorted(table: Table) -> list[Row]:
    """Methods without labelled examples first; in either part the best first, by mean rank over the columns."""
    ranks: dict[Row, list[float]] = {row: [] for row in table.rows}
    for column in table.columns:
        of_column = table.of_column(column)
        for place, (row, _) in enumerate(of_column):
            ranks[row].append(place / len(of_column))
    return sorted(table.rows, key=lambda row: (row.uses_support, sum(ranks[row]) / len(ranks[row])))
