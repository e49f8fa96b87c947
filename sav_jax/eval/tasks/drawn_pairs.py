"""Tasks of two drawn images: two questions about two images that differ in one thing, and comparisons of two images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from sav_jax.eval.tasks.base import Data, Item, Task
from sav_jax.eval.tasks.naturalbench import METRICS, ROLES
from sav_jax.examples import Example
from sav_jax.world.scene import Scene, draw, names_of, sample_scene, stands_out
from sav_jax.world.several import sample_images
from sav_jax.world.shapes import COLORS, TEXTURES
from sav_jax.world.things import STYLES

# First seeds of pool and queries, beyond those of drawn.py.
_POOL, _QUERIES = 24 * 10**9, 25 * 10**9

_SOURCE = "drawn by sav_jax.world from fixed seeds"
_STYLE_QUESTION = "Are the two images drawn in the same style?"


# Two questions about two images


def _other(rng: np.random.Generator, options: tuple[str, ...], value: str) -> str:
    rest = [option for option in options if option != value]
    return rest[int(rng.integers(len(rest)))]


def _changed(seed: int, sort: str) -> tuple[Scene, Scene, str, str]:
    """Two scenes that differ in one thing (and in noise), and a question about each to which its answer is yes."""
    rng = np.random.default_rng([seed, 31])
    if sort == "relation":
        scene = sample_scene(seed, "pair", held_out=True)
        one, two = scene.things
        swapped = replace(two, box=one.box, size=one.size), replace(one, box=two.box, size=two.size)
        relation = {"left-right": "left of", "top-bottom": "above"}[scene.layout]
        questions = [f"Is the {a.name} {relation} the {b.name}?" for a, b in ((one, two), (two, one))]
        return scene, replace(scene, things=swapped, seed=scene.seed + 1), questions[0], questions[1]
    scene = sample_scene(seed, "shape", held_out=True)
    while sort == "texture" and scene.thing.size != "large":  # on small ones patterns are a few pixels
        seed += 10**6
        scene = sample_scene(seed, "shape", held_out=True)
    thing = scene.thing
    if sort == "color":
        seen = tuple(color for color in COLORS if stands_out(color, scene.background))
        other = replace(thing, color=_other(rng, seen, thing.color))
        questions = [f"Is the {thing.name} {each.color}?" for each in (thing, other)]
    elif sort == "texture":
        other = replace(thing, texture=_other(rng, TEXTURES, thing.texture))
        questions = [f"Is the {thing.name} {each.texture}?" for each in (thing, other)]
    else:
        other = replace(thing, name=_other(rng, names_of("shape"), thing.name))
        questions = [f"Is this {'an' if each.name[0] in 'aeio' else 'a'} {each.name}?" for each in (thing, other)]
    return scene, replace(scene, things=(other,), seed=scene.seed + 1), questions[0], questions[1]


def _paired(_: Path) -> Data:
    def part(first: int, groups: int) -> tuple[Item, ...]:
        items = []
        for seed in range(first, first + groups):
            sort = ("color", "shape", "texture", "relation")[seed % 4]
            *scenes, one, two = _changed(seed, sort)
            pictures = [draw(scene) for scene in scenes]
            for role in ROLES:
                question, picture = int(role[1]), int(role[3])
                example = Example(
                    (one, two)[question],
                    (pictures[picture],),
                    "yes" if question == picture else "no",
                    id=f"{seed}-{role}",
                    source=f"drawn scenes {seed}, {role}",
                )
                items.append(Item(example, group=str(seed), role=f"{seed}/{role}", subset=sort))
        return tuple(items)

    return Data(part(_POOL, 100), part(_QUERIES, 300))


# Comparisons


def _agreement(scenes: tuple[Scene, Scene], seed: int) -> tuple[str, str, bool]:
    """What is compared, its noun in the question, and whether the images agree in it."""
    one, two = scenes
    if one.kind in ("group", "crowd"):
        return "number", "number of things", len(one.things) == len(two.things)
    if seed // 2 % 2:
        return "color", "color", one.thing.color == two.thing.color
    return "name", one.thing.category, one.thing.name == two.thing.name


def _compared(first: int) -> Iterator[tuple[int, tuple[Scene, Scene], str, str, bool]]:
    seed = first
    while True:
        scenes = sample_images(seed, held_out=True)
        if scenes[0].thing.category == scenes[1].thing.category:
            what, noun, same = _agreement(scenes, seed)
            yield seed, scenes, what, f"Same or different {noun}?", same
        seed += 2


def _in_style(first: int) -> Iterator[tuple[int, tuple[Scene, Scene], str, str, bool]]:
    """Large shapes, sharp and without bars, in two manners of drawing that no question of training names."""
    seed = first
    while True:
        rng = np.random.default_rng([seed, 37])
        scenes = [sample_scene(seed + i, "shape", held_out=True) for i in range(2)]
        if all(scene.thing.size == "large" for scene in scenes):
            style = STYLES[int(rng.integers(len(STYLES)))]
            same = rng.random() < 0.5
            styles = style, style if same else _other(rng, STYLES, style)
            shown = [replace(s, style=each, blur=0.0, occluder=None) for s, each in zip(scenes, styles, strict=True)]
            yield seed, (shown[0], shown[1]), "", _STYLE_QUESTION, same
        seed += 2


def _comparing(
    pairs: Callable[[int], Iterator[tuple[int, tuple[Scene, Scene], str, str, bool]]], subsets: tuple[str, ...]
) -> Callable[[Path], Data]:
    """A reader of pairs of images, of which as many agree as differ in every subset."""

    def part(first: int, number: int) -> tuple[Item, ...]:
        missing = {(subset, same): number for subset in subsets for same in (True, False)}
        items = []
        for seed, scenes, subset, question, same in pairs(first):
            if not any(missing.values()):
                break
            if missing[subset, same]:
                missing[subset, same] -= 1
                label = "same" if same else "different"
                pictures = tuple(draw(scene) for scene in scenes)
                example = Example(question, pictures, label, id=str(seed), source=f"drawn scenes {seed}")
                items.append(Item(example, subset=subset))
        return tuple(items)

    return lambda _: Data(part(_POOL, 120 // len(subsets)), part(_QUERIES, 600 // len(subsets)))


_SPLIT = "support is drawn from a pool of scenes with seeds of their own; all queries are asked"

TASKS = (
    Task(
        "drawn-paired",
        "two yes/no questions about two images that differ in one thing (colour, shape, texture or order), each with "
        "opposite answers: 300 groups of four (drawn)",
        _paired,
        source=f"{_SOURCE}, in the form of NaturalBench (arXiv 2410.14669)",
        prompt="Is the {shape} {color}? and the like",
        split=_SPLIT,
        labels=("yes", "no"),
        metric="g_acc",
        metrics=METRICS,
    ),
    Task(
        "drawn-multiimage",
        "do two images show the same or different things, colours or numbers of things? (drawn)",
        _comparing(_compared, ("name", "color", "number")),
        source=f"{_SOURCE}, in the manner of BLINK (arXiv 2404.12390)",
        prompt="Same or different {shape, color, number of things ...}?",
        split=_SPLIT,
        labels=("same", "different"),
    ),
    Task(
        "drawn-styles",
        "are two images drawn in one of five manners or in two? The bundled models were never asked about them (drawn)",
        _comparing(_in_style, ("",)),
        source=_SOURCE,
        prompt=_STYLE_QUESTION,
        split=_SPLIT,
        labels=("same", "different"),
        answers={"same": "yes", "different": "no"},
    ),
)
