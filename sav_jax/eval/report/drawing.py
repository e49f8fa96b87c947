"""What all pictures share: colours, fonts, panels, and the way to SVG.

Pictures are SVG with real text: sharp at any size and in print, small, and readable for a search.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

# Okabe and Ito's colours without the yellow, which is too light for lines on white: distinct for colour-blind people.
# The brown is as dark as the black is not, and far from the orange.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C510A")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")  # one more than colours: the same two do not meet again soon
_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))

_SETTINGS = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],  # of about one width
    "font.size": 9,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "sav_jax",  # the same picture has the same bytes
    "text.parse_math": False,  # a $ in a class name is a $
}


@dataclass(frozen=True)
class Figure:
    """A picture of the report.

    Attributes:
      name: of its file.
      svg: the picture.
      alternative: what it shows, for those who cannot see it.
      caption: what it shows and how to read it.
    """

    name: str
    svg: bytes
    alternative: str
    caption: str


def line_style(place: int) -> dict[str, Any]:
    """Colour, marker and dashes of the line at this place; the first 32 are all different."""
    return {
        "color": _COLOURS[place % len(_COLOURS)],
        "marker": _MARKERS[place % len(_MARKERS)],
        "linestyle": _DASHES[place // len(_COLOURS) % len(_DASHES)],
    }


def line_styles(panels: Iterable[Sequence[str]]) -> dict[str, dict[str, Any]]:
    """Styles of named lines: no two names have the same, and as far as colours go round no two lines of a panel have
    the same colour.

    Args:
      panels: the names in each panel.
    """
    together: dict[str, set[str]] = {}
    for names in panels:
        for name in names:
            together.setdefault(name, set()).update(names)
    places: dict[str, int] = {}
    for name, others in together.items():
        near = {places[other] % len(_COLOURS) for other in others if other in places}
        free = [place for place in range(len(together) + len(_COLOURS)) if place not in places.values()]
        places[name] = next((place for place in free if place % len(_COLOURS) not in near), free[0])
    return {name: line_style(place) for name, place in places.items()}


@contextmanager
def styled() -> Iterator[None]:
    """Draw and save in here."""
    from matplotlib import rc_context

    with rc_context(_SETTINGS), warnings.catch_warnings():
        # Whoever looks at the SVG has fonts of their own for class names in other scripts.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def new_figure(width: float, height: float) -> Any:
    """A figure of so many inches, without pyplot and its global state."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(drawing)
    return drawing


def panels(titles: Sequence[str], per_row: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure of one panel per title, each so many inches wide and high."""
    if len(titles) == 1:
        width, height = 1.5 * width, 1.2 * height  # a single panel has room
    columns = min(per_row, len(titles))
    rows = -(-len(titles) // columns)
    drawing = new_figure(columns * width + 0.2, rows * height + 0.2)
    axes = drawing.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(titles) :]:
        axis.remove()
    for axis, title in zip(axes, titles, strict=False):
        axis.set_title(short(title, int(width * 11)))
    return drawing, list(axes[: len(titles)])


def legend_below(drawing: Any, handles: dict[str, Any], columns: int = 4) -> None:
    """One legend for all panels."""
    drawing.legend(
        list(handles.values()),
        [short(name, 34) for name in handles],
        loc="outside lower center",
        ncols=min(columns, len(handles)),
        handlelength=3.2,
    )


def save(drawing: Any) -> bytes:
    """As SVG; the same drawing gives the same bytes."""
    buffer = io.BytesIO()
    drawing.savefig(
        buffer, format="svg", bbox_inches="tight", pad_inches=0.06, metadata={"Date": None, "Creator": None}
    )
    svg = re.sub(rb"<!DOCTYPE[^>]*>\s*", b"", buffer.getvalue(), count=1)  # it names an address, and nobody needs it
    # A hundredth of a point is finer than any print. In paths alone: a "<" in what is written would be "&lt;".
    return re.sub(rb'<path [^>]*?d="[^"]*"', lambda path: re.sub(rb"(?<=\d\.\d\d)\d+", b"", path[0]), svg)


def draw(make: Callable[[], Any]) -> bytes:
    """Run a function that draws, in the report's style."""
    with styled():
        return save(make())


def short(text: str, most: int = 24) -> str:
    """One line of printable characters, cut in the middle if it is too long."""
    text = "".join(character if character.isprintable() else " " for character in text)
    text = " ".join(text.split())
    if len(text) <= most:
        return text
    keep = most - 1
    return f"{text[: keep - keep // 3]}…{text[len(text) - keep // 3 :]}"


def shares_as_percent(axis: Any) -> None:
    """Label a y axis of shares in percent."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.10g}"))
