"""What every result is to be held against: guessing, and the raw pixels without any model."""

from __future__ import annotations

import math

import numpy as np
import PIL.Image

from sav_jax.errors import UserError
from sav_jax.eval.features import Features
from sav_jax.eval.methods.base import Method, Outcome, named
from sav_jax.eval.tasks.base import Split

_LARGEST_RAW = 64  # pixels: pictures up to this size are compared as they are
_RESIZED = 32


def _chance(features: Features) -> Outcome:
    split = features.split
    offered = [len(item.offered or split.labels) for item in split.queries]
    return Outcome(None, accuracy=math.fsum(1 / number for number in offered) / len(offered))


def _pixels(features: Features) -> Outcome:
    """Nearest centroid by Euclidean distance, as scikit-learn's NearestCentroid."""
    split = features.split
    vectors = _pixel_vectors(split)
    support, queries = vectors[: len(split.support)], vectors[len(split.support) :]
    centroids = np.stack([support[features.targets == column].mean(axis=0) for column in range(len(split.labels))])
    # |q - c|^2 without |q|^2, which is the same for every class.
    distances = (centroids**2).sum(axis=1)[None] - 2 * queries @ centroids.T
    return Outcome(named(split, distances.argmin(axis=1)))


def _pixel_vectors(split: Split) -> np.ndarray:
    """RGB values of each example's only image, float32 [S + Q, 3 * height * width], all at one size."""
    images = []
    for item in [*split.support, *split.queries]:
        example = item.example
        if len(example.images) != 1:
            raise UserError(f"{example.source}: method pixels needs one image per example, not {len(example.images)}")
        image = example.load_images()[0]
        if max(image.size) > _LARGEST_RAW:
            image = image.resize((_RESIZED, _RESIZED), PIL.Image.Resampling.BOX)
        images.append(image)
    if len({image.size for image in images}) > 1:
        images = [image.resize((_RESIZED, _RESIZED), PIL.Image.Resampling.BOX) for image in images]
    return np.stack([np.asarray(image, np.float32).ravel() for image in images])


METHODS = (
    Method("chance", "guess: one in as many as the question offers", _chance, uses_support=False),
    Method("pixels", "nearest class centroid of the raw pixels: no model", _pixels),
)
