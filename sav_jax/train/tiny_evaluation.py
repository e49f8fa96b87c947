"""How well a bundled model answers about scenes that training never draws."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from sav_jax.train.tiny_data import GROUPS, Item, TinyBatch, held_out_items, held_out_scenes, rows_of
from sav_jax.train.tiny_recipe import Params, Recipe

if TYPE_CHECKING:
    from sav_jax.train.tiny import Trainer

Metrics = dict[str, float]

_LABELLED = (("scan", "digit"), ("scan", "letter"), ("glyph", "digit"), ("glyph", "letter"), ("shape", None),
             ("object", None), ("word", None))  # fmt: skip


def _buckets(recipe: Recipe) -> set[str]:
    """What sorts of prompts training had."""
    return {name for stage in recipe.stages for name, share in stage.buckets if share > 0}


def _cut(trainer: Trainer, items: list[Item], bucket: str, rows: int) -> Iterator[TinyBatch]:
    """Batches of one size; the last is filled up with the first rows of its own."""
    for first in range(0, len(items), rows):
        part = items[first : first + rows]
        yield trainer.chats.batch([part[i % len(part)] for i in range(rows)], bucket)


@lru_cache(maxsize=4)
def _question_batches(trainer: Trainer, number: int) -> tuple[tuple[list[str], list[TinyBatch]], ...]:
    """For every sort of prompt what each question counts as, "type (kind of scene)", and their batches."""
    parts: dict[str, tuple[list[str], list[Item]]] = defaultdict(lambda: ([], []))
    for bucket, kind, items in held_out_items(number, _buckets(trainer.recipe)):
        names, together = parts[bucket]
        names += [f"{questions[0].type} ({kind})" for _, questions in items]
        together += items
    size = trainer.recipe.stages[-1].batch_size
    return tuple(
        (names, list(_cut(trainer, items, bucket, rows_of(bucket, size)))) for bucket, (names, items) in parts.items()
    )


@lru_cache(maxsize=4)
def _label_batches(trainer: Trainer, number: int) -> tuple[list[str], list[TinyBatch]]:
    """What each scene counts as, and their batches."""
    names: list[str] = []
    items: list[Item] = []
    for kind, category in _LABELLED:
        items += [([scene], ()) for scene in held_out_scenes(kind, number, category=category)]
        names += [f"{kind} {category or ''}".strip()] * number
    return names, list(_cut(trainer, items, "image", trainer.recipe.stages[0].batch_size))


def evaluate(
    trainer: Trainer, params: Params, number: int, *, labels: bool = False, questions: bool | None = None
) -> Metrics:
    """Accuracies on held-out scenes, ``number`` of each kind.

    Args:
        trainer: of the model.
        params: float32.
        number: scenes of each kind.
        labels: of the pooled visual tokens, within each label group, as "digit (scan digit)".
        questions: of single questions, by type and kind of scene, as "color (shape)": every answer token must be the
            likeliest one (greedy decoding gives just this answer). By default, unless ``labels``.
    """
    results: Metrics = {}
    if labels:
        results |= _label_accuracies(trainer, params, number)
    if questions if questions is not None else not labels:
        right: dict[str, list[bool]] = defaultdict(list)
        for names, batches in _question_batches(trainer, number):
            hits = [
                np.all((trainer.likeliest(params, batch) == batch.targets) | (batch.weights == 0), axis=1)
                for batch in batches
            ]
            for name, hit in zip(names, np.concatenate(hits).tolist(), strict=False):
                right[name].append(hit)
        results |= {name: round(float(np.mean(values)), 4) for name, values in sorted(right.items())}
        results["all"] = round(float(np.mean([hit for values in right.values() for hit in values])), 4)
    return results


def _label_accuracies(trainer: Trainer, params: Params, number: int) -> Metrics:
    names, batches = _label_batches(trainer, number)
    best = np.concatenate([trainer.likeliest(params, batch) for batch in batches])
    labels = np.concatenate([batch.labels for batch in batches])
    right: dict[str, list[bool]] = defaultdict(list)
    for name, found, wanted in zip(names, best, labels, strict=False):
        for group, one, other in zip(GROUPS, found.tolist(), wanted.tolist(), strict=True):
            if other >= 0:
                right[f"{group} ({name})"].append(one == other)
    return {name: round(float(np.mean(hits)), 4) for name, hits in right.items()}


def guesses(trainer: Trainer, number: int) -> Metrics:
    """Share of the commonest answer for each row of :func:`evaluate`: what one answer to all reaches."""
    return {
        name: round(Counter(answers).most_common(1)[0][1] / len(answers), 4)
        for name, answers in _answers(trainer, number)
    }


def counts(trainer: Trainer, number: int) -> dict[str, int]:
    """How many questions each row of :func:`evaluate` rests on."""
    return {name: len(answers) for name, answers in _answers(trainer, number)}


def _answers(trainer: Trainer, number: int) -> list[tuple[str, list[str]]]:
    answers: dict[str, list[str]] = defaultdict(list)
    for _, kind, items in held_out_items(number, _buckets(trainer.recipe)):
        for _, (qa,) in items:
            answers[f"{qa.type} ({kind})"].append(qa.answer)
    return sorted(answers.items())
