"""What can be said about a scene: facts with what would be wrong in their place, right by construction.

A fact can be asked openly, checked (yes or no), claimed (true or false) or offered among options; which of them is
chosen in ``questions.py``. Nothing here speaks of styles, unnamed textures or harm: see ``docs/world.md``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sav_jax.world.scene import Scene, Thing, names_of
from sav_jax.world.shapes import COLORS, TEXTURES
from sav_jax.world.things import FRAMES

PLACES = ("left", "right", "top", "bottom")
SIZES = ("small", "large")
CATEGORIES = ("digit", "letter", "shape", "object", "word")
NUMBERS = tuple(str(n) for n in range(1, 10))


@dataclass(frozen=True)
class Fact:
    """One thing that holds in a scene.

    Attributes:
        type: what it is about: a key of ``OPEN``, or a sort that is only ever checked.
        answer: the open question's answer; "" if there is none.
        others: wrong answers of the same sort.
        near: those of them that something else in the scene, or a small slip, would suggest.
        open: the words that the open question's wordings need.
        check: a question that yes answers when its ``{value}`` is right.
        claim: a statement that is true when its ``{value}`` is right.
        value, wrong: what is right in ``check`` and ``claim``, and what is wrong; "" and () mean the answer and the
            other answers.
    """

    type: str
    answer: str
    others: tuple[str, ...]
    check: str
    claim: str
    near: tuple[str, ...] = ()
    open: tuple[tuple[str, str], ...] = ()
    value: str = ""
    wrong: tuple[str, ...] = ()


OPEN: dict[str, tuple[str, ...]] = {
    "digit": (
        "what digit is this?", "which digit is shown?", "what number is this?", "what digit is in the image?",
        "read the digit.", "which digit is this?", "what digit do you see?", "name the digit.",
    ),
    "letter": (
        "what letter is this?", "which letter is shown?", "what letter is in the image?", "read the letter.",
        "name the letter.", "what letter do you see?",
    ),
    "shape": (
        "what shape is this?", "which shape is shown?", "what shape is in the image?", "name the shape.",
        "what shape do you see?", "what is the shape?",
    ),
    "object": (
        "what object is this?", "which object is shown?", "what object is in the image?", "name the object.",
        "what object do you see?",
    ),
    "word": ("what word is this?", "read the word.", "which word is shown?", "what word is in the image?"),
    "first letter": ("what is the first letter?", "what letter does the word start with?"),
    "last letter": ("what is the last letter?", "what letter does the word end with?"),
    "length": ("how many letters are there?", "how many letters does the word have?"),
    "color": (
        "what color is the {noun}?", "which color is the {noun}?", "what is the color of the {noun}?",
        "name the color of the {noun}.",
    ),
    "background": ("what color is the background?", "which color is the background?", "what is the background color?"),
    "texture": ("what texture is the {noun}?", "what is the pattern of the {noun}?", "what pattern is on the {noun}?"),
    "size": ("is the {noun} small or large?", "how large is the {noun}?", "what size is the {noun}?"),
    "place": ("where is the {noun}?", "at which side is the {noun}?", "on which side is the {noun}?"),
    "board": ("what shape is the sign?", "which shape is the sign?", "what shape is behind the object?"),
    "category": (
        "what kind of thing is this?", "what kind of thing is shown?", "digit, letter, shape, object or word?",
    ),
    "count": (
        "how many things are there?", "how many things are in the image?", "count the things.",
        "how many things do you see?",
    ),
    "count some": (
        "how many {adjective} things are there?", "how many things are {adjective}?", "count the {adjective} things.",
    ),
    "count shape": (
        "how many {name} shapes are there?", "count the {name} shapes.", "how many things are {name} shapes?",
    ),
    "which": ("what is {place}?", "what is {place} of the image?", "which thing is {place}?"),
    "which color": ("what color is the thing {place}?", "what color is the {name}?", "which color is the {name}?"),
    "relation": ("what is {relation} the {name}?", "which thing is {relation} the {name}?"),
    "side": ("is the {name} {one} or {other} the {reference}?",),
    "larger": ("which is larger, the {one} or the {other}?", "what is larger, the {one} or the {other}?"),
    "same color": ("do the {one} and the {other} have the same or different colors?",),
}  # fmt: skip

#: What yes/no questions about a type are counted as; else "is <type>".
CHECKED = {
    "digit": "is it", "letter": "is it", "shape": "is it", "object": "is it", "word": "is it", "relation": "is related",
    "exists": "exists", "more": "more",
}  # fmt: skip

_RELATIONS = {"left-right": ("left of", "right of"), "top-bottom": ("above", "below")}
_ENDS = {"left-right": ("on the left", "on the right"), "top-bottom": ("at the top", "at the bottom")}


def article(noun: str) -> str:
    """The noun with its article."""
    return f"{'an' if noun[0] in 'aeio8' else 'a'} {noun}"


def _choose(rng: np.random.Generator, options: tuple[str, ...] | list[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _rest(options: tuple[str, ...], answer: str) -> tuple[str, ...]:
    return tuple(option for option in options if option != answer)


def _noun(rng: np.random.Generator, thing: Thing) -> str:
    """How to call a single thing without giving its name away too often."""
    if thing.category == "swatch":
        return "surface"
    named = rng.random() < 0.3 and thing.category in ("shape", "object")
    return thing.name if named else thing.category


def identity(scene: Scene, rng: np.random.Generator) -> Fact:
    thing = scene.thing
    kind = "" if thing.category in ("shape", "object") else f"the {thing.category} "
    check = _choose(rng, (f"is this {kind or 'a '}{{value}}?", f"is it {kind or 'a '}{{value}}?",
                          f"does the image show {kind or 'a '}{{value}}?"))  # fmt: skip
    return Fact(
        thing.category,
        thing.name,
        _rest(names_of(thing.category), thing.name),
        check,
        f"this is {kind or 'a '}{{value}}",
    )


def color(scene: Scene, rng: np.random.Generator) -> Fact:
    thing, noun = scene.thing, _noun(rng, scene.thing)
    others = _rest(tuple(COLORS), thing.color)
    near = (scene.background,) if scene.background != thing.color else ()
    return Fact(
        "color", thing.color, others, f"is the {noun} {{value}}?", f"the {noun} is {{value}}", near, (("noun", noun),)
    )


def background(scene: Scene, rng: np.random.Generator) -> Fact:
    used = tuple(sorted({t.color for t in scene.things} - {scene.background}))
    others = _rest(tuple(COLORS), scene.background)
    return Fact("background", scene.background, others, "is the background {value}?", "the background is {value}", used)


def texture(scene: Scene, rng: np.random.Generator) -> Fact | None:
    thing, noun = scene.thing, _noun(rng, scene.thing)
    if thing.size != "large":  # on small ones patterns are a few pixels
        return None
    others = _rest(TEXTURES, thing.texture)
    return Fact(
        "texture", thing.texture, others, f"is the {noun} {{value}}?", f"the {noun} is {{value}}",
        open=(("noun", noun),),
    )  # fmt: skip


def size(scene: Scene, rng: np.random.Generator) -> Fact:
    thing, noun = scene.thing, _noun(rng, scene.thing)
    others = _rest(SIZES, thing.size)
    return Fact(
        "size", thing.size, others, f"is the {noun} {{value}}?", f"the {noun} is {{value}}", open=(("noun", noun),)
    )


def place(scene: Scene, rng: np.random.Generator) -> Fact | None:
    if not scene.place:
        return None
    noun = _noun(rng, scene.thing)
    return Fact(
        "place",
        scene.place,
        _rest(PLACES, scene.place),
        f"is the {noun} at the {{value}}?",
        f"the {noun} is at the {{value}}",
        (PLACES[PLACES.index(scene.place) ^ 1],),
        (("noun", noun),),
    )


def board(scene: Scene, rng: np.random.Generator) -> Fact | None:
    if not scene.frame:
        return None
    return Fact("board", scene.frame, _rest(FRAMES[1:], scene.frame), "is the sign a {value}?", "the sign is a {value}")


def category(scene: Scene, rng: np.random.Generator) -> Fact:
    name = scene.thing.category
    return Fact("category", name, _rest(CATEGORIES, name), "is this a {value}?", "this is a {value}")


def first_letter(scene: Scene, rng: np.random.Generator) -> Fact:
    return _letter(scene.thing.name, 0, "first letter", "start")


def last_letter(scene: Scene, rng: np.random.Generator) -> Fact:
    return _letter(scene.thing.name, -1, "last letter", "end")


def _letter(word: str, index: int, type_: str, verb: str) -> Fact:
    others = _rest(names_of("letter"), word[index])
    near = tuple(sorted(set(word) - {word[index]}))
    return Fact(
        type_, word[index], others, f"does the word {verb} with {{value}}?", f"the word {verb}s with {{value}}", near
    )


def length(scene: Scene, rng: np.random.Generator) -> Fact:
    return _count_of("length", len(scene.thing.name), "are there {value} letters?", "there are {value} letters", (), 4)


def _count_of(
    type_: str, count: int, check: str, claim: str, words: tuple[tuple[str, str], ...] = (), most: int = 9
) -> Fact:
    least = 0 if type_ in ("count some", "count shape") else 1
    others = tuple(str(n) for n in range(least, max(most, count) + 1) if n != count)
    near = tuple(str(n) for n in (count - 1, count + 1) if str(n) in others)
    return Fact(type_, str(count), others, check, claim, near, words)


def count(scene: Scene, rng: np.random.Generator) -> Fact:
    most = 4 if scene.kind == "group" else 9
    return _count_of(
        "count", len(scene.things), "are there {value} things?", "the number of things is {value}", (), most
    )


def count_some(scene: Scene, rng: np.random.Generator) -> Fact:
    counts = Counter(t.color for t in scene.things)
    usable = [c for c in COLORS if c != scene.background]
    name = _choose(rng, sorted(counts) if rng.random() < 0.85 else usable)
    return _count_of(
        "count some",
        counts[name],
        f"are there {{value}} {name} things?",
        f"the number of {name} things is {{value}}",
        (("adjective", name),),
        4 if scene.kind == "group" else 9,
    )


def count_shape(scene: Scene, rng: np.random.Generator) -> Fact:
    counts = Counter(t.name for t in scene.things if t.category == "shape")
    name = _choose(rng, sorted(counts) if counts and rng.random() < 0.85 else names_of("shape"))
    return _count_of(
        "count shape",
        counts[name],
        f"are there {{value}} {name} shapes?",
        f"the number of {name} shapes is {{value}}",
        (("name", name),),
        4 if scene.kind == "group" else 9,
    )


def more(scene: Scene, rng: np.random.Generator) -> Fact | None:
    """Which of two colours, or of two names, more things have."""
    by_color = rng.random() < 0.5
    counts = Counter(t.color if by_color else t.name for t in scene.things if by_color or t.category == "shape")
    if len(counts) < 2:
        return None
    (one, most), (other, fewer) = counts.most_common(2)
    if most == fewer:
        return None
    noun = "things" if by_color else "shapes"
    right, wrong = f"{one} {noun} than {other} {noun}", f"{other} {noun} than {one} {noun}"
    return Fact("more", "", (), "are there more {value}?", "there are more {value}", value=right, wrong=(wrong,))


def exists(scene: Scene, rng: np.random.Generator) -> Fact | None:
    """A quality and a name together; wrong ones have one of the two right, or both of different things."""
    things = [t for t in scene.things if t.category in ("shape", "object")]
    if not things:
        return None
    thing = things[int(rng.integers(len(things)))]
    sort = _choose(rng, ("color", "color", "color", *(("size",) if scene.kind in ("shape", "object") else ()),
                         *(("texture",) if thing.size == "large" and scene.kind == "shape" else ())))  # fmt: skip
    qualities = {"color": tuple(COLORS), "size": SIZES, "texture": TEXTURES}[sort]
    if sort == "color":
        qualities = tuple(c for c in qualities if c != scene.background)
    quality = getattr(thing, sort)
    present = {(getattr(t, sort), t.name) for t in things}
    names = names_of(thing.category)
    mixed = tuple((getattr(a, sort), b.name) for a in things for b in things)
    slips = [
        *mixed,
        *((_choose(rng, qualities), thing.name) for _ in range(3)),
        *((quality, _choose(rng, names)) for _ in range(3)),
        (_choose(rng, qualities), _choose(rng, names)),
    ]
    wrong = tuple(dict.fromkeys(f"{q} {n}" for q, n in slips if (q, n) not in present))
    if not wrong:
        return None
    return Fact(
        "exists",
        "",
        (),
        _choose(rng, ("is there a {value}?", "is there a {value} in the image?", "do you see a {value}?"))
        if len(scene.things) > 1 or rng.random() < 0.5
        else "is this a {value}?",
        "there is a {value}",
        value=f"{quality} {thing.name}",
        wrong=wrong,
    )


def which(scene: Scene, rng: np.random.Generator) -> Fact:
    i = int(rng.integers(2))
    thing, other, end = scene.things[i], scene.things[1 - i], _ENDS[scene.layout][i]
    others = _rest(names_of(thing.category), thing.name)
    return Fact(
        "which",
        thing.name,
        others if other.name in others else (*others, other.name),
        f"is the thing {end} a {{value}}?",
        f"the thing {end} is a {{value}}",
        (other.name,),
        (("place", end),),
    )


def which_color(scene: Scene, rng: np.random.Generator) -> Fact:
    i = int(rng.integers(2))
    thing, other, end = scene.things[i], scene.things[1 - i], _ENDS[scene.layout][i]
    near = (other.color,) if other.color != thing.color else ()
    return Fact(
        "which color",
        thing.color,
        _rest(tuple(c for c in COLORS if c != scene.background), thing.color),
        f"is the {thing.name} {{value}}?",
        f"the {thing.name} is {{value}}",
        near,
        (("place", end), ("name", thing.name)),
    )


def relation(scene: Scene, rng: np.random.Generator) -> Fact:
    i = int(rng.integers(2))
    thing, other = scene.things[i], scene.things[1 - i]
    holds, opposite = _RELATIONS[scene.layout][i], _RELATIONS[scene.layout][1 - i]
    others = tuple(n for n in names_of(thing.category) if n not in (thing.name, other.name))
    return Fact(
        "relation",
        thing.name,
        others,
        "is the {value}?",
        "the {value}",
        (),
        (("relation", holds), ("name", other.name)),
        f"{thing.name} {holds} the {other.name}",
        (f"{thing.name} {opposite} the {other.name}",),
    )


def claimed_relation(text: str) -> str:
    """A relation as the claim of a sentence: "the star is left of the circle"."""
    for words in (*_RELATIONS["left-right"], *_RELATIONS["top-bottom"]):
        text = text.replace(f" {words} ", f" is {words} ")
    return text


def side(scene: Scene, rng: np.random.Generator) -> Fact:
    i = int(rng.integers(2))
    thing, other = scene.things[i], scene.things[1 - i]
    words = tuple(r.removesuffix(" of") for r in _RELATIONS[scene.layout])
    last = _RELATIONS[scene.layout][1 - (first := int(rng.integers(2)))]
    return Fact(
        "side",
        words[i],
        (words[1 - i],),
        "",
        "",
        open=(("name", thing.name), ("one", words[first]), ("other", last), ("reference", other.name)),
    )


def larger(scene: Scene, rng: np.random.Generator) -> Fact | None:
    sizes = {t.size for t in scene.things}
    if len(sizes) < 2:
        return None
    big, little = sorted(scene.things, key=lambda t: t.size)  # "large" before "small"
    one, other = (big, little) if rng.random() < 0.5 else (little, big)
    return Fact(
        "larger",
        big.name,
        (little.name,),
        "is the {value}?",
        "the {value}",
        open=(("one", one.name), ("other", other.name)),
        value=f"{big.name} larger than the {little.name}",
        wrong=(f"{little.name} larger than the {big.name}",),
    )


def same_color(scene: Scene, rng: np.random.Generator) -> Fact:
    one, other = scene.things if rng.random() < 0.5 else scene.things[::-1]
    same = one.color == other.color
    values = ("the same color", "different colors")
    subject = f"the {one.name} and the {other.name}"
    return Fact(
        "same color",
        "same" if same else "different",
        ("different" if same else "same",),
        f"do {subject} have {{value}}?",
        f"{subject} have {{value}}",
        open=(("one", one.name), ("other", other.name)),
        value=values[not same],
        wrong=(values[same],),
    )


Asker = Callable[[Scene, np.random.Generator], Fact | None]

#: What can be asked about each kind of scene, with how often.
ASKERS: dict[str, tuple[tuple[float, Asker], ...]] = {
    "scan": ((6.0, identity), (0.5, color), (0.5, background), (0.8, category)),
    "glyph": ((6.0, identity), (0.8, color), (0.6, background), (0.8, category)),
    "shape": (
        (2.5, identity), (1.0, color), (0.6, background), (1.0, size), (0.4, category), (1.2, texture), (1.0, place),
        (2.0, exists),
    ),
    "object": (
        (3.0, identity), (0.8, color), (0.5, background), (0.6, size), (0.5, category), (0.6, place), (1.6, board),
        (1.2, exists),
    ),
    "word": (
        (3.0, identity), (1.0, first_letter), (1.0, last_letter), (0.8, length), (0.5, color), (0.4, background),
        (0.5, category),
    ),
    "swatch": ((1.0, color), (1.0, background)),
    "pair": (
        (1.5, which), (1.5, which_color), (2.0, relation), (1.2, side), (1.0, exists), (1.0, larger),
        (0.8, same_color), (0.3, background),
    ),
    "group": (
        (1.5, count), (1.5, count_some), (1.2, count_shape), (2.0, exists), (1.0, more), (0.3, background),
    ),
    "crowd": ((1.5, count), (1.5, count_some), (1.2, count_shape), (1.0, exists), (1.5, more), (0.2, background)),
}  # fmt: skip
