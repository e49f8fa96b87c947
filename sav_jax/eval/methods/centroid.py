"""Nearest centroid on layers and on all heads: what sparse attention vectors gain by choosing heads.

("Last L" and "All L" of arXiv 2412.00142v2, whose table does not say how layers classify; "all heads" is the last point
of its curve over k.)

All three are the rule of ``sav`` with nothing chosen: the nearest class mean by cosine, and where there are several
feature vectors one vote each, of equally many votes for the class that the best-ranked of them voted for. A layer's
feature is the concatenation of its heads, the input of its output projection; that is what the one forward pass keeps.

Axes: E examples, L layers, N heads per layer, H head width.
"""

from __future__ import annotations

import dataclasses

from sav_jax.eval.features import Features, Heads
from sav_jax.eval.methods.base import Method, Outcome
from sav_jax.eval.methods.sav import vote


def _last_layer(features: Features) -> Outcome:
    support, queries = features.heads
    return _unnamed(vote(features, _as_layers(support, last=True), _as_layers(queries, last=True), 1))


def _all_layers(features: Features) -> Outcome:
    support, queries = features.heads
    return _unnamed(vote(features, _as_layers(support), _as_layers(queries), support.shape[1]))


def _all_heads(features: Features) -> Outcome:
    support, queries = features.heads
    return _unnamed(vote(features, support, queries, support.shape[1] * support.shape[2]))


def _as_layers(heads: Heads, last: bool = False) -> Heads:
    """The same numbers as one "head" per layer, [E, L, 1, N * H], or [E, 1, 1, N * H]: a view."""
    array = heads.array[:, -1:] if last else heads.array
    examples, layers, per_layer, width = array.shape
    return Heads(array.reshape(examples, layers, 1, per_layer * width), heads.rows)


def _unnamed(outcome: Outcome) -> Outcome:
    """Without the classifier: it chose nothing, and its "heads" are layers."""
    return dataclasses.replace(outcome, classifier=None)


METHODS = (
    Method("centroid-all-heads", "nearest centroid on every head, one vote each: sav without a choice", _all_heads),
    Method("centroid-all-layers", "nearest centroid on every layer, one vote each", _all_layers),
    Method("centroid-last-layer", "nearest centroid on the last layer", _last_layer),
)
