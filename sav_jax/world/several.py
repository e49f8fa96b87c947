"""Two images in one prompt: which of them shows what, and whether they agree."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sav_jax.world.facts import Fact
from sav_jax.world.questions import FORMS, QA, say
from sav_jax.world.scene import SIZE, Scene, held_out_pair, names_of, sample_scene

ORDINALS = ("first", "second")
_SINGLES = ("scan", "glyph", "shape", "shape", "object")
_MANY = ("group", "crowd")


def sample_images(seed: int, *, held_out: bool = False, side: int = SIZE) -> tuple[Scene, Scene]:
    """Two scenes of one kind; single things share their name, their colour or both about as often as not."""
    rng = np.random.default_rng([seed, 19])
    kinds = _SINGLES if rng.random() < 0.75 else _MANY
    kind = kinds[int(rng.integers(len(kinds)))]
    first = sample_scene(seed, kind, held_out=held_out, side=side)
    category = first.thing.category if kind in ("scan", "glyph") else None
    second = sample_scene(seed + 1, kind, category=category, held_out=held_out, side=side)
    if kind in _SINGLES:
        thing = second.thing
        if rng.random() < 0.45:
            thing = replace(thing, name=first.thing.name)
        if rng.random() < 0.4 and second.background == first.background:
            thing = replace(thing, color=first.thing.color)
        elif rng.random() < 0.4:
            thing = replace(thing, color=first.thing.color)
            second = replace(second, background=first.background)
        if held_out or not held_out_pair(thing.color, thing.name):
            second = replace(second, things=(thing,))
    return first, second


def ask_both(first: Scene, second: Scene, seed: int) -> list[QA]:
    """Asks what the first and what the second of two images shows, in random order. Both must show a single thing."""
    rng = np.random.default_rng([seed, 17])
    facts = [_shown((first, second), i, rng) for i in range(2)]
    return [_ordinal(facts[int(i)], rng) for i in rng.permutation(2)]


def ask_several(scenes: tuple[Scene, Scene], seed: int, number: int) -> list[QA]:
    """Asks ``number`` different things about two images."""
    rng = np.random.default_rng([seed, 23])
    single = len(scenes[0].things) == len(scenes[1].things) == 1 and scenes[0].kind in _SINGLES
    makers = (
        [_shown_first, _shown_second, _which, _same_name, _same_color]
        if single
        else [_more, _same_number, _count_first, _count_second]
    )
    questions: list[QA] = []
    for index in rng.permutation(len(makers)):
        fact = makers[int(index)](scenes, rng)
        if fact is not None and len(questions) < number:
            shown = fact.type in ("ordinal", "ordinal count")
            questions.append(_ordinal(fact, rng) if shown and rng.random() < 0.6 else _said(fact, rng))
    return questions


_OPEN = {
    "ordinal": (
        "what {noun} is in the {ordinal} image?", "which {noun} does the {ordinal} image show?",
        "name the {noun} in the {ordinal} image.",
    ),
    "ordinal count": ("how many things are in the {ordinal} image?", "count the things in the {ordinal} image."),
    "which image": ("which image shows a {name}?", "in which image is a {name}?"),
    "which has more": ("which image has more things?", "in which image are there more things?"),
    "same": ("same or different {noun}?", "is the {noun} the same or different?"),
}  # fmt: skip


def _ordinal(fact: Fact, rng: np.random.Generator) -> QA:
    wordings = _OPEN[fact.type]
    return QA(wordings[int(rng.integers(len(wordings)))].format(**dict(fact.open)), fact.answer, fact.type)


def _said(fact: Fact, rng: np.random.Generator) -> QA:
    """Openly, or checked or claimed."""
    if not fact.check or rng.random() < 0.4:
        return _ordinal(fact, rng)
    qa = say(fact, rng, {form: FORMS[form] for form in ("check", "claim")})
    return replace(qa, type=qa.type if qa.type == "claim" else f"is {fact.type}")


def _shown(scenes: tuple[Scene, Scene], index: int, rng: np.random.Generator) -> Fact:
    thing, other = scenes[index].thing, scenes[1 - index].thing
    names = names_of(thing.category)
    ordinal = ORDINALS[index]
    return Fact(
        "ordinal",
        thing.name,
        tuple(n for n in names if n != thing.name),
        f"does the {ordinal} image show a {{value}}?",
        f"the {ordinal} image shows a {{value}}",
        (other.name,) if other.name != thing.name else (),
        (("noun", thing.category), ("ordinal", ordinal)),
    )


def _shown_first(scenes: tuple[Scene, Scene], rng: np.random.Generator) -> Fact:
    return _shown(scenes, 0, rng)


def _shown_second(scenes: tuple[Scene, Scene], rng: np.random.Generator) -> Fact:
    return _shown(scenes, 1, rng)


def _which(scenes: tuple[Scene, Scene], rng: np.random.Generator) -> Fact | None:
    index = int(rng.integers(2))
    if scenes[0].thing.name == scenes[1].thing.name:
        return None
    words = (("name", scenes[index].thing.name),)
    return Fact("which image", ORDINALS[index], (ORDINALS[1 - index],), "", "", open=words)


def _agreement(noun: str, same: bool) -> Fact:
    several = "numbers of things" if noun == "number of things" else f"{noun}s"
    values = (f"the same {noun}", f"different {several}")
    return Fact(
        "same",
        "same" if same else "different",
        ("different" if same else "same",),
        "do the images show {value}?",
        "the images show {value}",
        open=(("noun", noun),),
        value=values[not same],
        wrong=(values[same],),
    )


def _same_name(scenes: tuple[Scene, Scene], rng: np.random.Generator) -> Fact | None:
    one, other = scenes[0].thing, scenes[1].thing
    return _agreement(one.category, one.name == other.name) if one.category == other.category else None


def _same_color(scenes: tuple[Scene, Scene], rng: np.random.Generator) -> Fact:
    return _agreement("color", scenes[0].thing.color == scenes[1].thing.color)


def _same_number(scenes: tuple[Scene, Scene], rng: np.random.Generator) -> Fact | None:
    same = len(scenes[0].things) == len(scenes[1].things)
    return _agreement("number of things", same) if same or rng.random() < 0.35 else None


def _more(scenes: tuple[Scene, Scene], rng: np.random.Generator) -> Fact | None:
    counts = [len(scene.things) for scene in scenes]
    if counts[0] == counts[1]:
        return None
    index = int(counts[1] > counts[0])
    return Fact("which has more", ORDINALS[index], (ORDINALS[1 - index],), "", "")


def _count_first(scenes: tuple[Scene, Scene], rng: np.random.Generator) -> Fact:
    return _number(scenes, 0)


def _count_second(scenes: tuple[Scene, Scene], rng: np.random.Generator) -> Fact:
    return _number(scenes, 1)


def _number(scenes: tuple[Scene, Scene], index: int) -> Fact:
    own, other = len(scenes[index].things), len(scenes[1 - index].things)
    most = 4 if scenes[index].kind == "group" else 9
    near = {own - 1, own + 1, other} & set(range(1, most + 1)) - {own}
    return Fact(
        "ordinal count",
        str(own),
        tuple(str(n) for n in range(1, most + 1) if n != own),
        f"are there {{value}} things in the {ORDINALS[index]} image?",
        f"the {ORDINALS[index]} image has {{value}} things",
        tuple(str(n) for n in sorted(near)),
        (("ordinal", ORDINALS[index]),),
    )
