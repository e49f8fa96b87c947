"""Sparse Attention Vectors (arXiv 2412.00142), on the model and on the same model with random weights.

Axes: R rows, C classes, L layers, N heads per layer, K selected heads, H head width.
"""

from __future__ import annotations

import numpy as np

from sav_jax.classifier import CONFIDENCE_TEMPERATURE, SparseAttentionVectors
from sav_jax.eval.features import Features, Heads
from sav_jax.eval.methods._arithmetic import block_rows, one_blas_thread, unit
from sav_jax.eval.methods.base import Method, Outcome


def _sav(features: Features) -> Outcome:
    return vote(features, *features.heads, features.settings.num_heads)


def _sav_random(features: Features) -> Outcome:
    return vote(features, *features.random_heads, features.settings.num_heads)


@one_blas_thread()
def vote(features: Features, support: Heads, queries: Heads, num_heads: int) -> Outcome:
    """Choose heads on the support and let them vote on the queries; scores and left-out scores as ``vote_scores``."""
    labels = [item.label for item in features.split.support]
    classifier = SparseAttentionVectors.fit(support.whole(), labels, num_heads, class_names=features.split.labels)
    targets, rows = features.targets, block_rows(num_heads * max(classifier.centroids.shape[1:]))
    left_out = [vote_scores(classifier, heads, targets[part]) for part, heads in support.blocks(rows)]
    predictions: list[str] = []
    scores = []
    for _, heads in queries.blocks(rows):
        names, _, _ = classifier.classify(heads)
        predictions += names
        scores.append(vote_scores(classifier, heads))
    return Outcome(tuple(predictions), np.concatenate(scores), np.concatenate(left_out), classifier=classifier)


def vote_scores(classifier: SparseAttentionVectors, heads: np.ndarray, targets: np.ndarray | None = None) -> np.ndarray:
    """Mean over the selected heads of the cosine to each class centroid: what probabilities are made of.

    Args:
      classifier: the selected heads and their centroids.
      heads: float32 [R, L, N, H].
      targets: the class of each of the rows if they are of the support: each is then left out of its own class's
        centroid, which would otherwise be nearer than it will be to any query. The heads stay those chosen with it.

    Returns:
      float64 [R, C]; divided by the temperature of confidence-weighted votes, so that 1 is a sensible scale.
    """
    layer, head = np.array(classifier.heads).T
    vectors = heads[:, layer, head].astype(np.float64).swapaxes(0, 1)  # [K, R, H]
    centroids = classifier.centroids.astype(np.float64)
    norms = np.sqrt(np.einsum("krh,krh->kr", vectors, vectors))
    norms = np.where(norms > 0, norms, 1)
    cosines = np.matmul(vectors, unit(centroids).swapaxes(1, 2)) / norms[..., None]  # [K, R, C]
    if targets is not None:
        count = np.array(classifier.support, np.float64)[targets]
        rest = unit(centroids[:, targets] * count[:, None] - vectors)
        own = (vectors * rest).sum(axis=2) / norms
        # An example alone in its class leaves nothing to compare with: a cosine of 0.
        cosines[:, np.arange(len(targets)), targets] = np.where(count > 1, own, 0.0)
    return cosines.mean(axis=0) / CONFIDENCE_TEMPERATURE


METHODS = (
    Method("sav-random", "sav on the same model with random weights: what the architecture alone can do", _sav_random),
    Method("sav", "sparse attention vectors: the heads that best tell the examples apart vote", _sav),
)
