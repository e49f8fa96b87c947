"""Whether probabilities mean what they say, and what it brings to answer only when sure.

Axes: A answers, of all seeds together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sav_jax.eval.report.drawing import Figure, draw, legend_below, line_styles, new_figure, panels, shares_as_percent
from sav_jax.eval.stored import Answered

_BINS = 10
_MOST_PANELS, _MOST_LINES = 8, 7
_FEWEST = 30  # answers that an error rate is drawn of: one of them is 3 points


def sureness(answers: Sequence[Answered], labels: Sequence[str]) -> tuple[np.ndarray, np.ndarray] | None:
    """The probability of each given answer, float [A], and whether it is right, bool [A]; None without probabilities.

    A query that got no answer has the probability 0.
    """
    column = {label: i for i, label in enumerate(labels)}
    sure, right = [], []
    for answered in answers:
        if answered.probabilities is None:
            return None
        places = np.array([column.get(label, -1) for label in answered.predictions])
        sure.append(np.where(places >= 0, answered.probabilities[np.arange(len(places)), places], 0.0))
        right.append(answered.right)
    return (np.concatenate(sure), np.concatenate(right)) if sure else None


def calibration_bins(sure: np.ndarray, right: np.ndarray, bins: int = _BINS) -> tuple[np.ndarray, ...]:
    """Mean probability, share right, and number of answers of each bin (i / bins, (i + 1) / bins] that has some."""
    place = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    used = counts > 0
    mean = np.bincount(place, weights=sure, minlength=bins)[used] / counts[used]
    share = np.bincount(place, weights=right, minlength=bins)[used] / counts[used]
    return mean, share, counts[used]


def risk_curve(sure: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Share of wrong answers among the n surest, n = 1 to A, float [A]; equally sure ones in expectation."""
    order = np.argsort(-sure, kind="stable")
    _, tie = np.unique(-sure[order], return_inverse=True)
    wrong = np.bincount(tie, weights=~right[order]) / np.bincount(tie)
    return np.cumsum(wrong[tie]) / np.arange(1, len(sure) + 1)


def reliability_figure(
    found: Mapping[str, tuple[np.ndarray, np.ndarray]], errors: Mapping[str, float | None], name: str
) -> Figure:
    """A panel per method, the most accurate first.

    Args:
      found: method -> :func:`sureness`.
      errors: method -> expected calibration error, or None.
      name: of the file.
    """
    shown = list(found)[:_MOST_PANELS]

    def make() -> Any:
        drawing, axes = panels(shown, 4, 2.5, 2.5)
        for axis, method in zip(axes, shown, strict=True):
            mean, share, counts = calibration_bins(*found[method])
            axis.plot([0, 1], [0, 1], color="#888888", linewidth=1, linestyle=(0, (3, 2)))
            axis.vlines(mean, mean, share, color="#D55E00", linewidth=1.2)
            axis.scatter(mean, share, s=5 + 170 * counts / counts.sum(), color="#0072B2", zorder=3, clip_on=False)
            if errors.get(method) is not None:
                axis.set_title(axis.get_title(loc="left"), pad=18)  # outside, where no point can lie on it
                axis.text(0, 1.03, f"ECE {errors[method]:.3f}", transform=axis.transAxes, va="bottom")
            axis.set_xlim(0, 1.02)
            axis.set_ylim(0, 1.04)
            axis.set_xticks([0, 0.25, 0.5, 0.75, 1])
            axis.set_yticks([0, 0.25, 0.5, 0.75, 1])
            axis.set_aspect("equal")
            shares_as_percent(axis.xaxis)
            shares_as_percent(axis.yaxis)
            axis.set_xlabel("said probability (%)")
            axis.set_ylabel("right answers (%)")
        return drawing

    cut = f" The {len(shown)} most accurate methods are shown." if len(shown) < len(found) else ""
    return Figure(
        name,
        draw(make),
        f"Reliability diagrams of {', '.join(shown)}.",
        "Do probabilities mean what they say: answers are grouped by the probability that the method gave them, and "
        "each point shows how many of a group were right; large points hold many answers. On the dashed diagonal a "
        "method is right as often as it says, below it it is too sure of itself; small points rest on few answers. ECE "
        f"is the mean distance (orange) from the diagonal, 0 is perfect.{cut}",
    )


def risk_figure(found: Mapping[str, tuple[np.ndarray, np.ndarray]], name: str) -> Figure:
    """Error rate among the surest answers, for every share of answers kept.

    Args:
      found: method -> :func:`sureness`, the most accurate first.
      name: of the file.
    """
    shown = list(found)[:_MOST_LINES]
    fewest = min(_FEWEST, *(max(len(found[method][0]) // 2, 1) for method in shown))
    styles = line_styles([shown])

    def make() -> Any:
        drawing = new_figure(6.6, 3.6)
        axis = drawing.subplots()
        handles: dict[str, Any] = {}
        top = 0.0
        for method in shown:
            risk = risk_curve(*found[method])
            coverage = np.arange(1, len(risk) + 1) / len(risk)
            # Steps of single answers are no finding: 30 points are enough, and make a line of it.
            kept = np.unique(np.linspace(fewest - 1, len(risk) - 1, 30).round().astype(int))
            style = styles[method] | {"markevery": 4}
            (handles[method],) = axis.plot(coverage[kept], risk[kept], **style)
            top = max(top, float(risk[kept].max()))
        axis.set_xlim(0, 1)
        axis.set_ylim(0, max(top * 1.08, 0.01))
        axis.set_xlabel("answers kept, the surest first (%)")
        axis.set_ylabel("wrong answers among them (%)")
        shares_as_percent(axis.xaxis)
        shares_as_percent(axis.yaxis)
        legend_below(drawing, handles)
        return drawing

    cut = f" The {len(shown)} most accurate methods are shown." if len(shown) < len(found) else ""
    halves = {method: risk_curve(*found[method]) for method in shown}
    first = shown[0]
    half, whole = (float(halves[first][place]) for place in (max(len(halves[first]) // 2, 1) - 1, -1))
    return Figure(
        name,
        draw(make),
        f"Risk-coverage curves of {', '.join(shown)}: {first} is wrong on {100 * whole:.1f} % of all answers and on "
        f"{100 * half:.1f} % of the surest half.",
        "What it brings to answer only when sure (risk-coverage): from right to left the least sure answers are "
        "dropped, and the line shows how many of the kept ones are wrong. A good method's line falls steeply to the "
        f"left; the right end is its error rate on all queries. Lines begin at the {fewest} surest answers of all "
        f"seeds together: the error rate of fewer jumps with every single one.{cut}",
    )
