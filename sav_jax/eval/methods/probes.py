"""Linear probes on all heads, each scaled to length 1 and concatenated: x of length 1 (``_arithmetic.similarities``).

x is far longer (100,352 for a 7B model) than there are examples, so both probes are computed from inner products alone,
which changes nothing: with an L2 penalty the weights are a combination of the support examples.

Axes: S support examples, Q queries, R rows, C classes, D = min(S - 1, length of x) directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sav_jax.eval.features import Features
from sav_jax.eval.methods._arithmetic import similarities, similarity
from sav_jax.eval.methods._logistic import fit_logistic
from sav_jax.eval.methods.base import Method, Outcome, named

RIDGE_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""The ``alphas`` of scikit-learn's RidgeClassifierCV."""

LOGISTIC_STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0)
"""The ``Cs`` of scikit-learn's LogisticRegression: the inverse of the penalty."""

FOLDS = 5
"""Of cross-validation, fewer if a class has fewer examples."""

_AT_ONCE = 2**22  # numbers, examples x classes x folds: the folds of one pass

_NO_VARIANCE = 1e-7  # per root of S: the Gram matrix of unit vectors, of float32 products, is rounding below that


@dataclass(frozen=True)
class Rotation:
    """The support on its own principal axes: z = (x - mean) V, which keeps all inner products between examples.

    Attributes:
      support: float64 [S, D], columns orthogonal.
      values: float64 [D], the square of each column's length.
      mean: float64 [S], mean similarity of each support example to all.
    """

    support: np.ndarray
    values: np.ndarray
    mean: np.ndarray

    @classmethod
    def of(cls, gram: np.ndarray) -> Rotation:
        """From the similarities of the support, float64 [S, S], which are overwritten.

        Never more than two matrices of that size at a time (0.75 GiB each for 10,000 examples): ``numpy.linalg.eigh``,
        which divides and conquers, needs three for itself, and axes kept beside the coordinates would be one more.
        """
        from scipy.linalg import eigh

        mean = gram.mean(axis=0)
        gram -= mean[None]
        gram -= mean[:, None]
        gram += mean.mean()
        # The transpose is the same matrix in the order of columns that LAPACK overwrites without a copy.
        values, vectors = eigh(gram.T, overwrite_a=True, check_finite=False, driver="evr")
        first = int(np.searchsorted(values, _NO_VARIANCE * np.sqrt(len(gram)), side="right"))
        if first == len(gram):  # all examples are the same
            return cls(np.zeros((len(gram), 1)), np.ones(1), mean)
        values = values[first:]
        support = gram.reshape(-1)[: len(gram) * len(values)].reshape(len(gram), -1)  # the same memory
        np.multiply(vectors[:, first:], np.sqrt(values), out=support)
        return cls(support, values, mean)

    def rotate(self, similar: np.ndarray) -> np.ndarray:
        """Coordinates of other examples from their similarities to the support: [R, S] -> [R, D].

        The columns sum to zero over the support, so that what is the same for a whole row does not matter.
        """
        return (similar - self.mean) @ self.support / self.values


def _ridge(features: Features) -> Outcome:
    """Least squares on -1 and 1 with an L2 penalty: scikit-learn's RidgeClassifierCV.

    The penalty is the one with the least squared error over all support examples, each left out, and all classes.
    """
    support, queries = features.heads
    rotation = Rotation.of(similarity(support))
    wanted = np.where(features.targets[:, None] == np.arange(len(features.split.labels)), 1.0, -1.0)
    fits = [ridge(rotation.support, wanted, penalty) for penalty in RIDGE_PENALTIES]
    errors = [((left_out - wanted) ** 2).mean() for _, left_out in fits]
    best = int(np.argmin(errors))
    weights, left_out = fits[best]
    scores = wanted.mean(axis=0) + np.concatenate(
        [rotation.rotate(similar) @ weights for _, similar in similarities(queries, support)]
    )
    predictions = named(features.split, scores.argmax(axis=1))
    return Outcome(predictions, scores, left_out, facts={"alpha": RIDGE_PENALTIES[best]})


def ridge(z: np.ndarray, wanted: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """Ridge regression with a free intercept, which is the mean of what is wanted.

    Args:
      z: float64 [S, D], columns orthogonal and of mean 0.
      wanted: float64 [S, C].
      penalty: of the squared weights.

    Returns:
      Weights [D, C], and the prediction of each example without it [S, C]: ``y - (y - f) / (1 - h)`` with the leverage
      h (Allen 1974).
    """
    squares = np.einsum("sd,sd->d", z, z)
    weights = (z.T @ wanted) / (squares + penalty)[:, None]
    fitted = wanted.mean(axis=0) + z @ weights
    leverage = 1 / len(z) + np.einsum("sd,sd,d->s", z, z, 1 / (squares + penalty))
    return weights, wanted - (wanted - fitted) / (1 - leverage)[:, None]


def _logistic(features: Features) -> Outcome:
    """Multinomial logistic regression with an L2 penalty: scikit-learn's LogisticRegression, on the rotated support,
    which has the solution of the whole features.

    The strength is the one that finds the classes of the support likeliest in stratified cross-validation, whose
    held-out log probabilities are the support's scores. With a class of one example there is none: C = 1.
    """
    from scipy.special import log_softmax

    support, queries = features.heads
    targets, num_classes = features.targets, len(features.split.labels)
    gram = similarity(support)
    folds = assign_folds(gram.sum(axis=1), targets, num_classes)
    rotation = Rotation.of(gram)
    strength, weights, held_out = cross_validated(rotation.support, rotation.values, targets, num_classes, folds)
    scores = np.concatenate(
        [
            log_softmax(rotation.rotate(similar) @ weights[:-1] + weights[-1], axis=1)
            for _, similar in similarities(queries, support)
        ]
    )
    return Outcome(named(features.split, scores.argmax(axis=1)), scores, held_out, facts={"C": strength})


def assign_folds(centrality: np.ndarray, targets: np.ndarray, num_classes: int) -> np.ndarray:
    """Deal the examples of each class out to folds, those most like the rest first: whatever order they come in, the
    folds are the same.

    Args:
      centrality: float [S].
      targets: int [S].
      num_classes: C.

    Returns:
      int [S], from 0; all 0 if a class has one example only.
    """
    number = min(FOLDS, np.bincount(targets, minlength=num_classes).min())
    folds = np.zeros(len(targets), np.int64)
    for column in range(num_classes):
        members = np.flatnonzero(targets == column)
        order = members[np.argsort(-centrality[members], kind="stable")]
        folds[order] = np.arange(len(order)) % number
    return folds


def cross_validated(
    z: np.ndarray, squares: np.ndarray, targets: np.ndarray, num_classes: int, folds: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray | None]:
    """The best strength, its weights with the intercepts behind them [D + 1, C], and the log probabilities of each
    example by the model that has not seen its fold, [S, C] or None.

    Args:
      z: float64 [S, D], columns orthogonal and of mean 0.
      squares: float64 [D], the square of each column's length.
      targets: int [S].
      num_classes: C.
      folds: int [S], from 0; if all are 0 nothing is held out, and the strength is 1.
    """
    from scipy.special import log_softmax

    rows, number = np.arange(len(z)), folds.max() + 1 if folds.max() > 0 else 0
    wanted = (targets[:, None] == np.arange(num_classes)).astype(np.float64)

    def begin(fits: int) -> np.ndarray:
        return np.zeros((z.shape[1] + 1, fits, num_classes))

    strength, held_out = 1.0, None
    if number:
        trials = np.empty((len(LOGISTIC_STRENGTHS), len(z), num_classes))
        at_once = max(1, min(number, _AT_ONCE // wanted.size))
        for first in range(0, number, at_once):
            part = np.arange(first, min(first + at_once, number))
            used = (folds[:, None] != part).astype(np.float64)
            unseen = rows[np.isin(folds, part)]
            weights = begin(len(part))
            for trial, strength in zip(trials, LOGISTIC_STRENGTHS, strict=True):  # each from the last one's solution
                weights, logits = fit_logistic(z, squares, wanted, used, strength, weights)
                trial[unseen] = log_softmax(logits[unseen, folds[unseen] - first], axis=1)
        best = int(np.argmax([trial[rows, targets].mean() for trial in trials]))
        strength, held_out = LOGISTIC_STRENGTHS[best], trials[best].copy()
        del trials
    weights, _ = fit_logistic(z, squares, wanted, np.ones((len(z), 1)), strength, begin(1))
    return strength, weights[:, 0], held_out


METHODS = (
    Method("logistic", "logistic regression on all heads", _logistic),
    Method("ridge", "ridge classifier on all heads: least squares on -1 and 1", _ridge),
)
