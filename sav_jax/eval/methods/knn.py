"""Nearest neighbours among the labelled examples.

On all heads, each scaled to length 1 and concatenated, as the probes: no head counts more for its scale, and methods on
these features differ in their rule alone. The similarity is then the mean over the heads of the cosine. A neighbour's
vote weighs exp(similarity / 0.07) (Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance
Discrimination", CVPR 2018), which also decides between equally many votes.

Axes: R rows, S support examples, C classes.
"""

from __future__ import annotations

import numpy as np

from sav_jax.eval.features import Features
from sav_jax.eval.methods._arithmetic import similarities
from sav_jax.eval.methods.base import Method, Outcome, named

NEIGHBOURS = (1, 3, 5, 9, 15, 25)
"""Numbers of neighbours to choose from."""

TEMPERATURE = 0.07
"""Divides similarities in a neighbour's weight."""


def _knn(features: Features) -> Outcome:
    """The number of neighbours is the one that classifies most support examples right, each without itself; of equals
    the one that finds their classes likelier.
    """
    support, queries = features.heads
    targets, num_classes = features.targets, len(features.split.labels)
    candidates = [number for number in NEIGHBOURS if number < len(support)]
    left_out = np.empty((len(candidates), len(support), num_classes))
    for part, similar in similarities(support, support):
        similar[np.arange(len(similar)), np.arange(part.start, part.stop)] = -np.inf
        left_out[:, part] = neighbour_scores(similar, targets, num_classes, candidates)
    own = left_out[:, np.arange(len(targets)), targets]
    right = (left_out.argmax(axis=2) == targets).sum(axis=1)
    best = max(range(len(candidates)), key=lambda i: (right[i], own[i].sum()))
    parts = [
        neighbour_scores(similar, targets, num_classes, candidates[best : best + 1])[0]
        for _, similar in similarities(queries, support)
    ]
    scores = np.concatenate(parts)
    predictions = named(features.split, scores.argmax(axis=1))
    return Outcome(predictions, scores, left_out[best], facts={"neighbours": candidates[best]})


def neighbour_scores(similar: np.ndarray, targets: np.ndarray, num_classes: int, candidates: list[int]) -> np.ndarray:
    """Logarithm of each class's share of the weights, one vote for every class added so that none is impossible.

    Args:
      similar: float64 [R, S]; minus infinity for what must not be a neighbour.
      targets: int [S], the classes.
      num_classes: C.
      candidates: ascending numbers of neighbours.

    Returns:
      float64 [len(candidates), R, C].
    """
    most = candidates[-1]
    nearest = np.argpartition(-similar, most - 1, axis=1)[:, :most]
    order = np.argsort(-np.take_along_axis(similar, nearest, axis=1), axis=1, kind="stable")
    nearest = np.take_along_axis(nearest, order, axis=1)
    closeness = np.take_along_axis(similar, nearest, axis=1)
    weights = np.exp((closeness - closeness[:, :1]) / TEMPERATURE)
    of_class = targets[nearest][:, :, None] == np.arange(num_classes)
    sums = np.cumsum(weights[:, :, None] * of_class, axis=1)
    scores = []
    for number in candidates:
        share = sums[:, number - 1] / sums[:, number - 1].sum(axis=1, keepdims=True)
        scores.append(np.log((number * share + 1) / (number + num_classes)))
    return np.stack(scores)


METHODS = (Method("knn", "nearest neighbours by the mean cosine of all heads", _knn),)
