"""Handwriting-like digits and letters, written as pen strokes.

Every character has one or more *styles*; a style is a sequence of strokes and a stroke a sequence of points in a unit
box (x to the right, y down). ``~`` marks a stroke drawn as a smooth curve through its points (Catmull-Rom), ``-`` one
drawn with straight segments. The points were set down by hand for this project, from how people write, not from any
data set. Warping the points (:func:`warp`) is what turns the few styles into endlessly many hands.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]

_DIGITS: dict[str, tuple[str, ...]] = {
    "0": (
        "~ 50 0 20 12 8 50 20 88 50 100 80 88 92 50 80 12 50 0",
        "~ 60 4 30 8 12 42 16 84 44 100 76 84 88 46 74 10 48 2",
        "~ 70 12 46 0 18 20 10 62 28 96 58 96 84 66 86 26 62 4 40 10",
        "~ 50 0 26 20 22 50 28 84 50 100 72 84 78 50 72 18 50 0",
        "~ 34 8 14 44 22 88 52 100 82 82 90 40 72 6 44 0 22 22",
        "~ 78 2 40 14 14 54 20 92 52 96 82 58 88 18 70 2 56 12",
    ),
    "1": (
        "- 50 0 50 100",
        "- 30 24 52 0 52 100",
        "- 26 22 52 0 52 100 / - 24 100 80 100",
        "- 66 0 38 100",
        "~ 22 30 40 18 54 0 / - 54 0 52 100",
        "- 18 34 58 0 54 100",
        "- 50 0 50 100 / - 30 100 70 100",
        "- 12 40 56 0 / - 56 0 50 100",
        "~ 56 0 50 34 48 66 50 100",
        "- 40 12 54 0 54 100",
        "- 32 16 54 2 52 100 / - 40 98 66 98",
        "- 36 12 52 0 52 100 / - 44 6 44 100 / - 60 4 60 100",
        "- 30 30 56 0 58 100 / - 48 10 50 100 / - 26 34 44 24",
        "- 24 28 56 2 56 100 / - 46 14 46 100 / - 20 98 84 98 / - 20 94 84 94",
        "- 46 0 46 100 / - 54 0 54 100",
    ),
    "2": (
        "~ 14 24 30 4 62 0 82 22 66 52 38 76 14 98 / - 14 98 88 98",
        "~ 10 20 36 0 74 8 78 36 50 66 20 92 / ~ 20 92 14 98 40 92 70 100 92 92",
        "~ 16 16 48 0 80 16 70 50 40 80 16 92 8 80 24 72 48 88 74 98 94 88",
        "- 12 6 82 6 14 98 88 98",
        "~ 18 30 24 8 52 0 76 14 74 40 48 72 12 100 / - 12 100 84 100",
        "~ 8 14 40 2 70 12 68 44 36 78 10 96 / ~ 10 96 40 86 64 96 92 98",
        "~ 22 22 40 2 72 4 82 30 60 60 30 86 16 98 / - 16 98 78 92",
        "~ 12 22 34 2 74 6 78 32 44 64 14 84 / - 14 86 40 98 90 92",
        "~ 10 26 30 2 66 4 72 32 44 68 8 90 6 100 24 92 56 96 94 96",
    ),
    "3": (
        "~ 14 14 42 0 76 10 74 36 42 46 / ~ 42 46 78 56 82 84 50 100 12 88",
        "- 14 2 80 2 44 42 / ~ 44 42 80 52 84 84 48 100 10 88",
        "~ 18 10 52 0 78 18 62 40 38 46 70 54 82 76 58 98 14 94",
        "~ 10 20 34 2 70 8 70 34 34 48 / ~ 34 48 74 54 78 86 42 100 14 84",
        "~ 22 6 60 2 76 22 54 44 40 46 48 44 76 62 70 92 38 100 12 90",
        "~ 16 8 60 4 74 22 50 44 76 62 80 82 52 98 18 96",
    ),
    "4": (
        "- 60 0 10 66 92 66 / - 62 36 62 100",
        "- 64 0 64 100 / - 64 0 8 68 94 68",
        "- 20 0 16 52 84 52 / - 76 6 74 100",
        "~ 24 2 16 30 18 50 / - 18 50 80 50 / - 78 0 72 100",
        "- 34 0 12 60 90 56 / - 66 22 58 100",
        "- 22 4 18 46 76 46 / - 78 0 78 100",
        "~ 20 0 10 40 30 54 60 50 78 36 / - 80 0 70 100",
        "- 50 0 6 72 96 70 / - 58 48 56 100",
        "- 70 0 26 58 / - 26 58 88 54 / - 70 20 54 100",
    ),
    "5": (
        "- 82 2 26 2 20 44 / ~ 20 44 50 36 82 56 76 88 44 100 12 90",
        "- 26 2 22 42 / ~ 22 42 54 36 80 60 68 92 36 100 12 86 / - 26 2 84 4",
        "~ 82 4 50 4 28 6 22 36 46 40 76 56 74 88 44 100 14 92",
        "- 78 0 34 4 24 44 / ~ 24 44 62 42 78 66 60 92 20 98",
        "~ 86 6 56 0 34 12 26 38 54 44 74 64 62 92 30 100 8 86",
        "- 34 4 28 46 / ~ 28 46 66 48 74 74 50 98 16 96 / - 34 4 80 0",
    ),
    "6": (
        "~ 70 0 36 26 16 66 30 98 66 98 84 74 66 52 36 58 18 78",
        "~ 52 0 24 36 14 74 36 100 72 94 82 70 58 54 28 66 16 80",
        "~ 78 6 46 8 20 42 16 80 46 100 78 86 80 62 54 52 24 66",
        "- 34 0 24 50 / ~ 24 50 20 84 48 100 78 84 74 58 48 54 24 76",
        "~ 44 0 22 44 20 84 46 100 70 86 68 62 46 58 24 76",
        "~ 64 2 34 20 14 60 22 92 54 100 80 82 70 60 40 62 26 84",
    ),
    "7": (
        "- 10 2 88 2 42 100",
        "- 10 4 88 4 40 100 / - 28 52 76 52",
        "~ 10 14 12 2 / ~ 12 2 50 6 88 2 64 38 46 100",
        "~ 8 10 44 2 86 8 66 42 50 74 44 100",
        "~ 12 4 50 2 86 4 60 46 44 100 / - 30 56 78 50",
        "- 14 18 14 2 84 2 50 100",
        "- 8 6 80 0 56 100",
        "~ 12 16 16 2 60 4 84 2 70 30 58 64 54 100 / - 36 50 84 50",
        "- 12 4 82 4 66 100",
        "- 10 4 86 4 48 100 / - 26 50 82 46",
        "~ 10 18 14 4 50 8 86 2 62 40 50 100 / - 32 46 80 52",
        "- 16 2 84 2 50 52 44 100 / ~ 28 54 52 48 76 52",
    ),
    "8": (
        "~ 74 12 48 0 24 14 34 38 62 54 80 78 52 100 22 82 36 56 66 38 74 12",
        "~ 50 0 24 14 26 36 50 46 74 36 76 14 50 0 / ~ 50 46 20 62 20 88 50 100 80 88 80 62 50 46",
        "~ 76 18 52 2 26 14 32 38 60 52 72 80 46 100 24 84 40 56 78 18",
        "~ 70 4 34 6 26 26 50 48 74 72 58 98 28 92 30 66 56 42 72 20 70 4",
        "~ 80 6 52 2 30 18 44 42 62 64 54 96 30 96 26 72 50 46 78 24",
        "~ 52 0 32 12 36 34 52 46 66 32 66 10 52 0 / ~ 52 46 28 66 32 94 52 100 70 90 72 64 52 46",
    ),
    "9": (
        "~ 80 20 54 0 22 14 20 40 46 52 76 36 80 16 / ~ 80 16 80 50 76 76 64 100",
        "~ 76 24 50 2 22 16 24 42 52 50 76 30 / - 78 8 74 100",
        "~ 78 12 44 2 18 26 34 50 66 44 80 14 78 56 60 92 26 98",
        "~ 80 8 40 4 16 28 36 48 76 28 / - 82 4 70 54 58 100",
        "~ 74 30 60 4 28 6 20 36 46 50 72 32 78 6 / ~ 76 20 76 60 52 96 16 94",
        "~ 84 6 46 2 24 24 40 44 80 14 / - 80 14 62 100",
        "~ 72 10 36 8 22 34 48 46 74 22 / ~ 74 22 72 60 66 84 62 100",
        "~ 78 18 48 0 18 22 40 46 74 34 / ~ 76 14 80 46 64 84 36 100 14 88",
        "~ 60 2 30 8 24 32 48 42 68 26 62 2 / - 66 10 52 100",
        "~ 20 6 16 34 36 48 64 44 80 30 / - 82 2 78 100",
        "~ 30 2 14 24 26 48 60 46 82 26 / ~ 84 0 82 40 70 80 40 100",
        "~ 62 8 30 4 16 26 34 46 66 44 78 30 / ~ 78 4 80 50 62 92 22 98",
    ),
}

_LETTERS: dict[str, tuple[str, ...]] = {
    "a": ("- 8 100 50 0 92 100 / - 24 64 76 64", "~ 80 26 46 4 16 30 16 74 44 98 80 70 / - 82 6 82 100"),
    "b": (
        "- 16 0 16 100 / ~ 16 2 70 4 72 42 16 48 / ~ 16 48 84 52 80 98 16 98",
        "- 18 0 18 100 / ~ 18 60 50 42 82 66 66 98 18 92",
    ),
    "c": ("~ 86 16 52 0 16 24 12 68 42 100 86 86", "~ 80 22 44 8 16 46 36 94 82 86"),
    "d": ("- 16 2 16 98 / ~ 16 2 70 10 90 50 70 92 16 98", "- 80 0 80 100 / ~ 80 56 48 42 18 68 40 100 80 84"),
    "e": ("- 84 2 16 2 16 98 86 98 / - 16 48 74 48", "~ 16 54 82 50 70 14 36 12 14 50 34 94 82 86"),
    "f": ("- 84 2 18 2 18 100 / - 18 48 72 48", "~ 80 8 52 2 44 30 44 100 / - 16 40 76 40"),
    "g": (
        "~ 84 16 50 0 14 26 14 74 46 100 82 84 / - 82 84 82 56 54 56",
        "~ 78 14 44 2 18 26 40 50 78 30 / ~ 80 4 80 60 64 98 20 92",
    ),
    "h": ("- 14 0 14 100 / - 86 0 86 100 / - 14 50 86 50", "- 18 0 18 100 / ~ 18 64 48 44 78 58 78 100"),
    "i": ("- 20 2 80 2 / - 50 2 50 98 / - 20 98 80 98",),
    "j": ("- 30 2 90 2 / ~ 66 2 66 70 46 100 12 80", "~ 76 0 74 70 48 100 14 82"),
    "k": ("- 16 0 16 100 / - 84 0 18 54 / - 34 42 88 100", "- 18 0 18 100 / - 74 32 18 66 / - 36 58 80 100"),
    "l": ("- 16 0 16 98 86 98",),
    "m": ("- 8 100 14 0 50 66 86 0 92 100", "- 8 20 8 100 / ~ 8 46 28 22 48 44 48 100 / ~ 48 44 70 22 90 46 90 100"),
    "n": ("- 14 100 14 0 86 100 86 0", "- 16 18 16 100 / ~ 16 52 48 20 80 48 80 100"),
    "o": ("~ 50 0 12 20 8 60 30 98 70 98 92 60 88 20 50 0",),
    "p": ("- 16 0 16 100 / ~ 16 2 78 6 80 48 16 54", "- 20 0 20 100 / ~ 20 20 60 0 84 30 60 58 20 48"),
    "q": (
        "~ 50 0 12 20 10 70 46 98 86 74 88 22 50 0 / - 56 66 94 100",
        "~ 78 20 44 2 16 30 44 54 76 36 / - 80 4 80 88 98 100",
    ),
    "r": ("- 16 0 16 100 / ~ 16 2 78 6 78 46 18 52 / - 44 52 88 100", "- 24 16 24 100 / ~ 24 50 46 24 80 24"),
    "s": ("~ 84 12 50 0 18 20 40 46 78 66 74 94 40 100 12 84",),
    "t": ("- 8 2 92 2 / - 50 2 50 100", "- 46 0 46 80 / ~ 46 80 56 100 80 92 / - 16 28 80 28"),
    "u": ("~ 14 0 14 66 48 100 84 66 84 0", "~ 16 12 16 72 44 96 80 64 / - 82 10 82 100"),
    "v": ("- 8 0 50 100 92 0",),
    "w": ("- 4 0 26 100 50 30 74 100 96 0", "~ 8 10 14 80 36 96 50 40 / ~ 50 40 64 96 86 80 92 10"),
    "x": ("- 10 0 90 100 / - 90 0 10 100",),
    "y": ("- 8 0 50 48 92 0 / - 50 48 50 100", "- 14 0 52 60 / - 88 0 28 100"),
    "z": ("- 12 2 88 2 10 98 90 98", "- 12 2 88 2 12 98 90 98 / - 28 50 74 50"),
}

#: Style numbers kept out of training, one per digit; letters have too few styles to spare one.
HELD_OUT_STYLE: dict[str, int] = {"0": 4, "1": 5, "2": 4, "3": 3, "4": 8, "5": 4, "6": 4, "7": 4, "8": 3, "9": 6}

_STEPS = 6  # points per curve segment: chords are then shorter than one pixel of a 32-pixel glyph


def _parse(text: str) -> tuple[tuple[bool, Points], ...]:
    strokes = []
    for part in text.split("/"):
        mark, *numbers = part.split()
        strokes.append((mark == "~", np.asarray(numbers, dtype=np.float64).reshape(-1, 2) / 100.0))
    return tuple(strokes)


@cache
def styles(character: str, held_out: bool = False) -> tuple[tuple[tuple[bool, Points], ...], ...]:
    """All styles of a character (lower-case letter or digit) of the training or of the held-out half.

    Letters have no held-out styles: an empty tuple.
    """
    texts = _DIGITS.get(character) or _LETTERS[character]
    reserved = HELD_OUT_STYLE.get(character)
    return tuple(_parse(text) for number, text in enumerate(texts) if (number == reserved) == held_out)


@cache
def _catmull_rom(points: int) -> Points:
    """Matrix [samples, points] of the Catmull-Rom curve through that many points, ends repeated."""
    basis = 0.5 * np.array([[0, 2, 0, 0], [-1, 0, 1, 0], [2, -5, 4, -1], [-1, 3, -3, 1]], dtype=np.float64)
    rows = []
    for segment in range(points - 1):
        for step in range(_STEPS + (segment == points - 2)):
            t = step / _STEPS
            weights = np.array([1.0, t, t * t, t**3]) @ basis
            row = np.zeros(points)
            for offset, weight in zip(range(-1, 3), weights, strict=True):
                row[min(max(segment + offset, 0), points - 1)] += weight
            rows.append(row)
    return np.stack(rows)


def warp(points: Points, rng: np.random.Generator, strength: float) -> Points:
    """Moves the points of a character [n, 2] as another hand would: bends, slant, uneven halves."""
    x, y = points[:, 0], points[:, 1]
    a = rng.normal(size=8) * strength
    y = np.clip(y, 0.0, 1.0) ** np.exp(0.16 * a[0])
    x = np.clip(x, 0.0, 1.0) ** np.exp(0.12 * a[1])
    x = x + 0.05 * a[2] * np.sin(np.pi * (y + 0.5 * a[3]))
    y = y + 0.04 * a[4] * np.sin(np.pi * (x + 0.5 * a[5]))
    x, y = x - 0.5, y - 0.5
    x = x * np.exp(0.14 * a[6])
    slant, turn = 0.22 * a[7], 0.08 * strength * rng.normal()
    x = x - slant * y
    return np.stack([np.cos(turn) * x - np.sin(turn) * y, np.sin(turn) * x + np.cos(turn) * y], axis=1)


def pen_strokes(character: str, rng: np.random.Generator, *, held_out: bool, strength: float) -> list[Points]:
    """One handwritten character: an array [n, 2] per stroke, about in the box [-0.5, 0.5]^2 (x right, y down)."""
    available = styles(character, held_out) or styles(character)
    style = available[int(rng.integers(len(available)))]
    sizes = [len(points) for _, points in style]
    control = np.concatenate([points for _, points in style])
    moved = warp(control + rng.normal(scale=0.025 * strength, size=control.shape), rng, strength)
    lines, start = [], 0
    for (smooth, _), size in zip(style, sizes, strict=True):
        part = moved[start : start + size]
        lines.append(_catmull_rom(size) @ part if smooth else part)
        start += size
    return lines
