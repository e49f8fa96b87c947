"""Metrics: from a method's answers to numbers.

Axes: Q queries, C classes, U units.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sav_jax.eval.tasks.base import Item


@dataclass(frozen=True)
class Answers:
    """One method's answers to the queries of one split.

    Attributes:
      items: Q queries with their right labels.
      labels: C class names, the order of the columns.
      predictions: Q class names; "" where the method gave none.
      scores: float [Q, C], any number that is larger for likelier classes, or None.
      probabilities: float [Q, C], rows sum to 1, or None.
      texts: what the model wrote, of methods that let it write.
    """

    items: tuple[Item, ...]
    labels: tuple[str, ...]
    predictions: tuple[str, ...]
    scores: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    texts: tuple[str, ...] | None = None

    @property
    def targets(self) -> np.ndarray:
        """Column of each query's right label, int [Q]."""
        column = {label: i for i, label in enumerate(self.labels)}
        return np.array([column[item.label] for item in self.items])

    @property
    def predicted(self) -> np.ndarray:
        """Column of each prediction, -1 for none, int [Q]."""
        column = {label: i for i, label in enumerate(self.labels)}
        return np.array([column.get(label, -1) for label in self.predictions])


@dataclass(frozen=True)
class Units:
    """A metric that is a mean: over queries, questions, images, pairs or groups.

    Attributes:
      values: float [U], each unit's score.
      clusters: U names; units of one cluster (questions of one group) are not independent of each other.
    """

    values: np.ndarray
    clusters: tuple[str, ...]


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
      name: in tables and files.
      description: one line, with its source.
      compute: gives the units whose mean it is, or the number itself where it is no mean (F1, AUROC); None where it
        does not apply (no probabilities, only one class present).
      higher_is_better: for comparisons.
    """

    name: str
    description: str
    compute: Callable[[Answers], Units | float | None]
    higher_is_better: bool = True
