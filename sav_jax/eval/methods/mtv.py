"""Multimodal task vectors (arXiv 2406.15334): what demonstrations do to a few heads, put there without them.

1. Means: each support example in turn is the query of a prompt with ``--demonstrations`` others; heads are read at its
   last token and averaged over the prompts.
2. Places: a search over the support says which heads to replace so that the right answer, and its end, are likeliest
   (:mod:`sav_jax.task_vectors`).
3. Answers: queries are asked without demonstrations. Those heads put out their means at the last token of the prompt,
   and at every token of an answer when it is read.

Axes: S support examples, Q queries, L layers, N heads, H head width.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np

from sav_jax._processes import known_by_all
from sav_jax.eval.features import Features
from sav_jax.eval.methods.asking import likeliest, written
from sav_jax.eval.methods.base import Method, Outcome
from sav_jax.eval.methods.icl import check_demonstrations, draw_balanced, with_demonstrations
from sav_jax.examples import Example
from sav_jax.extract import content_key, plan_prompts
from sav_jax.headstore import HeadStore
from sav_jax.models.intervention import HeadEdit
from sav_jax.reading import Readings
from sav_jax.task_vectors import Search, find_heads

_VERSION = "search 2"
"""Part of every cache key of a search; raised when its meaning or numbers change."""


def _mtv(features: Features) -> Outcome:
    """What the model writes with the heads replaced, read like a zero-shot answer."""
    readings, facts = _readings(features)
    outcome = written(features, tuple(generation.text for generation in readings.generations))
    return dataclasses.replace(outcome, facts=facts)


def _mtv_likelihood(features: Features) -> Outcome:
    """The answer that the model finds likeliest with the heads replaced."""
    readings, facts = _readings(features)
    return dataclasses.replace(likeliest(features, readings.scores), facts=facts)


def _readings(features: Features) -> tuple[Readings, dict[str, Any]]:
    """What the model makes of the queries under the task vector, and what was found."""
    name = ("mtv", features.split.digest, features.settings)
    if name not in features.kept:
        features.kept[name] = _task_vector(features)
    edit, facts = features.kept[name]
    return features.answers([item.example for item in features.split.queries], edit), facts


def _task_vector(features: Features) -> tuple[HeadEdit, dict[str, Any]]:
    reader, split, recipe = features.reader, features.split, features.settings.mtv
    prompts = demonstrated(features)
    readings = reader.read(reader.lmm, prompts)
    means = readings.heads.mean(axis=0, dtype=np.float64).astype(np.float32)
    answers = [features.task.answer(label) for label in split.labels]
    support = [item.example for item in split.support]
    planned = plan_prompts(reader.lmm, support)
    asked = [content_key(reader.lmm, prompt, example) for prompt, example in zip(planned, support, strict=True)]
    stops = reader.lmm.stop_token_ids
    facts = (_VERSION, recipe, features.settings.seed, answers, features.targets.tolist(), readings.keys, asked, stops)
    key = hashlib.sha256(repr(facts).encode()).hexdigest()
    store = HeadStore.open(f"{reader.cache.rstrip('/')}/searches") if reader.cache else None
    if store is not None and not known_by_all(store.missing([key]), 1):
        packed = store.read([key])
    else:
        with reader.timed():
            found = find_heads(reader.lmm, support, answers, features.targets, means, recipe, features.settings.seed)
        reader.patched_passes += found.passes
        packed = _packed(found)
        if store is not None:
            store.write([key], packed)  # by every process: the first one's stays
    mask, loss, before = _unpacked(packed, means.shape[:2])
    return HeadEdit.replacing(means, mask), {
        "heads_replaced": int(mask.sum()),
        "support_loss": loss,
        "support_loss_without": before,
        "mean_of_prompts": len(prompts),
    }


def demonstrated(features: Features) -> list[Example]:
    """The prompts with demonstrations: support examples in random turns, each after others of the support.

    Raises:
      UserError: there are too few others.
    """
    split, settings, targets = features.split, features.settings, features.targets
    check_demonstrations(settings.demonstrations, len(split.support) - 1)
    rng = np.random.default_rng(settings.seed)
    rounds = -(-settings.mtv.prompts // len(targets))
    asked = np.concatenate([rng.permutation(len(targets)) for _ in range(rounds)])[: settings.mtv.prompts]
    prompts = []
    for row in asked:
        others = np.delete(np.arange(len(targets)), row)
        drawn = others[draw_balanced(targets[others], settings.demonstrations, rng)]
        shown = [split.support[i] for i in drawn]
        prompts.append(with_demonstrations(features.task, shown, split.support[row].example))
    return prompts


def _packed(found: Search) -> np.ndarray:
    """A search as the store keeps it, float32 [1, 1, 1, L * N + 2]."""
    return np.concatenate([found.mask.ravel(), [found.loss, found.loss_before]]).astype(np.float32)[None, None, None]


def _unpacked(packed: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, float, float]:
    """Mask [L, N], loss with these heads replaced, and with none."""
    *mask, loss, before = packed.ravel()
    return np.array(mask).reshape(shape) > 0, float(loss), float(before)


METHODS = (
    Method("mtv", "multimodal task vectors: heads replaced by their means after demonstrations, read its answer", _mtv),
    Method("mtv-likelihood", "multimodal task vectors: the class whose answer it finds likeliest", _mtv_likelihood),
)
