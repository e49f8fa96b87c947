"""Labelled head vectors for the tests of the classifier."""

from __future__ import annotations

import numpy as np

LABELS = ["ant", "bee", "cow"] * 5


def separable(labels: list[str], layers: int = 2, per_layer: int = 3, width: int = 8, seed: int = 0) -> np.ndarray:
    """Heads [N, layers, per_layer, width], float32, in which every head tells most examples' classes."""
    rng = np.random.default_rng(seed)
    names = sorted(set(labels))
    centres = rng.standard_normal((len(names), layers, per_layer, width))
    noise = rng.standard_normal((len(labels), layers, per_layer, width))
    return (centres[[names.index(label) for label in labels]] + 0.7 * noise).astype(np.float32)
