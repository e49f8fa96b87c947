"""Other ways to use the same heads and examples: whole layers, wrong labels; and LoRA asked another task than its own.

Axes: S support examples, Q queries, L layers, N heads per layer, H head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from einops import rearrange

import sav_jax
from sav_jax.eval.methods.lora import grid
from sav_jax.eval.tasks import find_tasks
from sav_jax.eval.tasks.base import Digests, Split, Task, default_data_dir, relabelled, split_task
from sav_jax.lmm import LMM
from sav_jax.train import supervised
from sav_jax.train.chats import chat_of
from sav_jax.train.tune import trained
from scripts.reproduction.aim_measured import read_answer
from scripts.reproduction.heads import Ballots, Draw, Sheet, draws, with_heads
from scripts.reproduction.rescoring import SHOTS, tasks_of
from scripts.reproduction.study import Study
from scripts.reproduction.trained import quiet

WRONG = (10, 20, 40)
"""Shares of the labelled examples of each class that get a wrong label, in %."""
LORA_RATE, LORA_RANK = 1e-3, 16


def varied(study: Study, model: str) -> dict[str, Any]:
    """Task -> answers to the queries that 20 shots leave (as :func:`rescoring.rescored` keeps them):

    - "1 layers" ... : the best whole layers, all heads of a layer one vector, chosen and voting as heads do;
    - "10 % wrong" ... : the best 20 heads, where so many of the labelled examples have a wrong label.
    """

    def compute() -> dict[str, Any]:
        lmm = study.load(model)
        return {task: _of_task(study, lmm, task) for task in tasks_of(study)}

    facts = {"tasks": tasks_of(study), "limit": study.limit, "wrong": WRONG}
    return dict(study.kept(f"heads/{model}-variants", compute, **facts))


def _of_task(study: Study, lmm: LMM, task: str) -> dict[str, Any]:
    sheet = Sheet()
    for draw, support, queries in with_heads(study, lmm, draws(study, task, SHOTS)):
        sheet.start(draw.clusters)
        layers = Ballots.of(draw, *(rearrange(heads, "s l n h -> s l 1 (n h)") for heads in (support, queries)))
        for number in range(1, 1 + len(layers.order)):
            sheet.add(f"{number} layers", layers.right(layers.best(number)))
        for share in WRONG:
            ballots = Ballots.of(mislabelled(draw, share), support, queries)
            sheet.add(f"{share} % wrong", ballots.right(ballots.best()))
    return {"sheet": sheet.content()}


def mislabelled(draw: Draw, share: int) -> Draw:
    """The same with ``share`` % of each class's labelled examples given another class, drawn by the seed; more are
    wrong with a larger share, and those that were are wrong as before.
    """
    rng = np.random.default_rng([draw.seed, 11])
    order = rng.random(len(draw.support))
    others = rng.integers(1, len(draw.classes), len(draw.support))
    support = list(draw.support)
    for column in range(len(draw.classes)):
        members = np.flatnonzero(draw.shown_classes == column)
        for row in members[np.argsort(order[members])][: round(len(members) * share / 100)]:
            support[row] = relabelled(support[row], draw.classes[(column + others[row]) % len(draw.classes)])
    return replace(draw, support=tuple(support))


def lora_elsewhere(study: Study, model: str, pairs: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """Task -> what LoRA answers, tuned on the examples of the task itself ("lora of TASK") and of a similar one.

    Args:
      study, model: which.
      pairs: (tuned on, asked).
    """
    steps = 20 if study.quick else 100

    def compute() -> dict[str, Any]:
        lmm = study.load(model)
        asked = {target: [source for source, t in pairs if t == target] for _, target in pairs}
        tasks = {name: find_tasks(name)[0] for name in dict.fromkeys(name for pair in pairs for name in pair)}
        data, digests = {name: task.load(default_data_dir() / name) for name, task in tasks.items()}, Digests()
        sheets = {name: Sheet() for name in asked}
        for seed in study.seeds:
            splits = {
                name: split_task(task, data[name], SHOTS, seed, study.limit, digests=digests)
                for name, task in tasks.items()
            }
            for name in asked:
                queries = splits[name].queries
                sheets[name].start([item.group or digests.whole(item)[:16] for item in queries])
            for source in tasks:
                study.say(f"  {model}: LoRA on {source}, seed {seed}")
                tuned = _tuned(lmm, tasks[source], splits[source], steps, seed)
                for name, sources in asked.items():
                    if source in (name, *sources):
                        right = _right(tuned, tasks[name], splits[name])
                        sheets[name].add(f"lora of {source}", right)
        return {name: {"sheet": sheet.content()} for name, sheet in sheets.items()}

    facts = {"pairs": pairs, "limit": study.limit, "steps": steps, "rate": LORA_RATE, "rank": LORA_RANK}
    return dict(study.kept(f"savs/{model}/lora-elsewhere", compute, **facts))


def _tuned(lmm: LMM, task: Task, split: Split, steps: int, seed: int) -> LMM:
    (recipe,) = grid((LORA_RATE,), (steps,), LORA_RANK, 8, seed)
    chats = [chat_of(item.example, task.answer(item.label)) for item in split.support]
    with quiet():
        matrices, _ = trained(lmm, chats, recipe, None, progress=False)
    return replace(
        lmm,
        params=supervised.tuned(lmm, recipe.targets, matrices),
        fingerprint=f"{lmm.fingerprint} tuned on {task.name}, seed {seed}",
    )


def _right(lmm: LMM, task: Task, split: Split) -> np.ndarray:
    """Which queries it answers rightly in writing, float [Q]."""
    texts = sav_jax.generate(lmm, [item.example for item in split.queries], 8, batch_size=8, progress=False)
    return np.array(
        [
            float(read_answer(task, split, item, one.text) == item.label)
            for item, one in zip(split.queries, texts, strict=True)
        ]
    )


def losses(own: Mapping[str, Any], borrowed: Mapping[str, Any]) -> dict[str, Any]:
    """Task -> what each query gains (1), keeps (0) or loses (-1) if something borrowed answers instead of one's own."""
    return {
        task: replace(of, values=tuple(a - b for a, b in zip(borrowed[task].values, of.values, strict=True)))
        for task, of in own.items()
    }
