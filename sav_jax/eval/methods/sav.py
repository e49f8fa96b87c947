"""Sparse Attention Vectors (arXiv 2412.00142), on the model and on the same model with random weights.

Axes: S support examples, Q queries, C classes, K selected heads, H head width.
"""

from __future__ import annotations

import numpy as np

from sav_jax.classifier import CONFIDENCE_TEMPERATURE, SparseAttentionVectors
from sav_jax.eval.features import Features, Heads
from sav_jax.eval.methods.base import Method, Outcome


def _sav(features: Features) -> Outcome:
    return _vote(features, *features.heads)


def _sav_random(features: Features) -> Outcome:
    return _vote(features, *features.random_heads)


def _vote(features: Features, support: Heads, queries: Heads) -> Outcome:
    labels = [item.label for item in features.split.support]
    classifier = SparseAttentionVectors.fit(
        support.whole(), labels, features.settings.num_heads, class_names=features.split.labels
    )
    predictions: list[str] = []
    scores = []
    for _, heads in queries.blocks():
        names, _, _ = classifier.classify(heads)
        predictions += names
        scores.append(vote_scores(classifier, heads))
    left_out = vote_scores(classifier, support.whole(), features.targets)
    return Outcome(tuple(predictions), np.concatenate(scores), left_out, classifier=classifier)


def vote_scores(classifier: SparseAttentionVectors, heads: np.ndarray, targets: np.ndarray | None = None) -> np.ndarray:
    """Mean over the selected heads of the cosine to each class centroid: what probabilities are made of.

    Args:
      classifier: the selected heads and their centroids.
      heads: float32 [R, L, N, H].
      targets: the class of each of the rows if they are the support themselves: each is then left out of its own
        class's centroid, which would otherwise be nearer than it will be to any query.

    Returns:
      float64 [R, C]; divided by the temperature of confidence-weighted votes, so that 1 is a sensible scale.
    """
    layer, head = np.array(classifier.heads).T
    chosen = _unit(heads[:, layer, head].astype(np.float64))
    cosines = np.einsum("rkh,kch->rkc", chosen, _unit(classifier.centroids.astype(np.float64)))
    if targets is not None:
        count = np.array(classifier.support, np.float64)[targets][:, None, None]
        sums = np.swapaxes(classifier.centroids.astype(np.float64)[:, targets], 0, 1) * count
        rest = _unit(sums - heads[:, layer, head])
        own = np.einsum("rkh,rkh->rk", chosen, rest)
        # An example alone in its class leaves nothing to compare with: a cosine of 0.
        cosines[np.arange(len(targets)), :, targets] = np.where(count[:, :, 0] > 1, own, 0.0)
    return cosines.mean(axis=1) / CONFIDENCE_TEMPERATURE


def _unit(vectors: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(norm > 0, norm, 1)


METHODS = (
    Method("sav-random", "sav on the same model with random weights: what the architecture alone can do", _sav_random),
    Method("sav", "sparse attention vectors: the heads that best tell the examples apart vote", _sav),
)
