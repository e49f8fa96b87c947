"""Pictures of the study, a panel per model, in the style of the reports (``sav_jax/eval/report/drawing.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sav_jax._files import write_file
from sav_jax.eval.report.drawing import draw, legend_below, line_style, panels


@dataclass(frozen=True)
class Line:
    """A line: its name and points; ``thick`` for the one that matters most."""

    name: str
    at: Sequence[float]
    values: Sequence[float]
    thick: bool = False


def curves(
    path: Path,
    found: Sequence[tuple[str, Sequence[Line]]],
    x_label: str,
    *,
    y_label: str = "accuracy (%)",
    mark: float | None = None,
    logarithmic: bool = True,
) -> Path:
    """Draw lines, a panel per title, with a vertical line at ``mark``; return the path."""

    def make() -> Any:
        drawing, axes = panels([title for title, _ in found], 2, 3.9, 3.0)
        handles: dict[str, Any] = {}
        for axis, (_, lines) in zip(axes, found, strict=True):
            for place, line in enumerate(lines):
                style = {"color": "black", "linewidth": 3, "marker": "o"} if line.thick else line_style(place)
                handles[line.name] = axis.plot(line.at, line.values, **style)[0]
            if mark is not None:
                axis.axvline(mark, color="#888888", linewidth=1, linestyle=(0, (3, 2)))
            if logarithmic:
                axis.set_xscale("log")
            ticks = sorted({at for line in lines for at in line.at})
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.minorticks_off()
            axis.set_xlabel(x_label)
        axes[0].set_ylabel(y_label)
        legend_below(drawing, handles, 5)
        return drawing

    write_file(path, draw(make))
    return path


def matrix(
    path: Path,
    found: Sequence[tuple[str, Sequence[Sequence[float]]]],
    names: Sequence[str],
    x_label: str,
    y_label: str,
) -> Path:
    """Draw a square of percentages per title, rows and columns by name, each row coloured from its lowest to its
    highest value; return the path.
    """

    def make() -> Any:
        drawing, axes = panels([title for title, _ in found], 2, 4.6, 4.3)
        for axis, (_, rows) in zip(axes, found, strict=True):
            values = np.array(rows)
            low = values.min(axis=1, keepdims=True)
            shade = (values - low) / np.maximum(values.max(axis=1, keepdims=True) - low, 1e-9)
            axis.imshow(shade, cmap="YlGnBu", vmin=0, vmax=1)
            for (row, column), value in np.ndenumerate(values):
                colour = "white" if shade[row, column] > 0.55 else "black"
                axis.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)
            axis.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
            axis.set_yticks(range(len(names)), names, fontsize=8)
            axis.grid(visible=False)
            axis.set_xlabel(x_label)
        axes[0].set_ylabel(y_label)
        return drawing

    write_file(path, draw(make))
    return path


def reliability(path: Path, found: Sequence[tuple[str, Sequence[tuple[str, np.ndarray, np.ndarray]]]]) -> Path:
    """Draw how many of the answers with some confidence were right, a line per kind of confidence and a panel per
    title; return the path.

    Args:
      path: of the picture.
      found: title -> (kind, whether each answer was right [A], its confidence [A]).
    """
    from sav_jax.eval.report.confidence import calibration_bins

    def make() -> Any:
        drawing, axes = panels([title for title, _ in found], 2, 3.3, 3.1)
        handles: dict[str, Any] = {}
        for axis, (_, kinds) in zip(axes, found, strict=True):
            axis.plot([0, 100], [0, 100], color="#888888", linewidth=1, linestyle=(0, (3, 2)))
            for place, (kind, right, sure) in enumerate(kinds):
                mean, share, counts = calibration_bins(sure, right)
                kept = counts >= max(10, 0.002 * counts.sum())  # a bin of a few answers is noise
                handles[kind] = axis.plot(100 * mean[kept], 100 * share[kept], **line_style(place))[0]
            axis.set_xlabel("said probability (%)")
        axes[0].set_ylabel("right answers (%)")
        legend_below(drawing, handles)
        return drawing

    write_file(path, draw(make))
    return path
