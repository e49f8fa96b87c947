"""Questions about a scene with answers that are right by construction.

Answers are one word, digit or letter (one token), except captions. Yes/no questions are balanced: the answer is chosen
first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sav_jax.world.glyphs import DIGITS, LETTERS
from sav_jax.world.scene import Scene, Thing
from sav_jax.world.shapes import COLORS, SHAPES, TEXTURES

PLACES = ("left", "right", "top", "bottom")
SIZES = ("small", "large")
CATEGORIES = ("digit", "letter", "shape")

#: Every possible answer that is a single word.
ANSWERS: tuple[str, ...] = (*DIGITS, *LETTERS, *SHAPES, *COLORS, *TEXTURES, *PLACES, *SIZES, *CATEGORIES, "yes", "no")


@dataclass(frozen=True)
class QA:
    """A question about a scene, its answer, and what kind of question it is."""

    question: str
    answer: str
    type: str


_WORDINGS: dict[str, tuple[str, ...]] = {
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
    "color": (
        "what color is the {noun}?", "which color is the {noun}?", "what is the color of the {noun}?",
        "name the color of the {noun}.",
    ),
    "background": ("what color is the background?", "which color is the background?", "what is the background color?"),
    "texture": ("what texture is the {noun}?", "what is the pattern of the {noun}?", "what pattern is on the {noun}?"),
    "size": ("is the {noun} small or large?", "how large is the {noun}?", "what size is the {noun}?"),
    "place": ("where is the {noun}?", "at which side is the {noun}?", "on which side is the {noun}?"),
    "category": ("is this a digit, a letter or a shape?", "digit, letter or shape?", "what kind of thing is this?"),
    "is it": ("is this a {name}?", "is it a {name}?", "does the image show a {name}?"),
    "count": (
        "how many things are there?", "how many things are in the image?", "count the things.",
        "how many things do you see?",
    ),
    "count some": (
        "how many {adjective} things are there?", "how many things are {adjective}?", "count the {adjective} things.",
    ),
    "count shape": ("how many {name} shapes are there?", "count the {name} shapes."),
    "exists": ("is there a {name}?", "is there a {name} in the image?", "do you see a {name}?"),
    "which": ("what is {place}?", "what is {place} of the image?", "which thing is {place}?"),
    "which color": ("what color is the thing {place}?", "what color is the {name}?", "which color is the {name}?"),
    "relation": ("what is {relation} the {name}?", "which thing is {relation} the {name}?"),
    "is related": ("is the {name} {relation} the {other}?",),
    "ordinal": (
        "what {noun} is in the {ordinal} image?", "which {noun} does the {ordinal} image show?",
        "name the {noun} in the {ordinal} image.",
    ),
    "caption": ("describe the image.", "what is in the image?", "describe what you see."),
}  # fmt: skip

_RELATIONS = {"left-right": ("left of", "right of"), "top-bottom": ("above", "below")}
_ENDS = {"left-right": ("on the left", "on the right"), "top-bottom": ("at the top", "at the bottom")}


def _ask(rng: np.random.Generator, type_: str, answer: str, **words: str) -> QA:
    wordings = _WORDINGS[type_]
    return QA(wordings[int(rng.integers(len(wordings)))].format(**words), answer, type_)


def _choose(rng: np.random.Generator, options: list[str] | tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _names(category: str) -> tuple[str, ...]:
    return {"digit": tuple(DIGITS), "letter": tuple(LETTERS), "shape": SHAPES}[category]


def _noun(rng: np.random.Generator, thing: Thing) -> str:
    """How to call a single thing without giving its name away too often."""
    return thing.category if rng.random() < 0.7 or thing.category != "shape" else thing.name


def phrase(thing: Thing) -> str:
    """The thing in words: "small red striped star", "blue 7"."""
    words = [thing.size] if thing.category == "shape" else []
    words.append(thing.color)
    if thing.texture != "plain":
        words.append(thing.texture)
    return " ".join([*words, thing.name])


def _identity(scene: Scene, rng: np.random.Generator) -> QA:
    return _ask(rng, scene.thing.category, scene.thing.name)


def _color(scene: Scene, rng: np.random.Generator) -> QA:
    return _ask(rng, "color", scene.thing.color, noun=_noun(rng, scene.thing))


def _background(scene: Scene, rng: np.random.Generator) -> QA:
    return _ask(rng, "background", scene.background)


def _texture(scene: Scene, rng: np.random.Generator) -> QA:
    return _ask(rng, "texture", scene.thing.texture, noun=_noun(rng, scene.thing))


def _size(scene: Scene, rng: np.random.Generator) -> QA:
    return _ask(rng, "size", scene.thing.size, noun=_noun(rng, scene.thing))


def _place(scene: Scene, rng: np.random.Generator) -> QA:
    return _ask(rng, "place", scene.place, noun=_noun(rng, scene.thing))


def _category(scene: Scene, rng: np.random.Generator) -> QA:
    return _ask(rng, "category", scene.thing.category)


def _is_it(scene: Scene, rng: np.random.Generator) -> QA:
    thing = scene.thing
    if rng.random() < 0.5:
        return _ask(rng, "is it", "yes", name=thing.name)
    return _ask(rng, "is it", "no", name=_choose(rng, [n for n in _names(thing.category) if n != thing.name]))


def _count(scene: Scene, rng: np.random.Generator) -> QA:
    return _ask(rng, "count", str(len(scene.things)))


def _count_some(scene: Scene, rng: np.random.Generator) -> QA:
    counts = Counter(t.color for t in scene.things)
    if rng.random() < 0.85:
        color = _choose(rng, sorted(counts))
    else:
        color = _choose(rng, [c for c in COLORS if c != scene.background])
    return _ask(rng, "count some", str(counts[color]), adjective=color)


def _count_shape(scene: Scene, rng: np.random.Generator) -> QA:
    counts = Counter(t.name for t in scene.things if t.category == "shape")
    name = _choose(rng, sorted(counts) if counts and rng.random() < 0.85 else SHAPES)
    return _ask(rng, "count shape", str(counts[name]), name=name)


def _exists(scene: Scene, rng: np.random.Generator) -> QA:
    """Asks for a colour and a shape; a "no" has one of the two right half of the time."""
    present = {(t.color, t.name) for t in scene.things if t.category == "shape"}
    if present and rng.random() < 0.5:
        color, name = sorted(present)[int(rng.integers(len(present)))]
        return _ask(rng, "exists", "yes", name=f"{color} {name}")
    near = sorted(present)[int(rng.integers(len(present)))] if present and rng.random() < 0.5 else None
    while True:
        color = near[0] if near and rng.random() < 0.5 else _choose(rng, [c for c in COLORS if c != scene.background])
        name = near[1] if near and color != near[0] else _choose(rng, SHAPES)
        if (color, name) not in present:
            return _ask(rng, "exists", "no", name=f"{color} {name}")


def _which(scene: Scene, rng: np.random.Generator) -> QA:
    i = int(rng.integers(2))
    return _ask(rng, "which", scene.things[i].name, place=_ENDS[scene.layout][i])


def _which_color(scene: Scene, rng: np.random.Generator) -> QA:
    i = int(rng.integers(2))
    thing = scene.things[i]
    return _ask(rng, "which color", thing.color, place=_ENDS[scene.layout][i], name=thing.name)


def _relation(scene: Scene, rng: np.random.Generator) -> QA:
    i = int(rng.integers(2))
    return _ask(
        rng, "relation", scene.things[i].name, relation=_RELATIONS[scene.layout][i], name=scene.things[1 - i].name
    )


def _is_related(scene: Scene, rng: np.random.Generator) -> QA:
    i, claimed = (int(v) for v in rng.integers(2, size=2))
    words = {"name": scene.things[i].name, "other": scene.things[1 - i].name}
    return _ask(rng, "is related", "yes" if i == claimed else "no", relation=_RELATIONS[scene.layout][claimed], **words)


def captions(scene: Scene) -> tuple[str, ...]:
    """A scene of one or two things in words, as several people might put it; training says the first."""
    ground = f"on {_a(scene.background)} background"
    if scene.kind != "pair":
        thing = phrase(scene.thing)
        return (
            f"{thing} on {scene.background}",
            f"{_a(thing)} {ground}",
            f"{_a(scene.background)} background with {_a(thing)}",
        )
    (one, two), (before, after) = map(phrase, scene.things), _RELATIONS[scene.layout]
    return (
        f"{one} {before} {two} on {scene.background}",
        f"{_a(one)} {before} {_a(two)} {ground}",
        f"{_a(two)} {after} {_a(one)} {ground}",
    )


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeio8' else 'a'} {noun}"


def _caption(scene: Scene, rng: np.random.Generator) -> QA:
    return _ask(rng, "caption", captions(scene)[0])


_Asker = Callable[[Scene, np.random.Generator], QA]


def _askers(scene: Scene) -> list[tuple[float, _Asker]]:
    """What can be asked about a scene, with how often."""
    if scene.kind in ("scan", "glyph"):
        return [(6.0, _identity), (1.2, _is_it), (0.4, _color), (0.4, _background), (0.6, _category), (0.3, _caption)]
    if scene.kind == "shape":
        askers: list[tuple[float, _Asker]] = [
            (3.0, _identity), (0.7, _color), (0.4, _background), (0.7, _is_it), (0.7, _size), (0.3, _category), (0.6,
            _caption),
        ]  # fmt: skip
        if scene.thing.size == "large":
            askers.append((1.6, _texture))
        if scene.place:
            askers.append((1.2, _place))
        return askers
    if scene.kind == "pair":
        return [(2.5, _which), (1.0, _which_color), (2.5, _relation), (1.5, _is_related), (0.5, _caption)]
    return [(2.0, _count), (1.5, _count_some), (1.5, _count_shape), (1.5, _exists), (0.3, _background)]


def ask(scene: Scene, seed: int, number: int) -> list[QA]:
    """Asks ``number`` different kinds of question about a scene (fewer if it does not allow as many)."""
    rng = np.random.default_rng([seed, 13])
    askers = _askers(scene)
    weights = np.array([weight for weight, _ in askers])
    order = rng.choice(len(askers), size=min(number, len(askers)), replace=False, p=weights / weights.sum())
    return [askers[int(i)][1](scene, rng) for i in order]


def ask_both(first: Scene, second: Scene, seed: int) -> list[QA]:
    """Asks what the first and what the second of two images shows, in random order. Both must show a single thing."""
    rng = np.random.default_rng([seed, 17])
    pairs = [("first", first.thing), ("second", second.thing)]
    return [
        _ask(rng, "ordinal", thing.name, noun=thing.category, ordinal=ordinal)
        for ordinal, thing in (pairs[int(i)] for i in rng.permutation(2))
    ]
