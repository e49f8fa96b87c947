"""Digits and letters as masks, from the fonts that matplotlib ships and from pen strokes."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sav_jax.errors import UserError
from sav_jax.world.strokes import pen_strokes

DIGITS = "0123456789"
LETTERS = "abcdefghijklmnopqrstuvwxyz"

#: Font faces for training. All have the full set of digits and letters (checked by tests/world).
TRAIN_FACES = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-BoldOblique", "DejaVuSans-Oblique", "DejaVuSansMono",
    "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-BoldItalic",
    "STIXGeneral", "STIXGeneralBolIta", "STIXGeneralItalic", "cmb10", "cmr10", "cmti10", "cmtt10",
)  # fmt: skip
#: Font faces never seen in training.
HELD_OUT_FACES = ("DejaVuSansMono-BoldOblique", "DejaVuSerif-Italic", "STIXGeneralBol", "cmss10")
#: The "face" of handwriting.
STROKES = "strokes"

#: Letters drawn in one case only, because the other is a bare bar in some faces.
_CASE = {"l": "L", "i": "i"}
_FONT_PIXELS = 40  # size at which outlines are rasterised once; glyphs are then only ever made smaller


@lru_cache(maxsize=1)
def font_directory() -> Path:
    """Folder of matplotlib's TTF files, found without importing matplotlib."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise UserError("drawing the training world needs the fonts that matplotlib ships: pip install matplotlib")
    return Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"


@lru_cache(maxsize=4096)
def _font_glyph(face: str, character: str) -> Image.Image:
    font = ImageFont.truetype(str(font_directory() / f"{face}.ttf"), _FONT_PIXELS)
    left, top, right, bottom = font.getbbox(character)
    glyph = Image.new("L", (int(right - left) + 2, int(bottom - top) + 2), 0)
    ImageDraw.Draw(glyph).text((1 - left, 1 - top), character, fill=255, font=font)
    return glyph.crop(glyph.getbbox())


def _font_mask(
    face: str, character: str, rng: np.random.Generator, size: tuple[int, int], strength: float, stretch: float
) -> Image.Image:
    """A printed character, sheared, turned and scaled to fill a mask of (width, height)."""
    variant = _CASE.get(character) or (character.upper() if rng.random() < 0.5 else character)
    source = _font_glyph(face, variant)
    slant, turn = 0.16 * strength * rng.normal(), 0.07 * strength * rng.normal()
    width, height = source.size
    forward = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ np.array(
        [[1.0, -slant], [0.0, 1.0]]
    )
    corners = forward @ np.array([[-width, width, -width, width], [-height, -height, height, height]]) / 2.0
    extent = 2.0 * corners.max(axis=1)
    target_w, target_h = _fit(extent[0] / extent[1], size, stretch)
    scale = np.array([target_w / extent[0], target_h / extent[1]])
    inverse = np.linalg.inv(np.diag(scale) @ forward)
    out_w, out_h = max(round(target_w), 2), max(round(target_h), 2)
    # Twice the resolution, then a box average: the transform alone would alias when it shrinks.
    half = inverse / 2.0
    offset = np.array([width, height]) / 2.0 - half @ np.array([out_w, out_h])
    matrix = (half[0, 0], half[0, 1], offset[0], half[1, 0], half[1, 1], offset[1])
    large = source.transform((2 * out_w, 2 * out_h), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return large.reduce(2)


def _fit(aspect: float, size: tuple[int, int], stretch: float) -> tuple[float, float]:
    """Width and height of a glyph of aspect width/height within (width, height), after stretching its width."""
    width, height = size
    wanted = max(aspect * stretch, 0.12) * height
    return (wanted, float(height)) if wanted <= width else (float(width), max(height * width / wanted, height * 0.75))


def _stroke_mask(
    character: str,
    rng: np.random.Generator,
    size: tuple[int, int],
    held_out: bool,
    strength: float,
    stretch: float,
    thickness: float,
) -> Image.Image:
    """A handwritten character that fills a mask of (width, height); the pen's thickness is relative to the height."""
    lines = pen_strokes(character, rng, held_out=held_out, strength=strength)
    joined = np.concatenate(lines)
    low, extent = joined.min(axis=0), np.maximum(np.ptp(joined, axis=0), 1e-3)
    pen = max(thickness * size[1], 1.2)
    inner = (max(size[0] - pen, 1), max(size[1] - pen, 1))
    target_w, target_h = _fit(extent[0] / extent[1], inner, stretch)  # type: ignore[arg-type]
    if extent[0] < 0.12 * extent[1]:  # a bare vertical line: leave it a line
        target_w = extent[0] / extent[1] * target_h
    scale = np.array([target_w, target_h]) / extent
    width, height = max(round(target_w + pen), 2), max(round(target_h + pen), 2)
    canvas = Image.new("L", (2 * width, 2 * height), 0)
    draw = ImageDraw.Draw(canvas)
    for line in lines:
        path = 2.0 * ((line - low) * scale + pen / 2)
        draw.line(path.ravel().tolist(), fill=255, width=max(round(2 * pen), 1), joint="curve")
        for x, y in (path[0], path[-1]):
            draw.ellipse((x - pen, y - pen, x + pen, y + pen), fill=255)
    return canvas.reduce(2)


def glyph_mask(
    face: str, character: str, seed: int, size: tuple[int, int], *, held_out: bool = False, strength: float = 1.0
) -> Image.Image:
    """Draws one character.

    Args:
        face: a font face, or :data:`STROKES`.
        character: digit or lower-case letter; printed letters come in either case.
        seed: everything random about the drawing follows from it.
        size: (width, height) in pixels that the glyph fills in at least one direction.
        held_out: with ``STROKES``, draw in a style that training never sees.
        strength: amount of distortion, about 0 to 1.5.

    Returns:
        An "L" mask, 255 where the ink is, no larger than ``size`` by more than rounding.
    """
    rng = np.random.default_rng(seed)
    stretch = float(np.exp(0.18 * strength * rng.normal()))
    if face == STROKES:
        thickness = float(rng.uniform(0.07, 0.19))
        return _stroke_mask(character, rng, size, held_out, strength, stretch, thickness)
    return _font_mask(face, character, rng, size, strength, stretch)
