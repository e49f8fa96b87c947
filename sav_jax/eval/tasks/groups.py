"""Items that belong together: kept on one side of a split, and right only if all of them are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from sav_jax.eval.metrics import Answers, Metric, Units, right
from sav_jax.eval.tasks.base import Item


def joined(items: Sequence[Item], key: Callable[[Item], Hashable]) -> tuple[Item, ...]:
    """Make one group of the groups that have a key in common, such as a picture that stands in several of them."""
    parents: dict[Hashable, Hashable] = {}

    def root(name: Hashable) -> Hashable:
        while parents.setdefault(name, name) != name:
            parents[name] = name = parents[parents[name]]
        return name

    for item in items:
        parents[root(("key", key(item)))] = root(("group", item.group))
    names: dict[Hashable, str] = {}  # a joined group is called as the first of its groups
    return tuple(
        dataclasses.replace(item, group=names.setdefault(root(("group", item.group)), item.group)) for item in items
    )


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
