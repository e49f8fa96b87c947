"""Metrics of items that belong together: a question, an image, a pair or a group counts only if all of it is right."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sav_jax.eval.metrics import Answers, Metric, Units, right
from sav_jax.eval.tasks.base import Item


def by_group(item: Item) -> str:
    """All items of a group."""
    return item.group


def all_right(name: str, description: str, unit: Callable[[Item], str], size: int) -> Metric:
    """Share of the units of which every item is answered correctly.

    Args:
      name, description: of the metric.
      unit: names the unit that an item belongs to.
      size: items of a whole unit; those of which some are missing (a subset, a reduced file) do not count.
    """

    def compute(answers: Answers) -> Units | None:
        correct = right(answers)
        members: dict[str, dict[str, bool]] = {}
        clusters: dict[str, str] = {}
        for item, cluster, hit in zip(answers.items, answers.clusters, correct.tolist(), strict=True):
            members.setdefault(unit(item), {})[item.role] = hit
            clusters[unit(item)] = cluster
        whole = [key for key, roles in members.items() if len(roles) == size]
        if not whole:
            return None
        values = np.array([all(members[key].values()) for key in whole], np.float64)
        return Units(values, tuple(clusters[key] for key in whole))

    return Metric(name, description, compute)
