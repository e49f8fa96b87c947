"""Low-rank fine-tuning on the support set: what the papers compare with.

The model learns to answer each support question with its label. How long and how fast is decided on the support alone:
every recipe of a small grid is trained on three quarters of each class and judged on the last quarter, by how many of
its answers are right and then by their likelihood; the best is trained on all of it. Published LoRA numbers on the same
benchmarks differ by 30 to 45 points from version to version, so the recipe is part of the results.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from sav_jax._files import write_file
from sav_jax._processes import by_the_first, gathered, known_by_all
from sav_jax._storage import Location, location, storage_errors
from sav_jax.errors import UserError
from sav_jax.eval.features import Features
from sav_jax.eval.methods.asking import likeliest, written
from sav_jax.eval.methods.base import Method, Outcome
from sav_jax.eval.tasks.base import Item
from sav_jax.lmm import LMM

if TYPE_CHECKING:
    from sav_jax.train.recipes import Recipe

_VERSION = "lora 1"


def _lora(features: Features) -> Outcome:
    """What the tuned model writes, read like a zero-shot answer."""
    lmm, facts = _tuned(features)
    readings = _read(features, lmm, features.split.queries)
    outcome = written(features, tuple(generation.text for generation in readings.generations))
    return dataclasses.replace(outcome, facts=facts)


def _lora_likelihood(features: Features) -> Outcome:
    """The answer that the tuned model finds likeliest."""
    lmm, facts = _tuned(features)
    return dataclasses.replace(likeliest(features, _read(features, lmm, features.split.queries).scores), facts=facts)


def _read(features: Features, lmm: LMM, items: Sequence[Item]) -> Any:
    answers = [features.task.answer(label) for label in features.split.labels]
    new = features.settings.max_new_tokens
    return features.reader.read(lmm, [item.example for item in items], answers, new, keep_heads=False)


def _tuned(features: Features) -> tuple[LMM, dict[str, Any]]:
    name = ("lora", features.split.digest, features.settings)
    if name not in features.kept:
        features.kept[name] = _sweep(features)
    return features.kept[name]


def _sweep(features: Features) -> tuple[LMM, dict[str, Any]]:
    """Choose a recipe, train it on the whole support."""
    support, settings = features.split.support, features.settings
    recipes = grid(settings.lora_rates, settings.lora_steps, settings.lora_rank, settings.batch_size, settings.seed)
    facts: dict[str, Any] = {"rank": settings.lora_rank}
    if len(recipes) > 1:
        learned, held = held_out(features.targets, settings.seed)
        judged = []
        for recipe in recipes:
            lmm = _trained(features, [support[i] for i in learned], recipe)
            scores = _read(features, lmm, [support[i] for i in held]).scores.astype(np.float64)
            targets = features.targets[held]
            right = float((scores.argmax(axis=1) == targets).mean())
            # Of the answers that are offered: what is learned first is to write nothing else.
            chosen = scores[np.arange(len(held)), targets] - np.logaddexp.reduce(scores, axis=1)
            judged.append((right, float(chosen.mean())))
        best = max(range(len(recipes)), key=lambda i: judged[i])
        facts["sweep"] = [
            {"learning_rate": r.learning_rate, "steps": r.steps, "held_out_acc": a, "held_out_log_likelihood": p}
            for r, (a, p) in zip(recipes, judged, strict=True)
        ]
    else:
        best = 0
    recipe = recipes[best]
    facts |= {"learning_rate": recipe.learning_rate, "steps": recipe.steps}
    return _trained(features, support, recipe), facts


def grid(rates: Sequence[float], steps: Sequence[int], rank: int, batch_size: int, seed: int) -> list[Recipe]:
    """Every rate with every number of steps."""
    from sav_jax.train.optimizer import Optimization
    from sav_jax.train.recipes import Recipe

    return [
        Recipe(
            rank=rank,
            alpha=2.0 * rank,
            learning_rate=rate,
            steps=number,
            optimization=Optimization(
                batch_size=batch_size, seed=seed, warmup=0.1, checkpoint_every=max(number, 1), keep=1
            ),
        )
        for rate in rates
        for number in steps
    ]


def held_out(targets: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to learn from and to judge on: of each class a quarter, at least one, is held out (none of a class of one).

    Args:
        targets: int [S], the class of each row.
        seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    held: list[int] = []
    for label in np.unique(targets):
        rows = rng.permutation(np.flatnonzero(targets == label))
        held += rows[: max(len(rows) // 4, 1) if len(rows) > 1 else 0].tolist()
    mask = np.isin(np.arange(len(targets)), held)
    return np.flatnonzero(~mask), np.flatnonzero(mask)


def _trained(features: Features, items: Sequence[Item], recipe: Recipe) -> LMM:
    """The model tuned on items; with a cache, found there again and not trained twice."""
    from sav_jax.train import supervised
    from sav_jax.train.chats import chat_of
    from sav_jax.train.tune import digest, trained

    reader, task = features.reader, features.task
    chats = [chat_of(item.example, task.answer(item.label)) for item in items]
    lmm = reader.lmm
    facts = (_VERSION, lmm.fingerprint, str(lmm.dtype), lmm.num_layers, recipe.facts(), digest(chats))
    key = hashlib.sha256(repr((facts, [item.example.image_digests() for item in items])).encode()).hexdigest()
    file = location(f"{reader.cache}/tuned/{key}.safetensors") if reader.cache else None
    with reader.timed():
        matrices = _kept(file)
        if matrices is None:
            matrices = gathered(trained(lmm, chats, recipe, None, progress=False)[0])
            if file is not None:
                content, there = save(matrices), file
                by_the_first(lambda: write_file(there, content))
        return dataclasses.replace(
            lmm,
            params=supervised.tuned(lmm, recipe.targets, matrices),
            fingerprint=hashlib.sha256(f"{lmm.fingerprint} {key}".encode()).hexdigest(),
            name=f"{lmm.name} tuned on {task.name}",
        )


def _kept(file: Location | None) -> dict[str, np.ndarray] | None:
    """The matrices in a file of the cache; None if there is none."""
    if file is None:
        return None
    with storage_errors(file):
        there = file.is_file()
    if not known_by_all([0] if there else [], 1):
        return None
    try:
        with storage_errors(file):
            return load(file.read_bytes())
    except SafetensorError as error:
        raise UserError(f"{file}: damaged ({error}); delete it and run again") from None


METHODS = (
    Method("lora", "low-rank fine-tuning on the support set, its recipe swept there; read its answer", _lora),
    Method(
        "lora-likelihood",
        "low-rank fine-tuning on the support set: the class whose answer it finds likeliest",
        _lora_likelihood,
    ),
)
