"""What the number of heads and the depth of the model are worth: accuracy of sparse attention vectors along both.

One classification by every head serves all points of both curves.

Axes: S support examples, Q queries, L layers, N heads per layer, M = L * N heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sav_jax.classifier import SparseAttentionVectors, majority
from sav_jax.eval.features import Features

_NUMBERS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
_MOST_DEPTHS = 16


@dataclass(frozen=True)
class Sweep:
    """Two curves.

    Attributes:
      numbers: how many heads vote, ascending; the last is all of them.
      by_number: accuracy at each.
      depths: to how many of the first layers the choice of heads is limited, ascending; the last is all of them.
      by_depth: accuracy at each, with ``num_heads`` heads (or all there are).
    """

    numbers: tuple[int, ...]
    by_number: tuple[float, ...]
    depths: tuple[int, ...]
    by_depth: tuple[float, ...]


def sweep(features: Features, num_heads: int) -> Sweep:
    """Accuracy of the published classifier against the number of heads and against depth."""
    support, queries = features.heads
    split = features.split
    labels = [item.label for item in split.support]
    layers, per_layer = support.shape[1:3]
    total = layers * per_layer
    every = SparseAttentionVectors.fit(support.whole(), labels, total, class_names=split.labels)
    votes = np.concatenate([every.head_votes(heads) for _, heads in queries.blocks()])
    column = {label: i for i, label in enumerate(split.labels)}
    targets = np.array([column[item.label] for item in split.queries])

    def accuracy(chosen: np.ndarray) -> float:
        return float((majority(votes[:, chosen], len(split.labels)) == targets).mean())

    order = np.arange(total)
    numbers = [*(n for n in _NUMBERS if n < total), total]
    steps = np.unique(np.linspace(1, layers, min(layers, _MOST_DEPTHS)).round().astype(int)).tolist()
    layer = np.array([layer for layer, _ in every.heads])
    return Sweep(
        tuple(numbers),
        tuple(accuracy(order[:number]) for number in numbers),
        tuple(steps),
        tuple(accuracy(order[layer < depth][:num_heads]) for depth in steps),
    )
