"""From a scene to pixels: the same pixels every time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from sav_jax.world.glyphs import STROKES, glyph_mask
from sav_jax.world.objects import object_mask
from sav_jax.world.shapes import jitter_color, shape_mask, texture_pattern
from sav_jax.world.things import SCAN, Scene, Thing

_BOARDS = {"triangle": "yellow", "circle": "white", "square": "blue"}
_THRESHOLD = [0] * 128 + [255] * 128


def _mask(thing: Thing, held_out: bool) -> Image.Image:
    """The thing's ink within its box, "L"."""
    _, _, width, height = thing.box
    if thing.category == "shape":
        return shape_mask(thing.name, thing.seed, min(width, height))
    if thing.category == "object":
        return object_mask(thing.name, thing.seed, min(width, height))
    if thing.category == "swatch":
        return Image.new("L", (width, height), 255)
    glyph = glyph_mask(thing.face, thing.name, thing.seed, (width, height), held_out=held_out and thing.face == STROKES)
    mask = Image.new("L", (width, height), 0)
    mask.paste(glyph, ((width - glyph.width) // 2, (height - glyph.height) // 2))
    return mask


def _scan(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """One glyph as a low-resolution scan: tight crop, two levels, means of 4x4 blocks, 16 levels, enlarged."""
    thing = scene.thing
    mask = _mask(replace(thing, box=(0, 0, 4 * SCAN, 4 * SCAN)), scene.held_out)
    cells = np.asarray(mask.point(_THRESHOLD).reduce(4), dtype=np.float32) / 255.0
    if scene.noise:
        cells = cells + rng.normal(size=cells.shape).astype(np.float32) * np.float32(scene.noise / 255.0)
    cells = np.round(np.clip(cells, 0.0, 1.0) * 16.0) / 16.0
    if (thing.color, scene.background) == ("white", "black"):
        rgb = np.repeat((cells * 255.0)[..., None], 3, axis=-1)
    else:
        ink, ground = jitter_color(thing.color, rng), jitter_color(scene.background, rng)
        rgb = cells[..., None] * ink[None, None] + (1.0 - cells[..., None]) * ground[None, None]
    return Image.fromarray(rgb.astype(np.uint8)).resize((scene.side, scene.side), Image.Resampling.BICUBIC)


def _blend(pixels: NDArray[np.float32], mask: Image.Image, corner: tuple[int, int], paint: NDArray[np.float32]) -> None:
    """Paints over a part of ``pixels`` in place, as much as ``mask`` says."""
    left, top = corner
    alpha = np.asarray(mask, dtype=np.float32)[..., None] * np.float32(1 / 255)
    region = pixels[top : top + mask.height, left : left + mask.width]
    region += alpha * (paint - region)


def _paint(
    thing: Thing, mask: Image.Image, style: str, ground: NDArray[np.float32], rng: np.random.Generator
) -> NDArray[np.float32]:
    """The thing's colours, float32 ``[1 or height, 1 or width, 3]``."""
    ink = jitter_color(thing.color, rng)
    paint: NDArray[np.floating[Any]] = ink[None, None]
    if thing.texture != "plain":
        second = (
            0.75 * ground + 0.25 * ink
            if rng.random() < 0.5
            else (0.35 * ink if float(ink.mean()) > 90 else 0.5 * ink + 127.0)
        )
        paint = np.where(texture_pattern(thing.texture, thing.seed, mask.size)[..., None], second[None, None], paint)
    if style == "shaded":
        ramp = np.linspace(1.1, 0.5, mask.height, dtype=np.float32)[:, None, None]
        lift = np.linspace(30.0, 0.0, mask.width, dtype=np.float32)[None, :, None]
        paint = np.minimum(paint * ramp + lift, 255)
    elif style == "rimmed":
        rim = np.asarray(mask.filter(ImageFilter.MinFilter(3)), dtype=np.float32)[..., None] / 255
        dark = 0.3 * ink if float(ink.mean()) > 90 else 0.4 * ink + 150.0
        paint = rim * paint + (1 - rim) * dark[None, None]
    return np.asarray(paint, dtype=np.float32)


def draw(scene: Scene) -> Image.Image:
    """The scene's pixels: an RGB image, the same for equal scenes."""
    rng = np.random.default_rng([scene.seed, 11])
    if scene.kind == "scan":
        return _scan(scene, rng)
    ground = jitter_color(scene.background, rng)
    pixels: NDArray[np.float32] = np.broadcast_to(ground, (scene.side, scene.side, 3)).copy()
    if scene.frame:
        board = jitter_color(_BOARDS[scene.frame], rng)
        _blend(pixels, shape_mask(scene.frame, scene.seed, scene.side), (0, 0), board[None, None])
    for thing in scene.things:
        mask = _mask(thing, scene.held_out)
        paint = _paint(thing, mask, scene.style, ground, rng)
        if scene.style == "soft":
            mask = mask.filter(ImageFilter.GaussianBlur(0.05 * min(mask.size)))
        _blend(pixels, mask, (thing.box[0], thing.box[1]), paint)
    if scene.occluder:
        left, top, width, height = scene.occluder
        pixels[top : top + height, left : left + width] = 90 + 70 * rng.random()
    if scene.noise:
        pixels += rng.normal(size=(scene.side, scene.side, 1)).astype(np.float32) * np.float32(scene.noise)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    if scene.style == "mosaic":
        image = image.reduce(2).resize(image.size, Image.Resampling.NEAREST)
    return image.filter(ImageFilter.GaussianBlur(scene.blur)) if scene.blur else image
