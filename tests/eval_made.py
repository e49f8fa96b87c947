"""A small task and features made by hand, for the tests of the evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import numpy as np
import PIL.Image
from support_sets import separable

from sav_jax.eval.features import Features, Reader, Universe
from sav_jax.eval.methods import Settings
from sav_jax.eval.tasks import Data, Item, Split, Task, split_task
from sav_jax.examples import Example
from sav_jax.generation import Generation
from sav_jax.lmm import LMM
from sav_jax.reading import Readings


def no_model() -> NoReturn:
    raise AssertionError("the model is not needed here")


def grey_items(per_class: int = 6) -> tuple[Item, ...]:
    """Dark, middle and bright squares with some noise."""
    rng = np.random.default_rng(0)
    return tuple(
        Item(
            Example(
                "How bright?",
                (PIL.Image.fromarray(rng.integers(level, level + 40, (8, 8, 3), dtype=np.uint8)),),
                label=name,
                id=f"{name}-{i}",
                source=f"grey[{i}]",
            )
        )
        for i in range(per_class)
        for name, level in (("dark", 10), ("middle", 100), ("bright", 200))
    )


def grey_task(per_class: int = 6) -> Task:
    items = grey_items(per_class)
    return Task("grey", "squares", lambda _: Data(items))


def made_features(
    split: Split,
    heads: np.ndarray | None = None,
    *,
    task: Task | None = None,
    scores: np.ndarray | None = None,
    texts: tuple[str, ...] = (),
    settings: Settings | None = None,
) -> Features:
    """Features of a split without a model: rows are the support, then the queries.

    Args:
      split: the split.
      heads: float32 [S + Q, L, N, H]; by default such that every head tells most classes.
      task: a task of those labels.
      scores: float32 [S + Q, C] log-likelihoods of the answers.
      texts: S + Q written answers.
      settings: what the method is run with.
    """
    items = (*split.support, *split.queries)
    if heads is None:
        heads = separable([item.label for item in items])
    if scores is None:
        scores = np.zeros((len(items), len(split.labels)), np.float32)
    generations = tuple(Generation(text, ()) for text in texts or [""] * len(items))
    universe = Universe(task or grey_task(), items, split.labels, Reader(no_model))
    universe.readings = Readings(tuple(map(str, range(len(items)))), heads, scores, generations, 0)
    return Features(universe, split, settings or Settings(shots=2, num_heads=4))


def grey_split(shots: int = 2, seed: int = 0, per_class: int = 6) -> Split:
    task = grey_task(per_class)
    return split_task(task, Data(grey_items(per_class)), shots, seed)


def read_features(
    load: Callable[[], LMM],
    split: Split,
    *,
    task: Task | None = None,
    settings: Settings | None = None,
    cache: str | None = None,
) -> Features:
    """Features of a split that are read by a model, answers of three tokens at most."""
    settings = settings or Settings(shots=2, num_heads=4)
    items = (*split.support, *split.queries)
    universe = Universe(task or grey_task(), items, split.labels, Reader(load, 4, cache), max_new_tokens=3)
    return Features(universe, split, settings)
