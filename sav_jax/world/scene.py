"""Scenes: what is in a small image, said exactly, and the drawing of it.

A :class:`Scene` is data. :func:`sample_scene` makes one from a seed, :func:`draw` turns it into pixels (the same pixels
every time), :mod:`sav_jax.world.questions` asks about it. Positions and sizes are in pixels of the drawn image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from sav_jax.world.glyphs import DIGITS, HELD_OUT_FACES, LETTERS, STROKES, TRAIN_FACES, glyph_mask
from sav_jax.world.shapes import COLORS, SHAPES, TEXTURES, jitter_color, shape_mask, texture_pattern

#: Side of a normal scene and of a large one, in pixels.
SIZE, LARGE = 32, 64
#: Side of a scanned glyph before it is enlarged.
SCAN = 8

#: Colours too much alike to be drawn on each other.
_ALIKE = {
    frozenset(pair)
    for pair in (
        ("red", "orange"), ("orange", "yellow"), ("yellow", "white"), ("blue", "purple"), ("pink", "white"),
        ("pink", "orange"), ("purple", "black"), ("blue", "black"), ("gray", "green"), ("gray", "purple"),
        ("pink", "gray"), ("red", "purple"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """One object of a scene.

    Attributes:
        category: "digit", "letter" or "shape".
        name: "7", "k", "star".
        color: a key of ``COLORS``.
        texture: one of ``TEXTURES``; glyphs are plain.
        size: "small" or "large".
        box: (left, top, width, height) in pixels, where it is drawn.
        face: font face or ``STROKES`` for glyphs, "" for shapes.
        seed: the rest of its looks.
    """

    category: str
    name: str
    color: str
    texture: str
    size: str
    box: tuple[int, int, int, int]
    face: str
    seed: int

    @property
    def center(self) -> tuple[float, float]:
        left, top, width, height = self.box
        return left + width / 2, top + height / 2


@dataclass(frozen=True)
class Scene:
    """What is in one image.

    Attributes:
        kind: "scan" (one glyph at 8x8, enlarged), "glyph", "shape", "pair" (two things side by side or one above
            the other) or "group" (one to four things).
        things: the objects; those of a "pair" are ordered left to right, or top to bottom.
        background: colour name.
        side: width and height in pixels.
        layout: "left-right" or "top-bottom" for a pair, else "".
        place: "left", "right", "top", "bottom" for a single thing off centre, else "".
        held_out: glyphs come from faces and pen styles that training never draws.
        noise: standard deviation of grey noise, 0..255.
        blur: radius of a Gaussian blur in pixels.
        seed: colours' variation and noise.
    """

    kind: str
    things: tuple[Thing, ...]
    background: str
    side: int
    layout: str
    place: str
    held_out: bool
    noise: float
    blur: float
    seed: int

    @property
    def thing(self) -> Thing:
        return self.things[0]


def _pick(rng: np.random.Generator, options: tuple[str, ...] | str) -> str:
    return options[int(rng.integers(len(options)))]


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))


def _colors(rng: np.random.Generator, colorful: float) -> tuple[str, str]:
    """Ink and background colours that can be told apart."""
    if rng.random() >= colorful:
        return ("white", "black") if rng.random() < 0.6 else ("black", "white")
    names = tuple(COLORS)
    while True:
        ink, background = _pick(rng, names), _pick(rng, names)
        if ink != background and frozenset((ink, background)) not in _ALIKE:
            return ink, background


def _face(rng: np.random.Generator, held_out: bool, strokes: float) -> str:
    if rng.random() < strokes:
        return STROKES
    return _pick(rng, HELD_OUT_FACES if held_out else TRAIN_FACES)


def _thing(
    rng: np.random.Generator, category: str, color: str, size: str, box: tuple[int, int, int, int], held_out: bool
) -> Thing:
    texture, face = "plain", ""
    if category == "shape":
        name = _pick(rng, SHAPES)
        if size == "large" and rng.random() < 0.8:
            texture = _pick(rng, TEXTURES)
    else:
        name = _pick(rng, DIGITS if category == "digit" else LETTERS)
        # Letters have no held-out pen styles: held-out letters are always printed.
        face = _face(rng, held_out, 0.65 if category == "digit" else (0.0 if held_out else 0.4))
    return Thing(category, name, color, texture, size, box, face, _seed(rng))


def _category(rng: np.random.Generator, shapes: float) -> str:
    return "shape" if rng.random() < shapes else ("digit" if rng.random() < 0.5 else "letter")


def _placed_box(rng: np.random.Generator, place: str, size: str, side: int) -> tuple[int, int, int, int]:
    """A box of that size around a place of the image ("" is the middle)."""
    width = round(side * (rng.uniform(0.26, 0.36) if size == "small" else rng.uniform(0.5, 0.62)))
    free = side - width
    x, y = free / 2 + rng.uniform(-0.08, 0.08, size=2) * side
    if place in ("left", "right"):
        x = rng.uniform(0, 0.1) * free if place == "left" else rng.uniform(0.9, 1.0) * free
    elif place:
        y = rng.uniform(0, 0.1) * free if place == "top" else rng.uniform(0.9, 1.0) * free
    return round(float(np.clip(x, 0, free))), round(float(np.clip(y, 0, free))), width, width


def sample_scene(
    seed: int, kind: str, *, category: str | None = None, held_out: bool = False, side: int = SIZE
) -> Scene:
    """Makes a scene of a kind.

    Args:
        seed: everything about the scene follows from it and the other arguments.
        kind: see :class:`Scene`.
        category: what "scan" and "glyph" show; None chooses (scans: digits twice as often as letters).
        held_out: draw glyphs in faces and styles that training never uses.
        side: width and height in pixels.
    """
    rng = np.random.default_rng([seed, 7])
    noise = float(rng.uniform(2, 22)) if rng.random() < 0.4 else 0.0
    blur = float(rng.uniform(0.3, 0.9)) if rng.random() < 0.2 else 0.0
    layout = place = ""
    things: tuple[Thing, ...]
    if kind in ("scan", "glyph"):
        category = category or ("digit" if rng.random() < (0.67 if kind == "scan" else 0.5) else "letter")
        if kind == "scan":
            ink, background = ("white", "black") if rng.random() < 0.7 else _colors(rng, 0.5)
            thing = _thing(rng, category, ink, "large", (0, 0, side, side), held_out)
            noise, blur = noise / 3, 0.0
        else:
            ink, background = _colors(rng, 0.45)
            if rng.random() < 0.45:
                margin = round(rng.uniform(0, 0.14) * side)
                thing = _thing(
                    rng, category, ink, "large", (margin, margin, side - 2 * margin, side - 2 * margin), held_out
                )
            else:
                width = round(rng.uniform(0.4, 0.8) * side)
                x, y = (round(v) for v in rng.uniform(0, side - width, size=2))
                thing = _thing(
                    rng, category, ink, "large" if width > 0.6 * side else "small", (x, y, width, width), held_out
                )
        things = (thing,)
    elif kind == "shape":
        ink, background = _colors(rng, 0.85)
        size = "large" if rng.random() < 0.6 else "small"
        place = _pick(rng, ("left", "right", "top", "bottom", ""))
        things = (_thing(rng, "shape", ink, size, _placed_box(rng, place, size, side), held_out),)
    elif kind in ("pair", "group"):
        things, background, layout = _several(rng, kind, side, held_out)
    else:
        raise ValueError(f"unknown kind of scene {kind!r}")
    return Scene(kind, things, background, side, layout, place, held_out, noise, blur, _seed(rng))


def _several(rng: np.random.Generator, kind: str, side: int, held_out: bool) -> tuple[tuple[Thing, ...], str, str]:
    """Things, background and layout of a pair or a group."""
    background = _pick(rng, ("black", "white", "black", "white", "gray", "yellow", "blue"))
    usable = tuple(c for c in COLORS if c != background and frozenset((c, background)) not in _ALIKE)
    half = side // 2
    layout = ""
    if kind == "pair":
        layout = "left-right" if rng.random() < 0.5 else "top-bottom"
        first = _pick(rng, ("0", "1"))
        # Opposite quarters shift freely along the other axis, so that only the named axis tells them apart.
        across = rng.integers(0, half + 1, size=2)
        corners = [(0, int(across[0])), (half, int(across[1]))]
        cells = corners if layout == "left-right" else [(y, x) for x, y in corners]
        shapes = 1.0 if first == "0" else 0.5
    else:
        count = int(rng.integers(1, 5))
        quarters = [(0, 0), (half, 0), (0, half), (half, half)]
        cells = [quarters[i] for i in rng.permutation(4)[:count]]
        shapes = 0.8
    things: list[Thing] = []
    # Repeating colours and names makes "how many red things" more than one.
    palette = usable if kind == "pair" else tuple(usable[i] for i in rng.permutation(len(usable))[:2])
    names: list[str] = []
    for left, top in cells:
        width = round(half * rng.uniform(0.72, 0.98))
        x, y = left + int(rng.integers(half - width + 1)), top + int(rng.integers(half - width + 1))
        thing = _thing(rng, _category(rng, shapes), _pick(rng, palette), "small", (x, y, width, width), held_out)
        if kind == "pair" and thing.name in names:
            thing = _other_name(rng, thing, names[0])
        elif kind == "group" and things and thing.category == "shape" and rng.random() < 0.4:
            earlier = things[int(rng.integers(len(things)))]
            thing = replace(thing, name=earlier.name) if earlier.category == "shape" else thing
        names.append(thing.name)
        things.append(thing)
    return tuple(things), background, layout


def _other_name(rng: np.random.Generator, thing: Thing, taken: str) -> Thing:
    names: tuple[str, ...] = {"shape": SHAPES, "digit": tuple(DIGITS), "letter": tuple(LETTERS)}[thing.category]
    return replace(thing, name=_pick(rng, tuple(n for n in names if n != taken)))


def _mask(thing: Thing, held_out: bool) -> Image.Image:
    """The thing's ink within its box, "L"."""
    _, _, width, height = thing.box
    if thing.category == "shape":
        return shape_mask(thing.name, thing.seed, min(width, height))
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


_THRESHOLD = [0] * 128 + [255] * 128


def draw(scene: Scene) -> Image.Image:
    """The scene's pixels: an RGB image, the same for equal scenes."""
    rng = np.random.default_rng([scene.seed, 11])
    if scene.kind == "scan":
        return _scan(scene, rng)
    ground = jitter_color(scene.background, rng)
    pixels: NDArray[np.float32] = np.broadcast_to(ground, (scene.side, scene.side, 3)).copy()
    for thing in scene.things:
        left, top, _, _ = thing.box
        mask = _mask(thing, scene.held_out)
        ink = jitter_color(thing.color, rng)
        paint = np.broadcast_to(ink, (mask.height, mask.width, 3))
        if thing.texture != "plain":
            second = (
                0.75 * ground + 0.25 * ink
                if rng.random() < 0.5
                else (0.35 * ink if float(ink.mean()) > 90 else 0.5 * ink + 127.0)
            )
            paint = np.where(
                texture_pattern(thing.texture, thing.seed, mask.size)[..., None], second[None, None], paint
            )
        alpha = np.asarray(mask, dtype=np.float32)[..., None] / 255.0
        region = pixels[top : top + mask.height, left : left + mask.width]
        region += alpha * (paint - region)
    if scene.noise:
        pixels += rng.normal(size=(scene.side, scene.side, 1)).astype(np.float32) * np.float32(scene.noise)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(scene.blur)) if scene.blur else image
