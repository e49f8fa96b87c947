"""Metrics: from a method's answers to numbers.

Axes: Q queries, C classes, U units.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sav_jax.eval.tasks.base import Item


@dataclass(frozen=True)
class Answers:
    """One method's answers to the queries of one split.

    Attributes:
      items: Q queries with their right labels, or with references.
      labels: C class names, the order of the columns; none in a generative task.
      predictions: Q class names, or in a generative task texts; "" where the method gave none.
      scores: float [Q, C], any number that is larger for likelier classes, or None.
      probabilities: float [Q, C], rows sum to 1, or None.
      texts: what the model wrote, of methods that let it write.
      names: Q names of the queries, the same in every split that asks them; by default their ids.
      corpus: references of each of all queries, asked or not, of a generative task; () for those of ``items``.
    """

    items: tuple[Item, ...]
    labels: tuple[str, ...]
    predictions: tuple[str, ...]
    scores: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    texts: tuple[str, ...] | None = None
    names: tuple[str, ...] = ()
    corpus: tuple[tuple[str, ...], ...] = ()

    @property
    def clusters(self) -> tuple[str, ...]:
        """Q names of what is independent of each other: a query's group, or itself."""
        names = self.names or [item.example.id for item in self.items]
        return tuple(item.group or name for item, name in zip(self.items, names, strict=True))

    def take(self, index: np.ndarray) -> Answers:
        """The answers to some queries, int [Q'] (repetitions allowed)."""
        rows = index.tolist()
        return dataclasses.replace(
            self,
            items=tuple(self.items[row] for row in rows),
            predictions=tuple(self.predictions[row] for row in rows),
            scores=None if self.scores is None else self.scores[index],
            probabilities=None if self.probabilities is None else self.probabilities[index],
            texts=None if self.texts is None else tuple(self.texts[row] for row in rows),
            names=tuple(self.names[row] for row in rows) if self.names else (),
        )

    @property
    def targets(self) -> np.ndarray:
        """Column of each query's right label, int [Q]."""
        column = {label: i for i, label in enumerate(self.labels)}
        return np.array([column[item.label] for item in self.items])

    @property
    def predicted(self) -> np.ndarray:
        """Column of each prediction, -1 for none, int [Q]."""
        column = {label: i for i, label in enumerate(self.labels)}
        return np.array([column.get(label, -1) for label in self.predictions])


@dataclass(frozen=True)
class Units:
    """A metric that is a mean: over queries, questions, images, pairs or groups.

    Attributes:
      values: float [U], each unit's score.
      clusters: U names; units of one cluster (questions of one group) are not independent of each other.
    """

    values: np.ndarray
    clusters: tuple[str, ...]


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
      name: in tables and files.
      description: one line, with its source.
      compute: gives the units whose mean it is, or the number itself where it is no mean (F1, AUROC); None where it
        does not apply (no probabilities, only one class present).
      higher_is_better: for comparisons.
      weighted: of a metric that is no mean: the same on R resamples at once, from how often each query was drawn, float
        [R, Q] -> float [R], NaN where it is not defined; None if ``compute`` has to be called for each.
    """

    name: str
    description: str
    compute: Callable[[Answers], Units | float | None]
    higher_is_better: bool = True
    weighted: Callable[[Answers, np.ndarray], np.ndarray] | None = None

    def resampled(self, answers: Answers, draws: np.ndarray) -> np.ndarray:
        """The number on R resamples of the queries, of a metric that is no mean.

        Args:
          answers: to Q queries.
          draws: int [R, Q], how often each query was drawn.

        Returns:
          float [R]; NaN where the metric does not apply.
        """
        if self.weighted is not None:
            return self.weighted(answers, draws.astype(np.float64))
        found = (
            self.compute(answers.take(np.repeat(np.arange(len(row)), row))) if row.any() else None for row in draws
        )
        return np.array([value if isinstance(value, float) else np.nan for value in found])


# What all tasks have


def right(answers: Answers) -> np.ndarray:
    """Whether each query was answered correctly, bool [Q]."""
    return answers.predicted == answers.targets


def _accuracy(answers: Answers) -> Units:
    return Units(right(answers).astype(np.float64), answers.clusters)


def _offered_accuracy(answers: Answers) -> Units | None:
    if answers.scores is None or not any(item.offered for item in answers.items):
        return None
    allowed = np.array(
        [[not item.offered or label in item.offered for label in answers.labels] for item in answers.items]
    )
    choice = np.where(allowed, answers.scores, -np.inf).argmax(axis=1)
    return Units((choice == answers.targets).astype(np.float64), answers.clusters)


def _macro_f1(answers: Answers) -> float:
    targets, predicted = answers.targets, answers.predicted
    present = np.union1d(targets, predicted[predicted >= 0])
    hits = np.array([((predicted == c) & (targets == c)).sum() for c in present], np.float64)
    sizes = np.array([(predicted == c).sum() + (targets == c).sum() for c in present], np.float64)
    return float((2 * hits / sizes).mean())


def _weighted_macro_f1(answers: Answers, weights: np.ndarray) -> np.ndarray:
    classes = np.arange(len(answers.labels))
    truth, said = (column[:, None] == classes for column in (answers.targets, answers.predicted))  # [Q, C]
    hits = weights @ (truth & said)
    sizes = weights @ (truth.astype(np.float64) + said)
    scores = np.divide(2 * hits, sizes, out=np.zeros_like(hits), where=sizes > 0)
    present = (sizes > 0).sum(axis=1)
    return np.where(present, scores.sum(axis=1) / np.maximum(present, 1), np.nan)


def _auroc(answers: Answers) -> float | None:
    if answers.probabilities is None:
        return None
    targets, areas = answers.targets, []
    for column in _curves(answers):
        area = area_under_roc(answers.probabilities[:, column], targets == column)
        if area is not None:
            areas.append(area)
    return float(np.mean(areas)) if areas else None


def _curves(answers: Answers) -> Sequence[int]:
    """Classes with a curve of their own: the two of a binary task mirror each other."""
    return range(len(answers.labels)) if len(answers.labels) > 2 else [1]


def _weighted_auroc(answers: Answers, weights: np.ndarray) -> np.ndarray:
    total, defined = np.zeros(len(weights)), np.zeros(len(weights))
    if answers.probabilities is None:
        return np.full(len(weights), np.nan)
    for column in _curves(answers):
        scores, positive = answers.probabilities[:, column], answers.targets == column
        order = np.argsort(scores, kind="stable")
        starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))  # of runs of equal scores
        drawn, positive = weights[:, order], positive[order]
        ups = np.add.reduceat(drawn * positive, starts, axis=1)
        downs = np.add.reduceat(drawn * ~positive, starts, axis=1)
        below = np.cumsum(downs, axis=1) - downs / 2  # negatives with lower scores, and half of those with equal ones
        pairs = ups.sum(axis=1) * downs.sum(axis=1)
        total += np.divide((ups * below).sum(axis=1), pairs, out=np.zeros(len(weights)), where=pairs > 0)
        defined += pairs > 0
    return np.where(defined > 0, total / np.maximum(defined, 1), np.nan)


def area_under_roc(scores: np.ndarray, positive: np.ndarray) -> float | None:
    """Probability that a positive scores higher than a negative, ties counting half (Mann-Whitney).

    Args:
      scores: float [Q].
      positive: bool [Q].

    Returns:
      None if all or none are positive.
    """
    from scipy.stats import rankdata

    count = int(positive.sum())
    others = len(positive) - count
    if not count or not others:
        return None
    return float((rankdata(scores)[positive].sum() - count * (count + 1) / 2) / (count * others))


def confidence(answers: Answers) -> np.ndarray | None:
    """Probability of each prediction, float [Q]: 0 where there is none."""
    if answers.probabilities is None:
        return None
    predicted = answers.predicted
    return np.where(predicted >= 0, answers.probabilities[np.arange(len(predicted)), predicted], 0.0)


def _calibration_error(answers: Answers, bins: int = 15) -> float | None:
    sure = confidence(answers)
    if sure is None:
        return None
    # Bin (i / bins, (i + 1) / bins]; 0 belongs to the first.
    place = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(place, weights=right(answers) - sure, minlength=bins)
    return float(np.abs(gap).sum() / len(sure))


def _brier(answers: Answers) -> Units | None:
    if answers.probabilities is None:
        return None
    truth = np.eye(len(answers.labels))[answers.targets]
    return Units(((answers.probabilities - truth) ** 2).sum(axis=1), answers.clusters)


def _log_loss(answers: Answers) -> Units | None:
    if answers.probabilities is None:
        return None
    p = answers.probabilities[np.arange(len(answers.items)), answers.targets]
    return Units(-np.log(np.maximum(p, np.finfo(np.float64).tiny)), answers.clusters)


def risk_coverage(answers: Answers) -> np.ndarray | None:
    """Share of wrong answers among the n most confident ones, for n = 1 to Q: float [Q].

    Equally confident answers come in random order: the expectation is taken.
    """
    sure = confidence(answers)
    if sure is None:
        return None
    order = np.argsort(-sure, kind="stable")
    wrong = (~right(answers))[order].astype(np.float64)
    _, tie = np.unique(-sure[order], return_inverse=True)
    share = np.bincount(tie, weights=wrong) / np.bincount(tie)
    return np.cumsum(share[tie]) / np.arange(1, len(sure) + 1)


def _area_under_risk_coverage(answers: Answers) -> float | None:
    risk = risk_coverage(answers)
    return None if risk is None else float(risk.mean())


COMMON: tuple[Metric, ...] = (
    Metric("acc", "share of the queries that are answered correctly", _accuracy),
    Metric(
        "acc_offered",
        "accuracy when the method may only choose among the classes that the question offers",
        _offered_accuracy,
    ),
    Metric("macro_f1", "mean over the classes of F1 = 2 TP / (2 TP + FP + FN)", _macro_f1, weighted=_weighted_macro_f1),
    Metric(
        "auroc",
        "area under the ROC curve; with more than two classes the mean of one-vs-rest",
        _auroc,
        weighted=_weighted_auroc,
    ),
    Metric(
        "ece",
        "expected calibration error: mean gap between confidence and accuracy over 15 equal bins (Guo et al. 2017)",
        _calibration_error,
        higher_is_better=False,
    ),
    Metric(
        "brier",
        "squared distance between probabilities and truth, summed over classes (Brier 1950)",
        _brier,
        higher_is_better=False,
    ),
    Metric("log_loss", "minus log probability of the right class, in nats", _log_loss, higher_is_better=False),
    Metric(
        "aurc",
        "area under the risk-coverage curve: mean error rate over all numbers of most confident answers kept "
        "(Geifman and El-Yaniv 2017)",
        _area_under_risk_coverage,
        higher_is_better=False,
    ),
)
"""The metrics of every classification task, where they apply."""
