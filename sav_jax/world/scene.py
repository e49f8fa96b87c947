"""Scenes: what is in a small image, said exactly.

A :class:`Scene` is data (``things.py``). :func:`sample_scene` makes one from a seed, :func:`draw` turns it into pixels,
:mod:`sav_jax.world.questions` asks about it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sav_jax.world.drawing import draw
from sav_jax.world.glyphs import DIGITS, HELD_OUT_FACES, LETTERS, STROKES, TRAIN_FACES
from sav_jax.world.objects import OBJECTS
from sav_jax.world.shapes import COLORS, SHAPES, TEXTURES, UNNAMED_TEXTURES
from sav_jax.world.things import FRAMES, LARGE, SCAN, SIZE, STYLES, Scene, Thing
from sav_jax.world.words import WORDS

__all__ = [
    "KINDS", "LARGE", "SCAN", "SIZE", "Scene", "Thing", "draw", "held_out_pair", "names_of", "sample_scene",
    "stands_out",
]  # fmt: skip

KINDS = ("scan", "glyph", "shape", "object", "word", "swatch", "pair", "group", "crowd")
"""Kinds of scene, see :class:`sav_jax.world.things.Scene`."""

Box = tuple[int, int, int, int]

_COLOR_NAMES = tuple(COLORS)
_NAMES: dict[str, tuple[str, ...]] = {
    "digit": tuple(DIGITS), "letter": tuple(LETTERS), "shape": SHAPES, "object": OBJECTS, "word": WORDS,
}  # fmt: skip
#: Colours too much alike to be drawn on each other.
_ALIKE = {
    frozenset(pair)
    for pair in (
        ("red", "orange"), ("orange", "yellow"), ("yellow", "white"), ("blue", "purple"), ("pink", "white"),
        ("pink", "orange"), ("purple", "black"), ("blue", "black"), ("gray", "green"), ("gray", "purple"),
        ("pink", "gray"), ("red", "purple"), ("brown", "red"), ("brown", "purple"), ("brown", "black"),
        ("brown", "gray"), ("brown", "green"), ("brown", "orange"), ("cyan", "white"), ("cyan", "gray"),
        ("cyan", "green"),
    )
}  # fmt: skip
#: Things of a crowd are about ten pixels wide.
_CROWD_SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")


def names_of(category: str) -> tuple[str, ...]:
    """All names of a category."""
    return _NAMES[category]


def held_out_pair(color: str, name: str) -> bool:
    """Whether a shape or object of that colour is kept out of training (about one in eleven)."""
    names = SHAPES + OBJECTS
    return name in names and (_COLOR_NAMES.index(color) + 2 * names.index(name)) % 11 == 0


def stands_out(ink: str, background: str) -> bool:
    """Whether something of that colour can be seen on that background."""
    return ink != background and frozenset((ink, background)) not in _ALIKE


def _pick(rng: np.random.Generator, options: tuple[str, ...] | str) -> str:
    return options[int(rng.integers(len(options)))]


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))


def _colors(rng: np.random.Generator, colorful: float) -> tuple[str, str]:
    """Ink and background colours that can be told apart."""
    if rng.random() >= colorful:
        return ("white", "black") if rng.random() < 0.6 else ("black", "white")
    while True:
        ink, background = _pick(rng, _COLOR_NAMES), _pick(rng, _COLOR_NAMES)
        if stands_out(ink, background):
            return ink, background


def _face(rng: np.random.Generator, held_out: bool, strokes: float) -> str:
    if rng.random() < strokes:
        return STROKES
    return _pick(rng, HELD_OUT_FACES if held_out else TRAIN_FACES)


def _name(rng: np.random.Generator, category: str, color: str, held_out: bool, names: tuple[str, ...] = ()) -> str:
    """A name of the category (of ``names``, if given) that may be drawn in that colour."""
    while True:
        name = _pick(rng, names or _NAMES[category])
        if held_out or not held_out_pair(color, name):
            return name


def _thing(rng: np.random.Generator, category: str, color: str, size: str, box: Box, held_out: bool) -> Thing:
    texture, face = "plain", ""
    name = _name(rng, category, color, held_out)
    if category == "shape":
        if size == "large" and rng.random() < 0.8:
            texture = _pick(rng, TEXTURES)
    elif category != "object":
        # Letters have no held-out pen styles: held-out letters and words are always printed.
        strokes = 0.65 if category == "digit" else (0.0 if held_out else 0.3)
        face = _face(rng, held_out, strokes)
    return Thing(category, name, color, texture, size, box, face, _seed(rng))


def _placed_box(rng: np.random.Generator, place: str, size: str, side: int) -> Box:
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
        kind: of ``KINDS``.
        category: what "scan" and "glyph" show; None chooses (scans: digits twice as often as letters).
        held_out: draw glyphs in faces and styles, and shapes and objects in colours, that training never uses.
        side: width and height in pixels.
    """
    rng = np.random.default_rng([seed, 7])
    noise = float(rng.uniform(2, 22)) if rng.random() < 0.4 else 0.0
    blur = float(rng.uniform(0.3, 0.9)) if rng.random() < 0.2 else 0.0
    if kind in ("scan", "glyph"):
        category = category or ("digit" if rng.random() < (0.67 if kind == "scan" else 0.5) else "letter")
        scene = (_scan_scene if kind == "scan" else _glyph_scene)(rng, category, held_out, side)
    elif kind in _SAMPLERS:
        scene = _SAMPLERS[kind](rng, held_out, side)
    else:
        raise ValueError(f"unknown kind of scene {kind!r}")
    if kind == "scan":
        noise, blur = noise / 3, 0.0
    elif kind in ("crowd", "word"):
        noise, blur = noise / 2, blur / 2
    return replace(scene, noise=noise, blur=blur, seed=_seed(rng))


def _one(kind: str, thing: Thing, background: str, side: int, held_out: bool, place: str = "") -> Scene:
    return Scene(kind, (thing,), background, side, "", place, held_out, 0.0, 0.0, 0)


def _scan_scene(rng: np.random.Generator, category: str, held_out: bool, side: int) -> Scene:
    ink, background = ("white", "black") if rng.random() < 0.7 else _colors(rng, 0.5)
    return _one("scan", _thing(rng, category, ink, "large", (0, 0, side, side), held_out), background, side, held_out)


def _glyph_scene(rng: np.random.Generator, category: str, held_out: bool, side: int) -> Scene:
    ink, background = _colors(rng, 0.45)
    if rng.random() < 0.45:
        margin = round(rng.uniform(0, 0.14) * side)
        box, size = (margin, margin, side - 2 * margin, side - 2 * margin), "large"
    else:
        width = round(rng.uniform(0.4, 0.8) * side)
        x, y = (round(v) for v in rng.uniform(0, side - width, size=2))
        box, size = (x, y, width, width), "large" if width > 0.6 * side else "small"
    scene = _one("glyph", _thing(rng, category, ink, size, box, held_out), background, side, held_out)
    return replace(scene, style=_style(rng, 0.2, ("shaded", "soft")), occluder=_occluder(rng, 0.05, side))


def _shape_scene(rng: np.random.Generator, held_out: bool, side: int) -> Scene:
    return _single(rng, "shape", held_out, side)


def _object_scene(rng: np.random.Generator, held_out: bool, side: int) -> Scene:
    """An object alone, or on a board."""
    if rng.random() >= 0.4:
        return _single(rng, "object", held_out, side)
    frame = _pick(rng, FRAMES[1:])
    ink = "white" if frame == "square" else _pick(rng, ("black", "red", "black"))
    _, background = _colors(rng, 0.85)
    width = round(side * (0.42 if frame == "triangle" else 0.56))
    left, top = (side - width) // 2, (side - width) // 2 + (round(0.14 * side) if frame == "triangle" else 0)
    thing = _thing(rng, "object", ink, "small", (left, top, width, width), held_out)
    # A yellow board on yellow could not be seen.
    background = background if background not in ("yellow", "white", "blue", "pink", "cyan") else "gray"
    return replace(_one("object", thing, background, side, held_out), frame=frame)


def _single(rng: np.random.Generator, category: str, held_out: bool, side: int) -> Scene:
    ink, background = _colors(rng, 0.85)
    size = "large" if rng.random() < 0.6 else "small"
    place = _pick(rng, ("left", "right", "top", "bottom", ""))
    thing = _thing(rng, category, ink, size, _placed_box(rng, place, size, side), held_out)
    scene = _one(category, thing, background, side, held_out, place)
    styles = ("shaded", "rimmed", "soft", "mosaic") if size == "large" else ("shaded", "soft")
    return replace(
        scene,
        style=_style(rng, 0.5, styles),
        occluder=_occluder(rng, 0.15, side) if size == "large" else None,
    )


def _word_scene(rng: np.random.Generator, held_out: bool, side: int) -> Scene:
    ink, background = _colors(rng, 0.6)
    width, height = round(side * rng.uniform(0.88, 1.0)), round(side * rng.uniform(0.36, 0.6))
    x, y = int(rng.integers(side - width + 1)), int(rng.integers(side - height + 1))
    return _one("word", _thing(rng, "word", ink, "large", (x, y, width, height), held_out), background, side, held_out)


def _swatch_scene(rng: np.random.Generator, held_out: bool, side: int) -> Scene:
    ink, background = _colors(rng, 0.85)
    margin = round(side * rng.uniform(0.06, 0.18))
    box = (margin, margin, side - 2 * margin, side - 2 * margin)
    thing = Thing("swatch", "", ink, _pick(rng, UNNAMED_TEXTURES), "large", box, "", _seed(rng))
    return replace(_one("swatch", thing, background, side, held_out), style=_style(rng, 0.3, ("shaded",)))


def _style(rng: np.random.Generator, share: float, styles: tuple[str, ...]) -> str:
    assert set(styles) <= set(STYLES)
    return _pick(rng, styles) if rng.random() < share else "flat"


def _occluder(rng: np.random.Generator, share: float, side: int) -> Box | None:
    """A bar somewhere in the image, less than a twelfth of it."""
    if rng.random() >= share:
        return None
    long, short = round(side * rng.uniform(0.3, 0.5)), round(side * rng.uniform(0.1, 0.16))
    width, height = (long, short) if rng.random() < 0.5 else (short, long)
    return int(rng.integers(side - width + 1)), int(rng.integers(side - height + 1)), width, height


def _ground(rng: np.random.Generator) -> tuple[str, tuple[str, ...]]:
    """A background for several things and the colours that stand out from it."""
    background = _pick(rng, ("black", "white", "black", "white", "gray", "yellow", "blue"))
    return background, tuple(c for c in COLORS if stands_out(c, background))


def _pair_scene(rng: np.random.Generator, held_out: bool, side: int) -> Scene:
    """Two things of different names; of the same colour or of different sizes in a third of the scenes each."""
    background, usable = _ground(rng)
    half = side // 2
    layout = "left-right" if rng.random() < 0.5 else "top-bottom"
    mixed = rng.random() < 0.55
    # Opposite halves shift freely along the other axis, so that only the named axis tells them apart.
    across = rng.integers(0, half + 1, size=2)
    cells = [(0, int(across[0])), (half, int(across[1]))]
    cells = cells if layout == "left-right" else [(y, x) for x, y in cells]
    uneven = rng.random() < 0.35
    sizes = ("large", "small") if rng.random() < 0.5 else ("small", "large")
    color = _pick(rng, usable) if rng.random() < 0.35 else None
    things: list[Thing] = []
    for (left, top), size in zip(cells, sizes, strict=True):
        low, high = ((0.9, 1.0) if size == "large" else (0.45, 0.58)) if uneven else (0.72, 0.98)
        width = round(half * rng.uniform(low, high))
        box = (left + int(rng.integers(half - width + 1)), top + int(rng.integers(half - width + 1)), width, width)
        category = _category(rng, mixed)
        thing = _thing(rng, category, color or _pick(rng, usable), size if uneven else "small", box, held_out)
        thing = replace(thing, texture="plain")
        while things and thing.name == things[0].name:
            thing = replace(thing, name=_name(rng, category, thing.color, held_out))
        things.append(thing)
    scene = Scene("pair", tuple(things), background, side, layout, "", held_out, 0.0, 0.0, 0)
    return replace(scene, style=_style(rng, 0.25, ("shaded", "soft")))


def _category(rng: np.random.Generator, mixed: bool) -> str:
    return _pick(rng, ("digit", "letter", "object", "object", "shape", "shape")) if mixed else "shape"


def _group_scene(rng: np.random.Generator, held_out: bool, side: int) -> Scene:
    """One to four things, one per quarter, in at most two colours."""
    background, usable = _ground(rng)
    half = side // 2
    quarters = [(0, 0), (half, 0), (0, half), (half, half)]
    # Repeating colours and names makes "how many red things" more than one.
    palette = tuple(usable[i] for i in rng.permutation(len(usable))[:2])
    things: list[Thing] = []
    for place in rng.permutation(4)[: int(rng.integers(1, 5))]:
        left, top = quarters[place]
        width = round(half * rng.uniform(0.72, 0.98))
        box = (left + int(rng.integers(half - width + 1)), top + int(rng.integers(half - width + 1)), width, width)
        category = _category(rng, rng.random() < 0.4)
        thing = _thing(rng, category, _pick(rng, palette), "small", box, held_out)
        if things and rng.random() < 0.4:
            earlier = things[int(rng.integers(len(things)))]
            if earlier.category == category and (held_out or not held_out_pair(thing.color, earlier.name)):
                thing = replace(thing, name=earlier.name)
        things.append(thing)
    scene = Scene("group", tuple(things), background, side, "", "", held_out, 0.0, 0.0, 0)
    return replace(scene, style=_style(rng, 0.25, ("shaded", "soft")))


def _crowd_scene(rng: np.random.Generator, held_out: bool, side: int) -> Scene:
    """One to nine small shapes in the cells of a grid, of two names and two colours."""
    background, usable = _ground(rng)
    palette = tuple(usable[i] for i in rng.permutation(len(usable))[:2])
    names = tuple(_CROWD_SHAPES[i] for i in rng.permutation(len(_CROWD_SHAPES))[:2])
    edges = [round(i * side / 3) for i in range(4)]
    things: list[Thing] = []
    for cell in rng.permutation(9)[: int(rng.integers(1, 10))]:
        left, top = edges[cell % 3], edges[cell // 3]
        room = edges[1]
        width = round(room * rng.uniform(0.74, 0.95))
        box = (left + int(rng.integers(room - width + 1)), top + int(rng.integers(room - width + 1)), width, width)
        color, name = _pick(rng, palette), _pick(rng, names)
        if held_out_pair(color, name) and not held_out:
            name = names[0] if name == names[1] else names[1]
            if held_out_pair(color, name):
                continue
        things.append(Thing("shape", name, color, "plain", "small", box, "", _seed(rng)))
    if not things:
        return _crowd_scene(rng, held_out, side)
    return Scene("crowd", tuple(things), background, side, "", "", held_out, 0.0, 0.0, 0)


_SAMPLERS = {
    "shape": _shape_scene,
    "object": _object_scene,
    "word": _word_scene,
    "swatch": _swatch_scene,
    "pair": _pair_scene,
    "group": _group_scene,
    "crowd": _crowd_scene,
}
