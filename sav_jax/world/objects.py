"""Silhouettes of everyday things, some of them dangerous.

Training names every object and never says which of them do harm: that is a rule over names, which a few labelled
examples have to teach.
"""

from __future__ import annotations

from functools import cache

from PIL import Image, ImageDraw

from sav_jax.world.shapes import CANVAS, turned

HARMFUL = ("flame", "knife", "skull", "bomb", "gun", "axe", "bolt", "saw")
HARMLESS = ("house", "tree", "cup", "flower", "fish", "key", "car", "boat")
OBJECTS = HARMFUL + HARMLESS

#: Ink (+) and holes (-): p polygon, e ellipse, r rectangle, in percent of the box.
_PARTS: dict[str, tuple[str, ...]] = {
    "flame": (
        "+p 50 0 62 20 78 36 86 60 80 82 64 98 36 98 20 82 14 58 26 34 32 46 40 30",
        "-p 52 56 62 74 58 90 42 90 38 76",
    ),
    "knife": ("+p 34 2 56 16 62 40 62 62 34 62", "+r 40 62 56 98", "+r 28 58 68 66"),
    "skull": (
        "+e 10 2 90 72", "+r 30 56 70 98", "-e 24 28 44 50", "-e 56 28 76 50", "-p 50 52 56 64 44 64",
        "-r 42 80 46 100", "-r 54 80 58 100",
    ),
    "bomb": ("+e 6 28 78 100", "+r 56 20 74 40", "+p 66 22 72 10 88 2 94 8 80 14 74 26"),
    "gun": ("+r 4 22 98 48", "+p 10 40 42 40 34 96 8 96", "-e 44 50 62 70", "+p 42 46 66 46 66 50 46 70 42 66"),
    "axe": ("+r 44 6 56 100", "+p 56 8 92 2 96 50 56 40", "+r 34 10 44 36"),
    "bolt": ("+p 60 0 16 56 44 56 30 100 86 36 56 36 78 0",),
    "saw": (
        "+p 2 40 66 30 66 62 58 70 54 62 46 72 42 63 34 73 30 64 22 74 18 65 10 74 2 66", "+e 60 26 100 78",
        "-e 72 40 88 64",
    ),
    "house": ("+p 50 2 100 48 0 48", "+r 14 46 86 98", "-r 42 64 58 100"),
    "tree": ("+p 50 0 84 40 66 40 94 76 6 76 34 40 16 40", "+r 42 74 58 100"),
    "cup": ("+p 8 14 72 14 64 92 16 92", "+e 56 24 98 70", "-e 68 36 88 58", "+p 8 14 72 14 66 80 14 80"),
    "flower": (
        "+e 32 0 68 34", "+e 8 16 44 50", "+e 56 16 92 50", "+e 18 38 52 70", "+e 48 38 82 70", "-e 40 26 60 46",
        "+r 46 60 54 100", "+p 52 92 78 72 82 78",
    ),
    "fish": ("+e 2 24 76 78", "+p 62 50 98 20 98 82", "-e 14 38 24 48"),
    "key": ("+e 2 28 44 72", "-e 14 40 32 60", "+r 40 44 98 56", "+r 74 54 82 76", "+r 88 54 96 72"),
    "car": ("+p 22 46 34 22 70 22 84 46", "+r 2 44 98 72", "+e 12 58 38 86", "+e 62 58 88 86", "-r 40 28 64 44"),
    "boat": ("+p 2 64 98 64 80 94 20 94", "+r 46 4 52 64", "+p 54 6 90 56 54 56"),
}  # fmt: skip


@cache
def _silhouette(name: str) -> Image.Image:
    mask = Image.new("L", (CANVAS, CANVAS), 0)
    pen = ImageDraw.Draw(mask)
    for part in _PARTS[name]:
        mark, *numbers = part.split()
        xy = [int(n) * (CANVAS - 1) / 100 for n in numbers]
        fill = 255 if mark[0] == "+" else 0
        shape = {"p": pen.polygon, "e": pen.ellipse, "r": pen.rectangle}[mark[1]]
        shape(xy, fill=fill)
    return mask


def object_mask(name: str, seed: int, size: int) -> Image.Image:
    """An object in a square "L" mask of ``size`` pixels, turned and stretched a little; half of them face left."""
    outline = _silhouette(name)
    if seed % 2:
        outline = outline.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return turned(outline, seed, size)
