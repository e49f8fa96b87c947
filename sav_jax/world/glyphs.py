"""Digits, letters and short words as masks, from the fonts that matplotlib ships and from pen strokes."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

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


@lru_cache(maxsize=8192)
def _font_glyph(face: str, character: str, weight: int = 0) -> Image.Image:
    """Characters as the face has them, cropped; ``weight`` -1 and 1 make strokes thinner and thicker."""
    if weight:
        plain = _font_glyph(face, character)
        if weight < 0:
            thin = plain.filter(ImageFilter.MinFilter(3))
            # A hairline would vanish.
            return thin if np.asarray(thin).sum() > 0.45 * np.asarray(plain).sum() else plain
        wide = Image.new("L", (plain.width + 4, plain.height + 4), 0)
        wide.paste(plain, (2, 2))
        return wide.filter(ImageFilter.MaxFilter(5))
    font = ImageFont.truetype(str(font_directory() / f"{face}.ttf"), _FONT_PIXELS)
    left, top, right, bottom = font.getbbox(character)
    glyph = Image.new("L", (int(right - left) + 2, int(bottom - top) + 2), 0)
    ImageDraw.Draw(glyph).text((1 - left, 1 - top), character, fill=255, font=font)
    return glyph.crop(glyph.getbbox())


def _font_mask(
    face: str, character: str, rng: np.random.Generator, size: tuple[int, int], strength: float, stretch: float
) -> Image.Image:
    """A printed character or word, sheared, turned, bent and scaled to fill a mask of (width, height)."""
    variant = _CASE.get(character) or (character.upper() if rng.random() < 0.5 else character)
    weight = int(rng.integers(-1, 2)) if rng.random() < 0.5 * strength else 0
    source = _font_glyph(face, variant, weight)
    slant, turn = 0.16 * strength * rng.normal(), 0.07 * strength * rng.normal()
    width, height = source.size
    forward = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ np.array(
        [[1.0, -slant], [0.0, 1.0]]
    )
    corners = forward @ np.array([[-width, width, -width, width], [-height, -height, height, height]]) / 2.0
    extent = 2.0 * corners.max(axis=1)
    target_w, target_h = _fit(extent[0] / extent[1], size, stretch, 0.75 if len(character) == 1 else 0.4)
    scale = np.array([target_w / extent[0], target_h / extent[1]])
    inverse = np.linalg.inv(np.diag(scale) @ forward)
    out_w, out_h = max(round(target_w), 2), max(round(target_h), 2)
    # Twice the resolution, then a box average: the transform alone would alias when it shrinks.
    half = inverse / 2.0
    offset = np.array([width, height]) / 2.0 - half @ np.array([out_w, out_h])
    matrix = (half[0, 0], half[0, 1], offset[0], half[1, 0], half[1, 1], offset[1])
    large = source.transform((2 * out_w, 2 * out_h), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    if len(character) == 1 and rng.random() < 0.4 * strength:
        large = _bent(large, rng, strength)
    return large.reduce(2)


def _bent(mask: Image.Image, rng: np.random.Generator, strength: float) -> Image.Image:
    """A mask of the same size, its parts moved against each other as on elastic: a grid of 2 x 2 patches, whose inner
    corner and edge middles move.
    """
    width, height = mask.size
    x, y = np.meshgrid(np.linspace(0, width, 3), np.linspace(0, height, 3))
    shift = rng.normal(scale=0.06 * strength, size=(2, 3, 3)).clip(-0.15, 0.15)
    shift[0][:, [0, 2]] = np.abs(shift[0][:, [0, 2]]) * [-0.5, 0.5]  # outer edges are only ever taken from outside
    shift[1][[0, 2]] = np.abs(shift[1][[0, 2]]) * [[-0.5], [0.5]]
    x, y = x + shift[0] * width, y + shift[1] * height
    xs, ys = (0, width // 2, width), (0, height // 2, height)
    mesh = [
        (
            (xs[j], ys[i], xs[j + 1], ys[i + 1]),
            tuple(float(v) for a, b in ((i, j), (i + 1, j), (i + 1, j + 1), (i, j + 1)) for v in (x[a, b], y[a, b])),
        )
        for i in range(2)
        for j in range(2)
    ]
    return mask.transform(mask.size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)


def _fit(aspect: float, size: tuple[int, int], stretch: float, least: float = 0.75) -> tuple[float, float]:
    """Width and height of a glyph of aspect width/height within (width, height), after stretching its width; its
    height is at least that share of the height there is.
    """
    width, height = size
    wanted = max(aspect * stretch, 0.12) * height
    return (wanted, float(height)) if wanted <= width else (float(width), max(height * width / wanted, height * least))


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


def _written_word(
    word: str, rng: np.random.Generator, size: tuple[int, int], strength: float, thickness: float
) -> Image.Image:
    """Handwritten letters side by side, in one pen."""
    width = size[0] // len(word)
    height = min(size[1], round(1.7 * width))
    mask = Image.new("L", (size[0], height), 0)
    for place, character in enumerate(word):
        cell = (max(width - 1, 3), height)
        letter = _stroke_mask(character, rng, cell, False, 0.7 * strength, 1.0, min(thickness, 0.13))
        letter = letter.crop((0, 0, min(letter.width, width), min(letter.height, height)))
        mask.paste(letter, (place * width + (width - letter.width) // 2, height - letter.height))
    return mask


def glyph_mask(
    face: str, character: str, seed: int, size: tuple[int, int], *, held_out: bool = False, strength: float = 1.0
) -> Image.Image:
    """Draws one character, or a word.

    Args:
        face: a font face, or :data:`STROKES`.
        character: digit or lower-case letter, or a word of them; what is printed comes in either case.
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
        if len(character) > 1:
            return _written_word(character, rng, size, strength, thickness)
        return _stroke_mask(character, rng, size, held_out, strength, stretch, thickness)
    return _font_mask(face, character, rng, size, strength, stretch)
