"""Labelled head features without a model, for the tests of the methods that read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from eval_made import no_model

from sav_jax.eval.features import Features, Reader, Universe
from sav_jax.eval.methods import Settings
from sav_jax.eval.tasks.base import Data, Item, Split, Task
from sav_jax.examples import Example
from sav_jax.lmm import LMM
from sav_jax.reading import Readings

NAMES = ("ant", "bee", "cow", "dog")

ON_HEADS = (
    "sav",
    "hec",
    "hec-text",
    "hec-both",
    "centroid-all-heads",
    "centroid-all-layers",
    "centroid-last-layer",
    "knn",
    "logistic",
    "ridge",
)
"""Methods that read head features alone."""


class TextReader(Reader):
    """Answers every text from a table of head vectors, [L, N, H] each."""

    def __init__(self, table: dict[str, np.ndarray]) -> None:
        super().__init__(no_model)
        self.table = table
        self.asked: list[str] = []

    @property
    def lmm(self) -> LMM:
        return None  # type: ignore[return-value]

    def read(self, lmm: LMM, examples: Sequence[Example], *_: Any, **__: Any) -> Readings:
        self.asked += [example.question for example in examples]
        heads = np.stack([self.table[example.question] for example in examples])
        return Readings(tuple(self.asked), heads, np.zeros((len(heads), 0), np.float32), (), 0)


def drawn(
    classes: int,
    support: int,
    queries: int,
    shape: tuple[int, int, int] = (3, 2, 8),
    noise: float = 0.8,
    seed: int = 0,
) -> tuple[np.ndarray, list[int], np.ndarray]:
    """Heads of examples, the support first, their classes, and heads of one text per class.

    Returns:
      float32 [C * (support + queries), L, N, H]; classes; float32 [C, L, N, H].
    """
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((classes, *shape))
    of_row = [*list(range(classes)) * support, *list(range(classes)) * queries]
    # Some heads see more than others, and no two layers have one scale.
    blur = noise * rng.uniform(0.5, 2.0, shape[:2])[..., None]
    scale = rng.uniform(0.1, 10.0, shape[0])[:, None, None]
    heads = (centres[of_row] + blur * rng.standard_normal((len(of_row), *shape))) * scale
    texts = (centres + 0.5 * rng.standard_normal(centres.shape)) * scale
    return heads.astype(np.float32), of_row, texts.astype(np.float32)


def features_of(
    heads: np.ndarray,
    classes: Sequence[int],
    number: int,
    texts: np.ndarray | None = None,
    *,
    num_heads: int = 3,
    names: Sequence[str] = NAMES,
) -> Features:
    """Features whose first ``number`` rows are the support and whose other rows are the queries.

    Args:
      heads: float32 [E, L, N, H].
      classes: E numbers of names.
      number: S.
      texts: float32 [C, L, N, H], heads of "a photo of a NAME." followed by the question, in the order of ``names``.
      num_heads: heads that vote.
      names: the classes, in the order of the columns.
    """
    names = tuple(names)[: max(classes) + 1]
    items = tuple(
        Item(Example("What?", label=names[column], id=str(row), source=f"rows[{row}]"))
        for row, column in enumerate(classes)
    )
    split = Split(items[:number], items[number:], names, len(items) - number, 0, "")
    table = (
        {} if texts is None else {f"a photo of a {name}.\nWhat?": text for name, text in zip(names, texts, strict=True)}
    )
    universe = Universe(Task("made", "made", lambda _: Data(items)), items, names, TextReader(table))
    universe.readings = Readings(
        tuple(map(str, range(len(items)))), heads, np.zeros((len(items), 0), np.float32), (), 0
    )
    return Features(universe, split, Settings(num_heads=num_heads))
