"""Questions about scenes with answers that are right by construction.

A fact (``facts.py``) is asked in one of four forms: openly; to be checked (yes or no); as a claim (true or false);
among options (the answer is a letter). Answers are one token, except captions. Which answer a checked fact or a claim
gets is decided first, by a fair coin: yes and no say nothing without looking.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np

from sav_jax.world.facts import (
    ASKERS,
    CATEGORIES,
    CHECKED,
    OPEN,
    PLACES,
    SIZES,
    Fact,
    article,
    claimed_relation,
)
from sav_jax.world.glyphs import DIGITS, LETTERS
from sav_jax.world.objects import OBJECTS
from sav_jax.world.scene import Scene, Thing
from sav_jax.world.shapes import COLORS, SHAPES, TEXTURES
from sav_jax.world.words import WORDS

OPTION_LETTERS = ("A", "B", "C", "D")

#: Every possible answer that is a single token.
ANSWERS: tuple[str, ...] = (
    *DIGITS, *LETTERS, *SHAPES, *OBJECTS, *WORDS, *COLORS, *TEXTURES, *PLACES, "above", "below", *SIZES, *CATEGORIES,
    "yes", "no", "true", "false", "same", "different", "first", "second", *OPTION_LETTERS,
)  # fmt: skip

FORMS: dict[str, float] = {"open": 0.42, "check": 0.38, "claim": 0.1, "choice": 0.1}
"""Forms of a question and how often each is used, where a fact has it."""
CAPTIONS = 0.07
"""Share of questions that ask for a caption, where a scene has one."""

_AN = re.compile(r"\ba (?=[aeio8][a-z]|8)")
_CAPTION_WORDINGS = ("describe the image.", "what is in the image?", "describe what you see.")


@dataclass(frozen=True)
class QA:
    """A question about a scene, its answer, and what kind of question it is."""

    question: str
    answer: str
    type: str


def phrase(thing: Thing) -> str:
    """The thing in words: "small red striped star", "blue 7", "red word stop"."""
    words = [thing.size] if thing.category == "shape" else []
    words.append(thing.color)
    if thing.texture != "plain":
        words.append(thing.texture)
    if thing.category == "word":
        words.append("word")
    return " ".join([*words, thing.name])


def captions(scene: Scene) -> tuple[str, ...]:
    """A scene of one or two things in words, as several people might put it; training says the first."""
    ground = f"on {article(scene.background)} background"
    if scene.kind != "pair":
        thing = phrase(scene.thing)
        return (
            f"{thing} on {scene.background}",
            f"{article(thing)} {ground}",
            f"{article(scene.background)} background with {article(thing)}",
        )
    relations = {"left-right": ("left of", "right of"), "top-bottom": ("above", "below")}
    (one, two), (before, after) = map(phrase, scene.things), relations[scene.layout]
    return (
        f"{one} {before} {two} on {scene.background}",
        f"{article(one)} {before} {article(two)} {ground}",
        f"{article(two)} {after} {article(one)} {ground}",
    )


def _choose(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def wrong_value(fact: Fact, rng: np.random.Generator, share_near: float = 0.5) -> str:
    """What to say wrongly: a tempting value half of the time."""
    if fact.wrong:
        return _choose(rng, fact.wrong)
    return _choose(rng, fact.near if fact.near and rng.random() < share_near else fact.others)


def _open(fact: Fact, rng: np.random.Generator) -> QA:
    return QA(_choose(rng, OPEN[fact.type]).format(**dict(fact.open)), fact.answer, fact.type)


def _check(fact: Fact, rng: np.random.Generator) -> QA:
    right = rng.random() < 0.5
    value = (fact.value or fact.answer) if right else wrong_value(fact, rng)
    type_ = CHECKED.get(fact.type, f"is {fact.type}")
    return QA(fact.check.format(value=value), "yes" if right else "no", type_)


def _claim(fact: Fact, rng: np.random.Generator) -> QA:
    right = rng.random() < 0.5
    value = (fact.value or fact.answer) if right else wrong_value(fact, rng)
    text = fact.claim.format(value=value)
    if fact.type == "relation":
        text = claimed_relation(text)
    elif fact.type == "larger":
        text = text.replace(" larger ", " is larger ")
    return QA(f"true or false: {text}.", "true" if right else "false", "claim")


def _choice(fact: Fact, rng: np.random.Generator) -> QA:
    if not fact.answer or (fact.check and rng.random() < 0.15):
        asked = _check(fact, rng)
        options: tuple[str, ...] = ("yes", "no") if rng.random() < 0.5 else ("no", "yes")
        answer = asked.answer
    else:
        asked, answer = _open(fact, rng), fact.answer
        number = min(int(rng.integers(1, 4)), len(fact.others))
        wrong = list(dict.fromkeys(wrong_value(fact, rng) for _ in range(4 * number)))[:number] if number else []
        drawn = [answer, *(value for value in wrong if value in fact.others or value in fact.near)]
        if fact.wrong:  # what is wrong in a check is a phrase; options are answers
            drawn = [answer, *(fact.others[int(i)] for i in rng.permutation(len(fact.others))[:number])]
        options = tuple(drawn[int(i)] for i in rng.permutation(len(drawn)))
    lines = "\n".join(f"{letter}. {option}" for letter, option in zip(OPTION_LETTERS, options, strict=False))
    return QA(f"{asked.question}\n{lines}", OPTION_LETTERS[options.index(answer)], "choice")


_MAKERS = {"open": _open, "check": _check, "claim": _claim, "choice": _choice}


def usable_forms(fact: Fact, forms: dict[str, float] = FORMS) -> dict[str, float]:
    """Those of the forms that a fact has."""
    return {
        form: share
        for form, share in forms.items()
        if (fact.answer if form == "open" else fact.check or (form == "choice" and fact.answer))
    }


def say(fact: Fact, rng: np.random.Generator, forms: dict[str, float] = FORMS) -> QA:
    """Asks about a fact in one of the forms that it has (it must have one)."""
    usable = usable_forms(fact, forms)
    shares = np.cumsum(list(usable.values()))
    form = tuple(usable)[int(np.searchsorted(shares[:-1], rng.random() * shares[-1], side="right"))]
    qa = _MAKERS[form](fact, rng)
    return replace(qa, question=_AN.sub("an ", qa.question))


def weighted_order(rng: np.random.Generator, weights: tuple[float, ...]) -> list[int]:
    """All indices in random order, heavier ones earlier (as drawn one by one without putting back)."""
    keys = rng.exponential(size=len(weights)) / np.asarray(weights)
    return [int(i) for i in np.argsort(keys)]


def ask(scene: Scene, seed: int, number: int, forms: dict[str, float] = FORMS) -> list[QA]:
    """Asks ``number`` different things about a scene (fewer if it does not allow as many).

    Args:
        scene: what is asked about.
        seed: of the choice of facts, forms and words.
        number: of questions.
        forms: how often each form of question is used.
    """
    rng = np.random.default_rng([seed, 13])
    askers = ASKERS[scene.kind]
    questions: list[QA] = []
    if scene.kind in ("scan", "glyph", "shape", "object", "word", "pair") and rng.random() < CAPTIONS * number:
        questions.append(QA(_choose(rng, _CAPTION_WORDINGS), captions(scene)[0], "caption"))
    for index in weighted_order(rng, tuple(weight for weight, _ in askers)):
        if len(questions) >= number:
            break
        fact = askers[index][1](scene, rng)
        if fact is not None and usable_forms(fact, forms):
            questions.append(say(fact, rng, forms))
    return [questions[int(i)] for i in rng.permutation(len(questions))]
