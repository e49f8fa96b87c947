"""A control for `drawn-safety`: is harm anything to the heads, or any half of the objects as good?

A model without a word for harm can still tell dangerous things from others by what each of them is. Then twenty
examples of each side teach an arbitrary division of the same objects as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sav_jax.classifier import choose_shots
from sav_jax.eval.tasks.base import Item, relabelled
from sav_jax.lmm import LMM
from sav_jax.world.objects import HARMFUL, OBJECTS
from sav_jax.world.scene import sample_scene
from scripts.reproduction.heads import Ballots, Sheet, draws, read_heads, task_and_data, with_heads
from scripts.reproduction.rescoring import SHOTS
from scripts.reproduction.study import Study

TASK = "drawn-safety"


def halved(study: Study, model: str) -> dict[str, Any]:
    """As :func:`rescoring.rescored` keeps answers: "harm", the best 20 heads of the task, and "halves", the mean over
    arbitrary divisions of its objects into as many on either side: the same queries, other examples as labels need.
    """

    def compute() -> dict[str, Any]:
        return {TASK: {"sheet": _sheet(study, study.load(model), number).content()}}

    number = 4 if study.quick else 12
    return dict(study.kept(f"heads/{model}-halves", compute, limit=study.limit, number=number))


def _sheet(study: Study, lmm: LMM, number: int) -> Sheet:
    sheet = Sheet()
    pool = task_and_data(study, TASK)[1].pool
    heads, names = read_heads(study, lmm, pool), objects_of(pool)
    for draw, support, queries in with_heads(study, lmm, draws(study, TASK, SHOTS)):
        sheet.start(draw.clusters)
        ballots = Ballots.of(draw, support, queries)
        sheet.add("harm", ballots.right(ballots.best()))
        rng = np.random.default_rng([draw.seed, 13])
        asked, right = objects_of(draw.queries), []
        for _ in range(number):
            half = {OBJECTS[i] for i in rng.permutation(len(OBJECTS))[: len(HARMFUL)]}
            labels = [draw.classes[name in half] for name in names]
            rows = choose_shots(labels, SHOTS, draw.seed)
            other = replace(
                draw,
                support=tuple(relabelled(pool[row], labels[row]) for row in rows),
                queries=tuple(
                    relabelled(item, draw.classes[name in half]) for item, name in zip(draw.queries, asked, strict=True)
                ),
            )
            ballots = Ballots.of(other, heads[np.array(rows)], queries)
            right.append(ballots.right(ballots.best()))
        sheet.add("halves", np.mean(right, axis=0))
    return sheet


def objects_of(items: Sequence[Item]) -> list[str]:
    """What each of the task's scenes shows."""
    return [sample_scene(int(item.example.id or ""), "object", held_out=True).thing.name for item in items]
