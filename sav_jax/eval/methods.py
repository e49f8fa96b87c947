"""Methods: each gets a task's split and shared features, and answers the queries."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image

from sav_jax.classifier import SparseAttentionVectors
from sav_jax.errors import UserError
from sav_jax.eval.tasks import Split
from sav_jax.extract import extract_heads
from sav_jax.generation import score_options
from sav_jax.lmm import LMM

_LARGEST_RAW = 64  # pixels: pictures up to this size are compared as they are
_RESIZED = 32


@dataclass(frozen=True)
class Settings:
    """What a comparison is run with.

    Attributes:
      shots: labelled examples per class.
      num_heads: heads that vote.
      seed: of the draws and of random weights.
      limit: answer only so many queries; None for all.
      batch_size: examples per forward pass.
      cache: path of a feature store, or None.
    """

    shots: int = 20
    num_heads: int = 20
    seed: int = 0
    limit: int | None = None
    batch_size: int = 8
    cache: str | None = None


class Features:
    """What the model makes of a split's examples: computed when first asked for, shared by all methods."""

    def __init__(self, load: Callable[[], LMM], split: Split, settings: Settings) -> None:
        self._load, self.split, self.settings = load, split, settings
        self.seconds = 0.0  # spent in loading and running the model

    @functools.cached_property
    def heads(self) -> tuple[np.ndarray, np.ndarray]:
        """Head vectors of the support and of the queries, float32 [., L, A, H]."""
        with self._timed():
            return self._extract(self._load())

    @functools.cached_property
    def random_heads(self) -> tuple[np.ndarray, np.ndarray]:
        """The same with random weights in every part of the model."""
        with self._timed():
            return self._extract(self._load().reinitialized(self.settings.seed))

    @functools.cached_property
    def option_scores(self) -> np.ndarray:
        """Log-likelihood of each class name as the answer to each query, float32 [N, C]."""
        with self._timed():
            return score_options(self._load(), self.split.queries, list(self.split.labels), self.settings.batch_size)

    def _extract(self, lmm: LMM) -> tuple[np.ndarray, np.ndarray]:
        available = lmm.num_layers * lmm.num_heads
        if not 1 <= self.settings.num_heads <= available:
            raise UserError(f"--num-heads is {self.settings.num_heads}; there are {available} heads to choose from")
        examples = [*self.split.support, *self.split.queries]
        heads = extract_heads(lmm, examples, self.settings.batch_size, self.settings.cache)
        return heads[: len(self.split.support)], heads[len(self.split.support) :]

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start


@dataclass(frozen=True)
class Outcome:
    """A method's answers.

    Attributes:
      predictions: a class name per query; None if the method only has an expected accuracy.
      probabilities: float [N, C], the share that the method gives to each class, if it does.
      accuracy: the expected accuracy, where there are no predictions.
      classifier: the selected heads, where there are some.
    """

    predictions: tuple[str, ...] | None
    probabilities: np.ndarray | None = None
    accuracy: float | None = None
    classifier: SparseAttentionVectors | None = None


@dataclass(frozen=True)
class Method:
    """A way to answer queries.

    Attributes:
      name: on the command line and in the results.
      description: one line.
      run: answers the queries.
      uses_support: whether it looks at the labelled examples.
    """

    name: str
    description: str
    run: Callable[[Features], Outcome]
    uses_support: bool = True


def _chance(features: Features) -> Outcome:
    return Outcome(None, accuracy=1 / len(features.split.labels))


def _zero_shot(features: Features) -> Outcome:
    scores = features.option_scores
    shares = np.exp(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))
    return Outcome(_named(features.split, scores.argmax(axis=1)), shares)


def _pixels(features: Features) -> Outcome:
    """Nearest centroid by Euclidean distance, as scikit-learn's NearestCentroid."""
    split = features.split
    vectors = _pixel_vectors(split)
    support, queries = vectors[: len(split.support)], vectors[len(split.support) :]
    labels = np.array([example.label for example in split.support])
    centroids = np.stack([support[labels == name].mean(axis=0) for name in split.labels])
    # |q - c|^2 without |q|^2, which is the same for every class.
    distances = (centroids**2).sum(axis=1)[None] - 2 * queries @ centroids.T
    return Outcome(_named(split, distances.argmin(axis=1)))


def _pixel_vectors(split: Split) -> np.ndarray:
    """RGB values of each example's only image, float32 [N, 3 * height * width], all at one size."""
    images = []
    for example in [*split.support, *split.queries]:
        if len(example.images) != 1:
            raise UserError(f"{example.source}: method pixels needs one image per example, not {len(example.images)}")
        image = example.load_images()[0]
        if max(image.size) > _LARGEST_RAW:
            image = image.resize((_RESIZED, _RESIZED), PIL.Image.Resampling.BOX)
        images.append(image)
    if len({image.size for image in images}) > 1:
        images = [image.resize((_RESIZED, _RESIZED), PIL.Image.Resampling.BOX) for image in images]
    return np.stack([np.asarray(image, np.float32).ravel() for image in images])


def _sav(features: Features) -> Outcome:
    return _vote(features, *features.heads)


def _sav_random(features: Features) -> Outcome:
    return _vote(features, *features.random_heads)


def _vote(features: Features, support: np.ndarray, queries: np.ndarray) -> Outcome:
    labels = [str(example.label) for example in features.split.support]
    classifier = SparseAttentionVectors.fit(support, labels, features.settings.num_heads)
    predictions, _, probabilities = classifier.classify(queries)
    return Outcome(tuple(predictions), probabilities, classifier=classifier)


def _named(split: Split, columns: np.ndarray) -> tuple[str, ...]:
    return tuple(split.labels[column] for column in columns)


def _registry(methods: Sequence[Method]) -> dict[str, Method]:
    return {method.name: method for method in methods}


METHODS = _registry(
    [
        Method("chance", "guess: one in as many as there are classes", _chance, uses_support=False),
        Method("zero-shot", "ask the model: the class name it finds most likely as its answer", _zero_shot, False),
        Method("pixels", "nearest class centroid of the raw pixels: no model", _pixels),
        Method(
            "sav-random", "sav on the same model with random weights: what the architecture alone can do", _sav_random
        ),
        Method("sav", "sparse attention vectors: the heads that best tell the examples apart vote", _sav),
    ]
)
"""The methods known by name."""
