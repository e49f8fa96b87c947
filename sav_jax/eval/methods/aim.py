"""AIM (arXiv 2406.07588): the same demonstrations as in-context learning, as virtual tokens instead of images and text.

Needs ``--aim DIR``, a projection trained for the model by ``sav-jax train aim``. See :mod:`sav_jax.aim`.

Axes: Q queries, C classes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from sav_jax.aim import after_demonstrations
from sav_jax.errors import UserError
from sav_jax.eval.features import Features
from sav_jax.eval.methods.asking import likeliest, written
from sav_jax.eval.methods.base import Method, Outcome
from sav_jax.eval.methods.costs import answered
from sav_jax.eval.methods.icl import chosen_demonstrations
from sav_jax.reading import Readings

NO_PROJECTION = (
    "methods aim and aim-likelihood need a projection: --aim DIR ('sav-jax train aim --model M --output DIR' makes one)"
)


def _aim(features: Features) -> Outcome:
    """What the model writes after the virtual tokens, read like a zero-shot answer."""
    readings, facts = _readings(features)
    outcome = written(features, tuple(generation.text for generation in readings.generations))
    return dataclasses.replace(outcome, facts=facts)


def _aim_likelihood(features: Features) -> Outcome:
    """The answer that the model finds likeliest after the virtual tokens."""
    readings, facts = _readings(features)
    return dataclasses.replace(likeliest(features, readings.scores), facts=facts)


def _readings(features: Features) -> tuple[Readings, dict[str, Any]]:
    """What the model makes of every query after the demonstrations' virtual tokens, and what that cost."""
    path, reader = features.settings.aim, features.reader
    if path is None:
        raise UserError(NO_PROJECTION)
    bank = reader.bank(path)
    chosen = chosen_demonstrations(features)
    shown = [dataclasses.replace(item.example, label=features.task.answer(item.label)) for item in chosen]
    before = bank.passes
    with reader.timed():
        tokens = bank.get(shown)
    reader.demonstration_passes += bank.passes - before
    prompts = [after_demonstrations(item.example, tokens, bank.aim.layout) for item in features.split.queries]
    readings, facts = answered(features, prompts)
    return readings, {"demonstrations": [item.example.id for item in chosen], **facts}


def _method(name: str, description: str, run: Any, generates: bool = False) -> Method:
    return Method(name, f"AIM (--aim DIR): {description}", run, optional="needs --aim DIR", generates=generates)


METHODS = (
    _method(
        "aim", "--demonstrations labelled examples as virtual tokens, read the model's answer", _aim, generates=True
    ),
    _method("aim-likelihood", "the class whose answer it then finds likeliest", _aim_likelihood),
)
