"""Pictures of results, as PNG bytes."""

from __future__ import annotations

import io
import textwrap

import numpy as np

from sav_jax.classifier import SparseAttentionVectors

# Inches around the map of heads; a fixed layout reads the same whatever the shape of the model.
_LEFT, _RIGHT, _BOTTOM, _TOP = 0.7, 1.6, 0.65, 1.0
_NARROWEST, _FLATTEST = 4.2, 1.9


def head_map(classifier: SparseAttentionVectors, title: str) -> bytes:
    """Draw every head's score, layer by head, and number the heads that vote.

    Args:
      classifier: a fitted classifier.
      title: its first line, such as the task.

    Returns:
      A PNG picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    layers, heads = classifier.scores.shape
    total = sum(classifier.support)
    share = classifier.scores / total
    # All colours for the range there is: where every head is good, their differences still show.
    low, high = float(share.min()), float(max(share.max(), share.min() + 0.01))

    cell = float(np.clip(7 / max(layers, heads), 0.27, 0.55))  # inches
    map_width, map_height = cell * heads, cell * layers
    width, height = _LEFT + max(map_width, _NARROWEST) + _RIGHT, _BOTTOM + max(map_height, _FLATTEST) + _TOP
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)

    axes = figure.add_axes((_LEFT / width, _BOTTOM / height, map_width / width, map_height / height))
    image = axes.imshow(share, cmap="YlGnBu", vmin=low, vmax=high, origin="lower", aspect="auto")
    for rank, (layer, head) in enumerate(classifier.heads, start=1):
        corner = (head - 0.45, layer - 0.45)
        axes.add_patch(Rectangle(corner, 0.9, 0.9, fill=False, edgecolor="#e31a1c", linewidth=1.5))
        dark = (share[layer, head] - low) / (high - low) > 0.55
        axes.text(
            head,
            layer,
            str(rank),
            ha="center",
            va="center_baseline",
            color="white" if dark else "black",
            fontsize=float(np.clip(cell * 24, 6.5, 10)),
        )
    axes.set_xlabel("head")
    axes.set_ylabel("layer (0 is the first)")
    for axis, count in ((axes.xaxis, heads), (axes.yaxis, layers)):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=min(count, 15)))

    bar_left = (_LEFT + map_width + 0.25) / width
    scale = figure.add_axes((bar_left, _BOTTOM / height, 0.2 / width, map_height / height))
    figure.colorbar(image, cax=scale, format=PercentFormatter(1, decimals=0))
    scale.set_ylabel(
        f"labelled examples that the head\nalone gets right (chance: {1 / len(classifier.labels):.0%})", fontsize=9
    )

    left = _LEFT / width
    figure.text(left, 1 - 0.12 / height, title, fontsize=11, fontweight="bold", va="top")
    note = (
        f"Each square is one attention head, used alone as a classifier of {len(classifier.labels)} classes from "
        f"{total} labelled examples. The {classifier.num_heads} best, outlined and numbered by rank, vote."
    )
    wrapped = textwrap.fill(note, int((width - _LEFT) * 13))
    figure.text(left, 1 - 0.4 / height, wrapped, fontsize=9, va="top", linespacing=1.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()
