"""Coloured, textured shapes as masks."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

#: Colour names and their typical RGB values; every drawing moves them a little.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 30, 35),
    "orange": (245, 140, 20),
    "yellow": (245, 230, 40),
    "green": (35, 160, 55),
    "blue": (35, 70, 215),
    "purple": (130, 40, 165),
    "pink": (250, 140, 190),
    "white": (250, 250, 250),
    "black": (8, 8, 8),
    "gray": (128, 128, 128),
    "brown": (115, 68, 28),
    "cyan": (45, 205, 215),
}
SHAPES = (
    "circle", "square", "triangle", "star", "cross", "heart", "diamond", "ring", "hexagon", "moon", "drop", "arch",
)  # fmt: skip
#: Textures that training names.
TEXTURES = ("plain", "striped", "dotted", "checkered")
#: Textures that training shows and never names: what they are called can only be learned from labelled examples.
UNNAMED_TEXTURES = ("waves", "bricks", "rings", "zigzag", "speckles", "mesh")

#: Pixels of an outline.
CANVAS = 96  # outlines are rasterised once at this size, then transformed


def _star(points: int, inner: float) -> list[tuple[float, float]]:
    angles = np.pi * np.arange(2 * points) / points - np.pi / 2
    radii = np.where(np.arange(2 * points) % 2 == 0, 1.0, inner)
    return [
        (0.5 + 0.5 * float(r * np.cos(a)), 0.5 + 0.5 * float(r * np.sin(a))) for a, r in zip(angles, radii, strict=True)
    ]


_POLYGONS: dict[str, list[tuple[float, float]]] = {
    "square": [(0.08, 0.08), (0.92, 0.08), (0.92, 0.92), (0.08, 0.92)],
    "triangle": [(0.5, 0.04), (0.98, 0.94), (0.02, 0.94)],
    "star": _star(5, 0.42),
    "cross": [
        (0.34, 0.02), (0.66, 0.02), (0.66, 0.34), (0.98, 0.34), (0.98, 0.66), (0.66, 0.66),
        (0.66, 0.98), (0.34, 0.98), (0.34, 0.66), (0.02, 0.66), (0.02, 0.34), (0.34, 0.34),
    ],
    "diamond": [(0.5, 0.0), (0.86, 0.5), (0.5, 1.0), (0.14, 0.5)],
    "hexagon": [(0.27, 0.08), (0.73, 0.08), (0.97, 0.5), (0.73, 0.92), (0.27, 0.92), (0.03, 0.5)],
}  # fmt: skip


@cache
def _outline(shape: str) -> Image.Image:
    mask = Image.new("L", (CANVAS, CANVAS), 0)
    draw = ImageDraw.Draw(mask)
    end = CANVAS - 1
    if shape in _POLYGONS:
        draw.polygon([(x * end, y * end) for x, y in _POLYGONS[shape]], fill=255)
    elif shape == "heart":
        t = np.linspace(0.0, 2.0 * np.pi, 80)
        x = 0.5 + np.sin(t) ** 3 / 2.05
        y = 0.46 - (13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 33.0
        draw.polygon(list(zip((x * end).tolist(), (y * end).tolist(), strict=True)), fill=255)
    elif shape == "drop":
        draw.ellipse((0.18 * end, 0.36 * end, 0.82 * end, end), fill=255)
        draw.polygon([(0.5 * end, 0), (0.79 * end, 0.56 * end), (0.21 * end, 0.56 * end)], fill=255)
    elif shape == "arch":
        draw.pieslice((0.04 * end, 0.06 * end, 0.96 * end, 0.98 * end), 180, 360, fill=255)
        draw.rectangle((0.04 * end, 0.5 * end, 0.96 * end, 0.94 * end), fill=255)
        draw.pieslice((0.3 * end, 0.34 * end, 0.7 * end, 0.78 * end), 180, 360, fill=0)
        draw.rectangle((0.3 * end, 0.55 * end, 0.7 * end, end), fill=0)
    else:
        draw.ellipse((2, 2, end - 2, end - 2), fill=255)
        if shape == "moon":
            draw.ellipse((0.36 * end, -0.06 * end, 1.22 * end, 0.8 * end), fill=0)
        if shape == "ring":
            hole = 0.27 * end
            draw.ellipse((hole, hole, end - hole, end - hole), fill=0)
    return mask


def shape_mask(shape: str, seed: int, size: int) -> Image.Image:
    """A shape in a square "L" mask of ``size`` pixels, turned and stretched a little."""
    return turned(_outline(shape), seed, size, enlarge=1.06 if shape == "square" else 1.0)


def turned(outline: Image.Image, seed: int, size: int, enlarge: float = 1.0) -> Image.Image:
    """An outline of ``CANVAS`` pixels in a square mask of ``size`` pixels, turned and stretched a little.

    Args:
        outline: "L", square.
        seed: of the turn and the stretch.
        size: in pixels.
        enlarge: how much more than the outline the mask shows: corners of a turned square would leave it.
    """
    rng = np.random.default_rng(seed)
    turn = rng.normal() * 0.08
    stretch = np.exp(rng.normal() * 0.06)
    cos, sin = np.cos(turn), np.sin(turn)
    matrix = np.array([[cos * stretch, -sin * stretch], [sin / stretch, cos / stretch]])
    matrix = matrix * (enlarge * CANVAS / (2 * size))
    offset = CANVAS / 2 - matrix @ np.array([size, size])
    coefficients = (matrix[0, 0], matrix[0, 1], offset[0], matrix[1, 0], matrix[1, 1], offset[1])
    return outline.transform(
        (2 * size, 2 * size), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR
    ).reduce(2)


def texture_pattern(texture: str, seed: int, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Where the second colour of a textured thing shows: bool [height, width]; all False for "plain"."""
    width, height = size
    if texture == "plain":
        return np.zeros((height, width), dtype=bool)
    rng = np.random.default_rng(seed)
    period = float(rng.uniform(4.0, 6.0)) * max(1.0, min(size) / 24.0)
    y, x = np.mgrid[0:height, 0:width] + rng.uniform(0, period, size=2)[:, None, None]
    if texture == "striped":
        angle = float(rng.choice([0.0, 0.25, 0.5, 0.75])) * np.pi + rng.normal() * 0.08
        return np.asarray((x * np.cos(angle) + y * np.sin(angle)) % period < period / 2)
    if texture == "checkered":
        half = period / 1.7
        return np.asarray((np.floor(x / half) + np.floor(y / half)) % 2 == 0)
    if texture == "dotted":
        dx, dy = (x % period) - period / 2, (y % period) - period / 2
        return np.asarray(dx * dx + dy * dy < (0.33 * period) ** 2)
    if texture == "waves":
        return np.asarray((y + 0.3 * period * np.sin(2 * np.pi * x / (1.6 * period))) % period < period / 2)
    if texture == "zigzag":
        return np.asarray((y + np.abs(x % (1.6 * period) - 0.8 * period)) % period < period / 2)
    if texture == "bricks":
        row = np.floor(y / (0.8 * period))
        mortar = max(1.0, 0.22 * period)
        return np.asarray((y % (0.8 * period) < mortar) | ((x + 0.75 * period * (row % 2)) % (1.5 * period) < mortar))
    if texture == "rings":
        return np.asarray(np.hypot(x - x.mean(), y - y.mean()) % period < period / 2)
    if texture == "mesh":
        line = max(1.0, 0.24 * period)
        return np.asarray((x % period < line) | (y % period < line))
    if texture == "speckles":
        return np.asarray(rng.random((height, width)) < 0.35)
    raise ValueError(f"unknown texture {texture!r}")


def jitter_color(name: str, rng: np.random.Generator) -> NDArray[np.float32]:
    """An RGB value of that colour name, float32 [3] in 0..255. Black, white and gray stay without hue."""
    base = np.asarray(COLORS[name], dtype=np.float32)
    if name in ("black", "white", "gray"):
        return np.clip(base + rng.normal() * 7.0, 0, 255).astype(np.float32)
    return np.clip(base + rng.normal(size=3) * 12.0, 0, 255).astype(np.float32)
