"""Accuracy against the number of labelled examples, of heads, and of layers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sav_jax.errors import UserError
from sav_jax.eval.report.drawing import Figure, draw, legend_below, line_styles, panels, shares_as_percent
from sav_jax.eval.report.table import Cell, Column, Row, Table
from sav_jax.eval.report.words import bounds, counted, metric_name
from sav_jax.eval.stored import Results

_MOST_LINES = 7
_SPREAD = 0.3  # of the distance between two numbers of shots, for the strokes of one number beside each other
_FARTHEST = 0.4  # from the best, as a share


def shots_figure(table: Table) -> Figure | None:
    """A panel per task with the best methods' results for each number of shots; None if no task has two."""
    tasks: dict[str, list[Column]] = {}
    for column in table.columns:
        tasks.setdefault(column.task, []).append(column)
    tasks = {task: sorted(columns, key=lambda c: c.shots) for task, columns in tasks.items() if len(columns) > 1}
    if not tasks:
        return None
    chosen = {task: _shown(table, columns) for task, columns in tasks.items()}
    place = {row: i for i, row in enumerate(table.rows)}
    cut = any(len(rows) < len(table.rows) for rows in chosen.values())

    def make() -> Any:
        drawing, axes = panels(list(tasks), 3, 3.3, 3.0)
        drawn = {task: sorted(rows, key=place.__getitem__) for task, rows in chosen.items()}
        styles = line_styles([[table.name(row) for row in rows] for rows in drawn.values()])
        handles: dict[str, Any] = {}
        for axis, (task, columns) in zip(axes, tasks.items(), strict=True):
            counts = [column.shots for column in columns]
            gap = min(math.log(after / before) for before, after in itertools.pairwise(counts))
            for i, row in enumerate(drawn[task]):
                aside = math.exp(_SPREAD * gap * ((i + 0.5) / len(drawn[task]) - 0.5))
                style = styles[table.name(row)]
                cells = [(column.shots, cell) for column in columns if (cell := _ranked(table, row, column))]
                x = [count * aside for count, _ in cells]
                y = [cell.run.primary.mean for _, cell in cells]
                (handles[table.name(row)],) = axis.plot(x, y, **style, linewidth=1.3)
                ends = [
                    (at, *found) for at, (_, cell) in zip(x, cells, strict=True) if (found := bounds(cell.run.primary))
                ]
                if ends:
                    axis.vlines(*zip(*ends, strict=True), color=style["color"], linewidth=1)
            axis.set_xscale("log")
            axis.set_xticks(counts, [str(count) for count in counts])
            axis.minorticks_off()
            axis.set_xlim(*(count * math.exp(side * 0.2 * gap) for count, side in ((counts[0], -1), (counts[-1], 1))))
            per_class = "" if columns[0].generative else " per class"
            axis.set_xlabel(f"labelled examples{per_class} (shots)")
            axis.set_ylabel(f"{metric_name(columns[0].metric)} (%)")
            shares_as_percent(axis.yaxis)
        legend_below(
            drawing, {table.name(row): handles[table.name(row)] for row in table.rows if table.name(row) in handles}
        )
        return drawing

    which = (
        f" Drawn are the {_MOST_LINES} best of each task, as far as they are within {100 * _FARTHEST:.0f} points of "
        "the best, and the best without labelled examples."
        if cut
        else ""
    )
    untaught = (
        " A method that sees no labelled examples gives each query the same answer whatever their number; where its "
        "line is not level, the queries differ: examples that are labelled in one draw can be queries in the other."
        if any(not row.uses_support for rows in chosen.values() for row in rows)
        else ""
    )
    return Figure(
        "figure_shots.svg",
        draw(make),
        f"Line chart: {metric_name(table.columns[0].metric)} against labelled examples{counted(table)}, for "
        f"{_names(tasks)}.",
        "What more labelled examples bring: one line per method, vertical strokes are 95 % intervals, side by side so "
        "that none hides another. Lines that rise to the right profit from more examples."
        f"{untaught}{which}",
    )


def sweep_figures(results: Sequence[Results], table: Table, keys: Mapping[tuple[int, str], str]) -> list[Figure]:
    """Accuracy against the number of heads that vote, and against depth; for what has curves.

    Args:
      results: the folders.
      table: of the same.
      keys: (place of the folder, task) -> key whose curves are drawn.
    """
    words = {
        "heads": (
            "figure_heads.svg",
            "attention heads that vote",
            "How many heads should vote: accuracy when only the best heads, by their score on the labelled examples, "
            "vote.",
        ),
        "depth": (
            "figure_depth.svg",
            "layers of the model that are run",
            "How much of the model is needed: accuracy when heads are chosen among the first layers only. Where the "
            "line is flat already, the layers above could be left out, and predictions would be that much faster.",
        ),
    }
    figures = []
    for name, (file, x_label, caption) in words.items():
        found = {}
        for (source, task), key in keys.items():
            of_methods = {
                method: _curve(results[source], key, method, name)
                for method, curves in dict(results[source].part("curves", key)).items()
                if isinstance(curves, dict) and name in curves
            }
            if of_methods:
                title = task if len(results) == 1 else f"{task} ({table.sources[source]})"
                found[title] = of_methods
        if found:
            several = any(len(ys) > 1 for of in found.values() for _, ys in of.values())
            band = " The line is the mean over seeds, the band their range." if several else ""
            figures.append(
                Figure(
                    file,
                    draw(lambda found=found, x_label=x_label, name=name: _draw_sweep(found, x_label, name)),  # type: ignore[misc]
                    f"Line chart: accuracy against {x_label}, for {_names(found)}.",
                    caption + band,
                )
            )
    return figures


def _draw_sweep(found: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]], x_label: str, name: str) -> Any:
    drawing, axes = panels(list(found), 3, 3.3, 2.5)
    methods = list(dict.fromkeys(method for of in found.values() for method in of))
    styles = line_styles([methods])
    handles: dict[str, Any] = {}
    for axis, of_methods in zip(axes, found.values(), strict=True):
        for method, (x, y) in of_methods.items():
            style = styles[method]
            (handles[method],) = axis.plot(x, y.mean(0), **style)
            if len(y) > 1:
                axis.fill_between(x, y.min(0), y.max(0), color=style["color"], alpha=0.18, linewidth=0)
        if name == "heads":
            axis.set_xscale("log")
            ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000) if tick <= max(x)]
            axis.set_xticks(ticks, [str(tick) for tick in ticks])
            axis.minorticks_off()
        else:
            from matplotlib.ticker import MaxNLocator

            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.set_xlim(0.5, float(max(x)) + 0.5)
        axis.set_xlabel(x_label)
        axis.set_ylabel("accuracy (%)")
        shares_as_percent(axis.yaxis)
    if len(handles) > 1:
        legend_below(drawing, handles)
    return drawing


def _curve(results: Results, key: str, method: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """x [P] and accuracy [S, P]."""
    content = dict(results.part("curves", key))[method][name]
    try:
        x, y = np.asarray(content["x"], float), np.asarray(content["per_seed"], float)
    except (KeyError, TypeError, ValueError):
        x, y = np.zeros(0), np.zeros(0)
    if y.ndim != 2 or y.shape[1:] != x.shape or not y.size or not np.isfinite(y).all():
        where = f"sav_jax.curves.{key}.{method}.{name}"
        raise UserError(f'{results.file}: field "{where}" does not hold one number per seed for each "x"')
    return x, y


def _ranked(table: Table, row: Row, column: Column) -> Cell | None:
    cell = table.cells[row, column]
    return cell if cell is not None and cell.ranked else None


def _shown(table: Table, columns: Sequence[Column]) -> set[Row]:
    """The best methods for the most shots, and the best one without labelled examples; none that would squeeze the
    others together.
    """
    ranked = [(row, cell.run.primary.mean) for row, cell in table.of_column(columns[-1]) if cell.ranked]
    near = [row for row, value in ranked if abs(value - ranked[0][1]) <= _FARTHEST]
    return {*near[:_MOST_LINES], *[row for row, _ in ranked if not row.uses_support][:1]}


def _names(names: Mapping[str, Any]) -> str:
    return ", ".join(names)
