"""Numbers and names as people read them, for HTML, Markdown and LaTeX alike (nothing is escaped here)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

from sav_jax.eval.report.table import Cell, Column, Row, Table
from sav_jax.eval.stored import Estimate

T = TypeVar("T")

_MOST_NAMES = 4
_PERCENT = "\u00a0%"  # never at the beginning of a line

_METRICS = {
    "acc": ("accuracy", "share of the queries that are answered correctly"),
    "acc_offered": ("accuracy (offered)", "accuracy when only the classes that the question offers are allowed"),
    "macro_f1": ("macro-F1", "mean over the classes of the harmonic mean of precision and recall"),
    "auroc": ("AUROC", "area under the ROC curve: chance that a right class outscores a wrong one; 0.5 is guessing"),
    "ece": ("ECE", "expected calibration error: mean gap between confidence and accuracy"),
    "brier": ("Brier score", "squared distance between probabilities and truth"),
    "log_loss": ("log loss", "minus log probability of the right class, in nats"),
    "aurc": ("AURC", "area under the risk-coverage curve: mean error rate over all numbers of answers kept"),
    "cider": ("CIDEr-D", "agreement of a caption with people's in their rarer words and phrases; 10 is a copy"),
    "vqa_acc": ("VQA accuracy", "1 if three people or more gave the answer, two thirds for two, and so on"),
    "exact_match": ("exact match", "share of the answers that are one of the references, word by word"),
}


def metric_name(metric: str) -> str:
    """A metric's name in a sentence."""
    return _METRICS.get(metric, (metric.replace("_", " "), ""))[0]


def metric_description(metric: str) -> str:
    """One line, "" for a metric that only its task knows."""
    return _METRICS.get(metric, ("", ""))[1]


def scale(metric: str) -> str:
    """What a number of :func:`percent` is said to be."""
    return "times 100" if metric == "cider" else "in percent"


def percent(share: float) -> str:
    """One digit after the point: the intervals are seldom narrower."""
    return f"{100 * share:.1f}"


def mean_and_sd(estimate: Estimate) -> str:
    """In percent; the standard deviation over seeds where there is one."""
    sd = "" if estimate.sd is None else f" ± {percent(estimate.sd)}"
    return f"{percent(estimate.mean)}{sd}"


def bounds(estimate: Estimate) -> tuple[float, float] | None:
    """The interval; None if there is none or if it has no width.

    It has none if all that is resampled, single queries or groups of them, has the same result: then resampling cannot
    say how sure the mean is.
    """
    return None if estimate.ci is None or _flat(estimate) else estimate.ci


def _flat(estimate: Estimate) -> bool:
    return estimate.ci is not None and estimate.ci[1] - estimate.ci[0] < 1e-9  # but for rounding


def interval(estimate: Estimate) -> str:
    """In percent; "" if there is none."""
    ends = bounds(estimate)
    return "" if ends is None else f"{percent(ends[0])}–{percent(ends[1])}"


def interval_or_why(estimate: Estimate) -> str:
    """:func:`interval`, or two words in its place that :func:`legend` explains."""
    return "no spread" if _flat(estimate) else interval(estimate)


def shots(count: int) -> str:
    return f"{count} shot{'s' * (count != 1)}"


def per_class(count: int, generative: bool) -> str:
    """How many labelled examples there are, in a task with classes or with free answers."""
    return shots(count) if generative else f"{shots(count)} per class"


def counted(table: Table) -> str:
    """What shots are labelled examples of: "" or " per class"."""
    free = [column.generative for column in table.columns]
    return "" if all(free) else " per class" if not any(free) else " per class (in all, where answers are free)"


def column_name(column: Column, table: Table) -> str:
    """Task, shots where they differ, metric where they do."""
    several = len({of.shots for of in table.columns}) > 1
    metrics = len({of.metric for of in table.columns}) > 1
    return ", ".join(
        [column.task, *([shots(column.shots)] * several), *([metric_name(column.metric)] * metrics)],
    )


def one_line(text: str) -> str:
    """Line breaks and tabs as spaces; spaces that may not break stay."""
    return re.sub(r"[ \t\r\n\f\v\u2028\u2029]+", " ", text).strip(" ")


def listed(names: Sequence[str]) -> str:
    """a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def chunks(items: Sequence[T], most: int) -> list[Sequence[T]]:
    """Parts of about equal length, none longer than ``most``."""
    count = -(-len(items) // most)
    size = max(1, -(-len(items) // max(count, 1)))
    return [items[start : start + size] for start in range(0, len(items), size)]


def most_shots(table: Table) -> list[Column]:
    """Of each task the column with the most labelled examples."""
    columns: dict[str, Column] = {}
    for column in table.columns:
        if column.task not in columns or column.shots > columns[column.task].shots:
            columns[column.task] = column
    return list(columns.values())


def in_short(table: Table, column: Column) -> str:
    """Who is highest on a task, and whether that is clear: by the tests that mark the table."""
    ranked = [(row, cell) for row, cell in table.of_column(column) if cell.ranked]
    where = f"{column.task}, {per_class(column.shots, column.generative)}: "
    if not ranked:
        return f"{where}no method has the metric {metric_name(column.metric)}."
    row, best = ranked[0]
    found, unit = interval(best.run.primary), "" if column.metric == "cider" else _PERCENT
    value = f"{percent(best.run.primary.mean)}{unit}" + (f" (95{_PERCENT} interval {found})" if found else "")
    high, above = ("highest", "above") if column.higher_is_better else ("lowest", "below")
    first = [table.name(one) for one, cell in ranked if cell.best]
    text = (
        f"{where}{listed(first)} {'is' if len(first) == 1 else 'are'} {high} with {metric_name(column.metric)} {value}"
    )
    others = ranked[len(first) :]
    tied = [table.name(other) for other, cell in others if cell.tied]
    if len(tied) > _MOST_NAMES + 1:
        tied = [*tied[:_MOST_NAMES], f"{len(tied) - _MOST_NAMES} more"]
    if tied:
        text += f", but not clearly {above} {listed(tied)}"
    elif others:
        text += f", clearly {above} " + (f"all {len(others)} others" if len(others) > 1 else table.name(others[0][0]))
    untaught = [(of, cell) for of, cell in ranked if not of.uses_support and cell is not best]
    if row.uses_support and untaught:
        other, cell = untaught[0]
        value = f"{percent(cell.run.primary.mean)}{unit}"
        if other.method == "chance":
            text += f". Without labelled examples nothing is {above} chance, which is {value}"
        else:
            text += f". Without labelled examples {table.name(other)} is {high} with {value}"
    return f"{text}."


def cell_text(cell: Cell, column: Column) -> str:
    """A cell in one line."""
    found = interval_or_why(cell.run.primary)
    other = "" if cell.ranked else f" {metric_name(cell.run.metric)}"
    return mean_and_sd(cell.run.primary) + (f" ({found})" if found else "") + other


def legend(table: Table) -> str:
    """How to read a cell of the table."""
    several = any(cell is not None and cell.run.primary.sd is not None for cell in table.cells.values())
    with_interval = any(cell is not None and bounds(cell.run.primary) for cell in table.cells.values())
    flat = (
        " “No spread” stands where all queries, or all groups of queries that are resampled together, have the same "
        "result, as when both questions about a picture get the same answer and one of the two is right: there is no "
        "interval then, which does not mean that the number is certain."
        if any(cell is not None and _flat(cell.run.primary) for cell in table.cells.values())
        else ""
    )
    metrics = {column.metric for column in table.columns}
    what = metric_name(next(iter(metrics))).capitalize() if len(metrics) == 1 else "The task's metric"
    parts = [f"{what} in %"]
    if several:
        parts.append("mean over seeds ± standard deviation between them (each seed draws other labelled examples)")
    if with_interval:
        parts.append(f"and the 95{_PERCENT} confidence interval for the choice of queries")
    shots_told = (
        f" Shots are labelled examples{counted(table)}." if len({column.shots for column in table.columns}) > 1 else ""
    )
    cider = " CIDEr-D is shown times 100, as papers print it." if "cider" in metrics else ""
    return f"{', '.join(parts)}.{flat}{shots_told}{cider}"


def row_groups(table: Table) -> list[tuple[str, list[Row]]]:
    """The rows in two parts, each with a title; parts without rows are left out."""
    parts = (("Without labelled examples", False), ("With labelled examples", True))
    groups = [(title, [row for row in table.rows if row.uses_support is uses]) for title, uses in parts]
    return [(title, rows) for title, rows in groups if rows]
