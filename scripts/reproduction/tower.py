"""The vision tower alone: nearest class mean of what the decoder is handed, which no layer of it has read.

It stands in for the CLIP and SigLIP of the paper's comparison, which have no weights here: the same images, the same
training, no decoder. "Tower and words" has the mean embedding of the question's tokens behind the images, as the
paper's interleaved baseline has the text encoder's.

Axes: E examples, B batch, T tokens, D width of the decoder, C classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sav_jax.batching import plan_batches
from sav_jax.eval.tasks.base import Item
from sav_jax.extract import plan_prompts, run_batches
from sav_jax.lmm import LMM
from sav_jax.models.batch import Batch
from sav_jax.models.multimodal import MultimodalModel
from scripts.reproduction.heads import Draw, Sheet, draws, task_and_data
from scripts.reproduction.rescoring import SHOTS, TASKS, tasks_of
from scripts.reproduction.study import Study

TOWER, WITH_WORDS = "tower", "tower and words"


def towers(study: Study, model: str) -> dict[str, Any]:
    """Task -> {"sheet": answers of the tower alone and with words} to the queries that 20 shots leave."""

    def compute() -> dict[str, Any]:
        lmm = study.load(model)
        return {task: {"sheet": _of_task(lmm, draws(study, task, SHOTS)).content()} for task in tasks_of(study)}

    return dict(study.kept(f"tower/{model}", compute, tasks=tasks_of(study), limit=study.limit, version=1))


def asked_differently(study: Study, model: str, known: Sequence[str]) -> list[str]:
    """Tasks whose questions are not the same for all examples.

    Args:
      study: the study.
      model: the name that what is found is kept by.
      known: those among the study's own tasks.
    """
    tasks = tasks_of(study)
    others = [task for task in tasks if task not in TASKS]

    def compute() -> dict[str, bool]:
        pools = {task: task_and_data(study, task)[1].pool for task in others}
        return {task: len({item.example.question for item in pool}) > 1 for task, pool in pools.items()}

    differ = study.kept(f"questions/{model}", compute, tasks=others) if others else {}
    return [task for task in tasks if task in known or differ.get(task)]


def _of_task(lmm: LMM, drawn: Sequence[Draw]) -> Sheet:
    items = {id(item): item for draw in drawn for item in (*draw.support, *draw.queries)}
    place = {name: row for row, name in enumerate(items)}
    seen, read = pooled(lmm, list(items.values()))
    sheet = Sheet()
    for draw in drawn:
        sheet.start(draw.clusters)
        rows = [[place[id(item)] for item in part] for part in (draw.support, draw.queries)]
        for name, vectors in ((TOWER, seen), (WITH_WORDS, np.concatenate([seen, read], axis=1))):
            answer = nearest_mean(vectors[rows[0]], draw.shown_classes, vectors[rows[1]], len(draw.classes))
            sheet.add(name, (answer == draw.targets).astype(np.float64))
    return sheet


def pooled(lmm: LMM, items: Sequence[Item]) -> tuple[np.ndarray, np.ndarray]:
    """Means of the visual tokens and of the text tokens, scaled to length 1: float32 [E, D] twice."""
    examples = [item.example for item in items]
    prompts = plan_prompts(lmm, examples)
    found = np.zeros((len(items), 2, lmm.config.text.hidden_size), np.float32)
    step = _step(lmm.module)
    for plan, values in run_batches(
        lmm, step, plan_batches(prompts, 8), prompts, examples, progress=False, what="towers"
    ):
        found[list(plan.rows)] = values
    norm = np.linalg.norm(found, axis=2, keepdims=True)
    found /= np.where(norm > 0, norm, 1)
    return found[:, 0], found[:, 1]


@functools.lru_cache(maxsize=4)
def _step(module: MultimodalModel) -> Callable[[Any, Batch], jax.Array]:
    """``(params, batch) -> [B, 2, D]``: the mean embedding of the visual tokens and of the text."""

    @jax.jit
    def step(params: Any, batch: Batch) -> jax.Array:
        x: Any = module.apply({"params": params}, batch, method="embed")
        x = x[0].astype(jnp.float32)
        assert batch.visual_index is not None
        visual = jnp.asarray(batch.visual_index)[:, :, 0] >= 0
        real = jnp.arange(x.shape[1])[None] < jnp.asarray(batch.lengths)[:, None]
        masks = jnp.stack([visual, real & ~visual], axis=1).astype(jnp.float32)  # [B, 2, T]
        return jnp.einsum("bkt,btd->bkd", masks, x) / jnp.maximum(masks.sum(2), 1.0)[:, :, None]

    return step


def nearest_mean(support: np.ndarray, classes: np.ndarray, queries: np.ndarray, num_classes: int) -> np.ndarray:
    """The class whose mean is nearest by cosine, int [Q]; the first of equals."""
    means = np.stack([support[classes == column].mean(axis=0) for column in range(num_classes)])
    return (queries @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T).argmax(axis=1)
