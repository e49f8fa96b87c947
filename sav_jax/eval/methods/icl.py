"""In-context learning: labelled examples in the prompt, then the query.

``icl``: the prompt is one turn of the user, demonstrations and query interleaved, as the code of multimodal task
vectors lays it out (arXiv 2406.15334; its group's papers compare with this)::

    <image>
    QUESTION
    Answer: ANSWER

    <image>
    QUESTION
    Answer:

The chat template is put around it, and the model answers in its own turn. It is the same text in every family, base
models included. ``icl-turns``: every demonstration is a turn of the user and the assistant's answer to it, as the chat
template writes conversations, and the query is asked as ``zero-shot`` asks it: what a model was trained on that
converses about pictures. Without demonstrations that is ``zero-shot``; ``icl`` without them (``--demonstrations 0``)
shows what the layout alone does.

The demonstrations of a run are the same before every query. Classes take turns in an order drawn by seed, and each
gives one of its support examples, drawn too; so classes differ by one at most, fewer demonstrations begin more of them,
and what choice and order are worth shows as the spread over seeds. In a generative task, which has no classes, they are
drawn from the whole support.

Axes: S support examples, Q queries, C classes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sav_jax.errors import UserError
from sav_jax.eval.features import Features
from sav_jax.eval.methods.asking import likeliest, written
from sav_jax.eval.methods.base import Method, Outcome
from sav_jax.eval.methods.costs import answered
from sav_jax.eval.tasks.base import Item, Task
from sav_jax.examples import Example, Exchange
from sav_jax.reading import Readings


def _icl(features: Features, layout: Layout) -> Outcome:
    """What the model writes after the demonstrations, read like a zero-shot answer."""
    readings, facts = _readings(features, layout)
    outcome = written(features, tuple(generation.text for generation in readings.generations))
    return dataclasses.replace(outcome, facts=facts)


def _icl_likelihood(features: Features, layout: Layout) -> Outcome:
    """The answer that the model finds likeliest after the demonstrations."""
    readings, facts = _readings(features, layout)
    return dataclasses.replace(likeliest(features, readings.scores), facts=facts)


def _readings(features: Features, layout: Layout) -> tuple[Readings, dict[str, Any]]:
    """What the model makes of every query after the demonstrations; the demonstrations' ids, and what that cost."""
    chosen = chosen_demonstrations(features, at_least=0)
    prompts = [layout(features.task, chosen, item.example) for item in features.split.queries]
    readings, facts = answered(features, prompts)
    return readings, {"demonstrations": [item.example.id for item in chosen], **facts}


def chosen_demonstrations(features: Features, at_least: int = 1) -> list[Item]:
    """The run's demonstrations, in order.

    Raises:
      UserError: there are not as many labelled examples, or fewer than ``at_least`` are wanted.
    """
    split, settings = features.split, features.settings
    check_demonstrations(settings.demonstrations, len(split.support), at_least)
    rng = np.random.default_rng(settings.seed)
    return [split.support[row] for row in draw_balanced(features.targets, settings.demonstrations, rng)]


def check_demonstrations(number: int, available: int, at_least: int = 1) -> None:
    """Raise UserError unless ``number`` demonstrations can be drawn."""
    if not at_least <= number <= available:
        raise UserError(f"--demonstrations is {number}; there are {available} labelled examples to choose from")


def draw_balanced(targets: np.ndarray, number: int, rng: np.random.Generator) -> list[int]:
    """Draw examples, the classes taking turns in a random order.

    Args:
      targets: int [S], the class of each.
      number: how many, at most S.
      rng: of the draws; the first of more are the same as fewer.

    Returns:
      ``number`` rows, in the order drawn.
    """
    rows = rng.permutation(len(targets))
    order = {int(target): place for place, target in enumerate(rng.permutation(np.unique(targets)))}
    waiting = [[int(row) for row in rows if targets[row] == target] for target in order]
    turns = [row for turn in range(len(targets)) for members in waiting for row in members[turn : turn + 1]]
    return turns[:number]


def with_demonstrations(task: Task, demonstrations: Sequence[Item], query: Example) -> Example:
    """The query as it is asked after demonstrations, in one turn.

    Args:
      task: says what a label's answer is.
      demonstrations: labelled items, in order.
      query: the question at the end; its label is not used.
    """
    shown = "".join(
        f"{item.example.marked_question()}\nAnswer: {task.answer(item.label)}\n\n" for item in demonstrations
    )
    images = tuple(image for item in demonstrations for image in item.example.images)
    videos = tuple(video for item in demonstrations for video in item.example.videos)
    return Example(
        f"{shown}{query.marked_question()}\nAnswer:",
        images + query.images,
        videos=videos + query.videos,
        frames=query.frames,
        id=query.id,
        source=_source(query, demonstrations),
    )


def in_turns(task: Task, demonstrations: Sequence[Item], query: Example) -> Example:
    """The same, every demonstration as a turn of the user and its answer; the query as it is."""
    history = [
        Exchange(item.example.question, task.answer(item.label), len(item.example.images), len(item.example.videos))
        for item in demonstrations
    ]
    images = tuple(image for item in demonstrations for image in item.example.images)
    videos = tuple(video for item in demonstrations for video in item.example.videos)
    return dataclasses.replace(
        query,
        images=images + query.images,
        videos=videos + query.videos,
        source=_source(query, demonstrations),
        history=tuple(history),
    )


def _source(query: Example, demonstrations: Sequence[Item]) -> str:
    return f"{query.source or query.id} after {len(demonstrations)} demonstrations (--demonstrations)"


Layout = Callable[[Any, Sequence[Item], Example], Example]
"""``(task, demonstrations, query) -> prompt``."""


def _methods(suffix: str, how: str, layout: Layout) -> tuple[Method, Method]:
    asked = functools.partial(_icl, layout=layout)
    compared = functools.partial(_icl_likelihood, layout=layout)
    shown = f"in-context learning: --demonstrations labelled examples {how}"
    return (
        Method(f"icl{suffix}", f"{shown}, read its answer", asked, generates=True),
        Method(f"icl{suffix}-likelihood", f"{shown}, the class whose answer it finds likeliest", compared),
    )


METHODS = (
    *_methods("", "in the prompt", with_demonstrations),
    *_methods("-turns", "as turns of a conversation", in_turns),
)
