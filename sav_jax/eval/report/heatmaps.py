"""The map of heads, and who is taken for whom.

Axes: C classes, L layers, N heads per layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sav_jax.errors import UserError
from sav_jax.eval.report.drawing import Figure, draw, new_figure, short
from sav_jax.eval.stored import Answered, Results

_RANDOM = "sav-random"
_NUMBERED = 12  # classes up to which squares hold numbers


def head_figures(
    results: Results, key: str, places: Mapping[str, int], classes: int, names: Sequence[str]
) -> list[Figure]:
    """Maps of how well every head classifies by itself, and which of them were chosen, all in the same colours.

    Args:
      results: the folder.
      key: whose heads are shown.
      places: method -> place among all methods; the map of a model with random weights is the last.
      classes: their number.
      names: of the files; there are no more maps than these.
    """
    of_methods = {method: of for method, of in dict(results.part("heads", key)).items() if of}
    methods = sorted(of_methods, key=lambda method: (method == _RANDOM, places.get(method, len(places))))[: len(names)]
    maps = [_head_scores(results, key, method, of_methods[method]) for method in methods]
    low = min((float(shares.min()) for shares, _ in maps), default=0.0)
    high = max((float(shares.max()) for shares, _ in maps), default=0.0)
    return [
        _head_figure(method, of_methods[method], *found, classes, (low, max(high, low + 0.01)), len(maps), name)
        for method, found, name in zip(methods, maps, names, strict=False)
    ]


def _head_figure(
    method: str,
    of_seeds: Mapping[str, Any],
    shares: np.ndarray,
    chosen: Mapping[tuple[int, int], int],
    classes: int,
    limits: tuple[float, float],
    count: int,
    name: str,
) -> Figure:
    """One of so many maps: share of the support that each head gets right [L, N], with colours between two limits."""
    seeds, (low, high) = len(of_seeds), limits
    layers, heads = shares.shape
    support = next(iter(of_seeds.values()))["support"]
    best = tuple(int(i) for i in np.unravel_index(int(shares.argmax()), shares.shape))

    def make() -> Any:
        from matplotlib.patches import Rectangle
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        cell = float(np.clip(7.5 / max(layers, heads), 0.13, 0.42))
        drawing = new_figure(max(cell * heads, 2.6) + 1.7, max(cell * layers, 1.6) + 0.7)
        axis = drawing.subplots()
        axis.grid(visible=False)
        image = axis.pcolormesh(shares, cmap="YlGnBu", vmin=low, vmax=high)
        axis.set_aspect("equal")
        for (layer, head), count in chosen.items():
            axis.add_patch(
                Rectangle((head + 0.06, layer + 0.06), 0.88, 0.88, fill=False, edgecolor="#d7301f", linewidth=1.3)
            )
            if cell >= 0.2:
                dark = (shares[layer, head] - low) / (high - low) > 0.55
                colour = "white" if dark else "black"
                place = (head + 0.5, layer + 0.5)
                axis.text(*place, str(count), ha="center", va="center", color=colour, fontsize=min(9, cell * 24))
        axis.set_xlabel("head")
        axis.set_ylabel("layer (0 is the first)")
        for of_axis, count in ((axis.xaxis, heads), (axis.yaxis, layers)):
            step = MaxNLocator(integer=True, nbins=15).tick_values(0, count - 1)
            ticks = [int(tick) for tick in step if 0 <= tick < count and tick == int(tick)]
            of_axis.set_ticks([tick + 0.5 for tick in ticks], [str(tick) for tick in ticks])
        bar = drawing.colorbar(image, ax=axis, format=FuncFormatter(lambda v, _: f"{100 * v:.0f}"), shrink=0.9)
        bar.set_label(f"right labelled examples (%), chance {100 / classes:.0f}")
        return drawing

    numbers = (
        f"Outlined heads vote; the number says under how many of the {seeds} seeds they were chosen"
        if seeds > 1
        else "Outlined heads vote, 1 being the best"
    )
    title = (
        "For comparison, what the same network tells apart with random weights, before any training"
        if method == _RANDOM
        else "Where the model tells the classes apart"
    )
    same = " The maps of this task have one scale of colours." if count > 1 else ""
    return Figure(
        name,
        draw(make),
        f"Heat map of {layers} layers by {heads} heads; the best single head is head {best[1]} of layer {best[0]}, "
        f"right on {100 * shares[best]:.0f} % of the labelled examples.",
        f"{title} ({method}): each square is one attention head, and its colour says "
        f"how many of the {support} labelled examples that head alone classifies rightly"
        f"{', on average over the seeds' if seeds > 1 else ''}. {numbers}.{same}",
    )


def _head_scores(
    results: Results, key: str, method: str, of_seeds: Mapping[str, Any]
) -> tuple[np.ndarray, dict[tuple[int, int], int]]:
    """Share of the support that each head gets right, mean over seeds, float [L, N]; and layer, head -> in how many
    seeds it was chosen, or its rank if there is one seed.
    """
    shares: list[np.ndarray] = []
    chosen: dict[tuple[int, int], int] = {}
    for seed, entry in of_seeds.items():
        where = f'{results.file}: field "sav_jax.heads.{key}.{method}.{seed}"'
        try:
            scores = np.asarray(entry["head_scores"], float)
            pairs = [(int(layer), int(head)) for layer, head in entry["heads"]]
            shares.append(scores / entry["support"])
            ok = scores.ndim == 2 and all(
                0 <= layer < scores.shape[0] and 0 <= head < scores.shape[1] for layer, head in pairs
            )
        except (KeyError, TypeError, ValueError, ZeroDivisionError):
            ok = False
        if not ok or shares[0].shape != shares[-1].shape:
            raise UserError(f'{where} is not a table "head_scores" [layers][heads], "heads" in it and "support"')
        for rank, pair in enumerate(pairs, start=1):
            chosen[pair] = chosen.get(pair, 0) + 1 if len(of_seeds) > 1 else rank
    return np.mean(shares, axis=0), chosen


def confusion_counts(answers: Sequence[Answered], labels: Sequence[str]) -> np.ndarray:
    """Answers by right label and prediction, summed over seeds, int [C, C + 1]; the last column is no answer."""
    column = {label: i for i, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels) + 1), int)
    for answered in answers:
        rows = [column[query.target] for query in answered.queries]
        np.add.at(counts, (rows, [column.get(label, len(labels)) for label in answered.predictions]), 1)
    return counts


def confusion_figure(counts: np.ndarray, labels: Sequence[str], method: str, name: str) -> Figure:
    """Rows: the right label; columns: the answer; shares of each row."""
    columns = [*labels, "(none)"] if counts[:, -1].any() else list(labels)
    counts = counts[:, : len(columns)]
    totals = counts.sum(1, keepdims=True)
    shares = counts / np.maximum(totals, 1)

    def make() -> Any:
        from matplotlib.collections import PolyCollection
        from matplotlib.colors import PowerNorm
        from matplotlib.ticker import FuncFormatter

        count = len(labels)
        cell = float(np.clip(6.0 / count, 0.17, 0.5))
        names = [short(label, 22) for label in columns]
        margin = 0.075 * max(map(len, names)) + 0.5
        drawing = new_figure(cell * len(columns) + margin + 1.0, cell * count + margin + 0.3)
        axis = drawing.subplots()
        axis.grid(visible=False)
        # Colours by the root of the share: confusions are rare, and they are what is looked for. Empty squares are not
        # drawn, which keeps the picture small.
        filled = np.nonzero(shares)
        corners = [[(x, y), (x + 1, y), (x + 1, y + 1), (x, y + 1)] for y, x in zip(*filled, strict=True)]
        squares = PolyCollection(corners, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1), linewidth=0)
        squares.set_array(shares[filled])
        image = axis.add_collection(squares)
        axis.set_aspect("equal")
        axis.set_xlim(0, len(columns))
        axis.set_ylim(count, 0)
        axis.set_xticks(np.arange(len(columns) + 1), minor=True)
        axis.set_yticks(np.arange(count + 1), minor=True)
        axis.grid(which="minor", color="#e6e6e6", linewidth=0.4)
        size = float(np.clip(cell * 42, 6, 9))
        axis.set_xticks(np.arange(len(columns)) + 0.5, names, rotation=90, fontsize=size)
        axis.set_yticks(np.arange(count) + 0.5, names[:count], fontsize=size)
        axis.tick_params(which="both", length=0)
        axis.set_xlabel("answer")
        axis.set_ylabel("right label")
        if count <= _NUMBERED:
            for row, column in zip(*np.nonzero(shares >= 0.005), strict=True):
                colour = "white" if shares[row, column] > 0.35 else "black"
                place = (column + 0.5, row + 0.5)
                text = f"{100 * shares[row, column]:.0f}"
                axis.text(*place, text, ha="center", va="center", color=colour, fontsize=8)
        else:  # numbers need no scale, and a small picture has no room for one
            bar = drawing.colorbar(image, ax=axis, format=FuncFormatter(lambda v, _: f"{100 * v:.0f}"), shrink=0.8)
            bar.set_ticks([0, 0.01, 0.05, 0.1, 0.25, 0.5, 1])
            bar.set_label("share of the right label's queries (%)")
        return drawing

    right = counts.diagonal().sum() / max(int(totals.sum()), 1)
    worst = int(np.where(totals[:, 0] > 0, shares.diagonal(), 2).argmin())
    numbers = " Numbers are percent of the row, those below half a percent are left out." if len(labels) <= 12 else ""
    return Figure(
        name,
        draw(make),
        f"Confusion matrix of {len(labels)} classes: {100 * right:.0f} % of the answers lie on the diagonal; the class "
        f"with the fewest right answers is {short(labels[worst], 60)} with {100 * shares[worst, worst]:.0f} %.",
        f"What is taken for what ({method}, the method with the best result): each row is a right label, each column "
        f"an answer; right answers lie on the diagonal, and squares beside it are confusions.{numbers}",
    )


def confusions(counts: np.ndarray, labels: Sequence[str], most: int = 8) -> list[tuple[str, str, int, float]]:
    """The most frequent confusions: right label, answer ("" for none), answers, share of the right label's."""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    totals = counts.sum(1)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = [(int(i) // wrong.shape[1], int(i) % wrong.shape[1]) for i in order]
    names = [*labels, ""]
    return [
        (names[row], names[column], int(wrong[row, column]), float(wrong[row, column] / totals[row]))
        for row, column in pairs
        if wrong[row, column] > 1
    ]
