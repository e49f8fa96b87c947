"""What a scene is made of: data only, in pixels of the drawn image."""

from __future__ import annotations

from dataclasses import dataclass

#: Side of a normal scene and of a large one, in pixels.
SIZE, LARGE = 32, 64
#: Side of a scanned glyph before it is enlarged.
SCAN = 8

#: Manners of drawing. No question names them.
STYLES = ("flat", "shaded", "rimmed", "soft", "mosaic")
#: What may stand behind an object: nothing, or a board of that shape, as on a road sign.
FRAMES = ("", "triangle", "circle", "square")


@dataclass(frozen=True)
class Thing:
    """One thing of a scene.

    Attributes:
        category: "digit", "letter", "shape", "object" or "word".
        name: "7", "k", "star", "key", "stop"; "" for a swatch.
        color: a key of ``COLORS``.
        texture: one of ``TEXTURES`` or ``UNNAMED_TEXTURES``; only shapes and swatches are not plain.
        size: "small" or "large".
        box: (left, top, width, height) in pixels, where it is drawn.
        face: font face or ``STROKES`` for glyphs and words, "" for all else.
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
        kind: "scan" (one glyph at 8x8, enlarged), "glyph", "shape", "object", "word", "swatch" (one surface of an
            unnamed texture), "pair" (two things side by side or one above the other), "group" (one to four things) or
            "crowd" (one to nine small shapes of two sorts).
        things: those of a "pair" are ordered left to right, or top to bottom.
        background: colour name.
        side: width and height in pixels.
        layout: "left-right" or "top-bottom" for a pair, else "".
        place: "left", "right", "top", "bottom" for a single thing off centre, else "".
        held_out: glyphs come from faces and pen styles that training never draws, and colours of shapes and objects
            from all combinations (``scene.held_out_pair``).
        noise: standard deviation of grey noise, 0..255.
        blur: radius of a Gaussian blur in pixels.
        seed: colours' variation and noise.
        style: one of ``STYLES``.
        frame: one of ``FRAMES``.
        occluder: (left, top, width, height) of a grey bar in front of everything, or None.
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
    style: str = "flat"
    frame: str = ""
    occluder: tuple[int, int, int, int] | None = None

    @property
    def thing(self) -> Thing:
        return self.things[0]
