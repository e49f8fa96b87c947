"""Common metrics against scikit-learn, and against their definitions written out."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sav_jax import Example
from sav_jax.eval.calibration import fit_temperature, probabilities
from sav_jax.eval.metrics import COMMON, Answers, Units, risk_coverage
from sav_jax.eval.tasks import Item

METRICS = {metric.name: metric for metric in COMMON}
# float64 sums of a few hundred terms of order one.
CLOSE = 1e-12


def answers_of(
    targets: np.ndarray, predicted: np.ndarray, shares: np.ndarray | None = None, classes: int = 3, **options: Any
) -> Answers:
    """Answers with class names "0", "1", ...; -1 is no answer."""
    labels = tuple(str(c) for c in range(classes))
    items = tuple(Item(Example("?", label=labels[t], id=str(i))) for i, t in enumerate(targets))
    given = tuple(labels[p] if p >= 0 else "" for p in predicted)
    return Answers(items, labels, given, probabilities=shares, **options)


def random_answers(seed: int = 0, count: int = 200, classes: int = 3, ties: bool = False) -> Answers:
    rng = np.random.default_rng(seed)
    targets = np.concatenate([np.arange(classes), rng.integers(0, classes, count - classes)])
    logits = rng.standard_normal((count, classes)) + 1.5 * np.eye(classes)[targets]
    if ties:
        logits = logits.round()
    return answers_of(targets, logits.argmax(1), probabilities(logits, 1.0), classes)


def value(name: str, answers: Answers) -> float:
    result = METRICS[name].compute(answers)
    assert result is not None
    return float(result.values.mean()) if isinstance(result, Units) else result


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("ties", [False, True])
def test_like_scikit_learn(classes: int, ties: bool) -> None:
    from sklearn import metrics

    answers = random_answers(1, classes=classes, ties=ties)
    targets, predicted, shares = answers.targets, answers.predicted, answers.probabilities
    assert shares is not None
    expected = {
        "acc": metrics.accuracy_score(targets, predicted),
        "macro_f1": metrics.f1_score(targets, predicted, average="macro"),
        "auroc": metrics.roc_auc_score(
            targets, shares[:, 1] if classes == 2 else shares, multi_class="ovr", average="macro"
        ),
        "log_loss": metrics.log_loss(targets, shares),
        "brier": float(((shares - np.eye(classes)[targets]) ** 2).sum(1).mean()),
    }
    for name, wanted in expected.items():
        np.testing.assert_allclose(value(name, answers), wanted, rtol=0, atol=CLOSE, err_msg=name)


def test_no_answer_is_a_wrong_answer() -> None:
    answers = answers_of(np.array([0, 1, 2, 0]), np.array([0, -1, 2, 1]))
    assert value("acc", answers) == 0.5
    # Class 0: TP 1, FN 1; class 1: FP 1, FN 1; class 2: TP 1.
    np.testing.assert_allclose(value("macro_f1", answers), (2 / 3 + 0 + 1) / 3, atol=CLOSE)
    for name in ("auroc", "ece", "brier", "log_loss", "aurc", "acc_offered"):
        assert METRICS[name].compute(answers) is None


def test_calibration_error_by_hand() -> None:
    shares = np.array([[0.95, 0.05], [0.9, 0.1], [0.65, 0.35], [0.5, 0.5]])
    answers = answers_of(np.array([0, 1, 0, 1]), np.array([0, 0, 0, 0]), shares, 2)
    # Bins of width 1/15: .95 alone; .9 alone; .65 alone; .5 alone.
    gaps = [abs(1 - 0.95), abs(0 - 0.9), abs(1 - 0.65), abs(0 - 0.5)]
    np.testing.assert_allclose(value("ece", answers), sum(gaps) / 4, atol=CLOSE)
    # Two answers of one bin make up for each other.
    shares = np.array([[0.91, 0.09], [0.92, 0.08]])
    answers = answers_of(np.array([0, 1]), np.array([0, 0]), shares, 2)
    np.testing.assert_allclose(value("ece", answers), abs((0.91 + 0.92) / 2 - 0.5), atol=CLOSE)


def test_confidence_is_that_of_the_prediction() -> None:
    """A majority vote may go to a class that is not the likeliest."""
    answers = answers_of(np.array([1]), np.array([1]), np.array([[0.6, 0.4]]), 2)
    np.testing.assert_allclose(value("ece", answers), 0.6, atol=CLOSE)


def test_risk_coverage_is_the_mean_over_all_orders_of_ties() -> None:
    sure = np.array([0.9, 0.7, 0.7, 0.7, 0.5])
    shares = np.stack([sure, 1 - sure], 1)
    right = np.array([True, False, True, False, True])
    answers = answers_of(np.where(right, 0, 1), np.zeros(5, int), shares, 2)
    risks = []
    for middle in itertools.permutations([1, 2, 3]):
        wrong = ~right[[0, *middle, 4]]
        risks.append(np.cumsum(wrong) / np.arange(1, 6))
    expected = np.mean(risks, axis=0)
    risk = risk_coverage(answers)
    assert risk is not None
    np.testing.assert_allclose(risk, expected, atol=CLOSE)
    np.testing.assert_allclose(value("aurc", answers), expected.mean(), atol=CLOSE)


def test_only_offered_classes_count() -> None:
    scores = np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    answers = answers_of(np.array([1, 2]), np.array([0, 0]), scores=scores)
    items = tuple(
        Item(item.example, offered=offered) for item, offered in zip(answers.items, [("1", "2"), ()], strict=True)
    )
    answers = Answers(items, answers.labels, answers.predictions, scores=scores)
    result = METRICS["acc_offered"].compute(answers)
    assert isinstance(result, Units)
    assert result.values.tolist() == [1, 0]


@given(st.randoms(use_true_random=False))
def test_order_does_not_matter(random: Any) -> None:
    answers = random_answers(2, 30, ties=True)
    order = list(range(30))
    random.shuffle(order)
    for name in METRICS:
        if METRICS[name].compute(answers) is not None:
            np.testing.assert_allclose(value(name, answers.take(np.array(order))), value(name, answers), atol=CLOSE)


def test_clusters_are_groups_or_queries() -> None:
    items = (Item(Example("?", label="0", id="a"), group="g"), Item(Example("?", label="0", id="b")))
    assert Answers(items, ("0", "1"), ("0", "1")).clusters == ("g", "b")
    assert Answers(items, ("0", "1"), ("0", "1"), names=("x", "y")).clusters == ("g", "y")


# Temperature


def smoothed_loss(temperature: float, scores: np.ndarray, targets: np.ndarray) -> float:
    """Cross-entropy, S / (S + 1) of it to the right class and the rest to all classes alike."""
    log_p = scores / temperature - np.log(np.exp(scores / temperature).sum(1, keepdims=True))
    share = 1 / (len(targets) + 1)
    right = log_p[np.arange(len(targets)), targets]
    return float(-((1 - share) * right + share * log_p.mean(1)).mean())


@pytest.mark.parametrize("temperature", [0.2, 1.0, 7.0])
def test_temperature_has_the_least_loss(temperature: float) -> None:
    rng = np.random.default_rng(0)
    logits = 2 * rng.standard_normal((4000, 4))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    targets = np.array([rng.choice(4, p=row) for row in p])
    found = fit_temperature(logits * temperature, targets)
    # The estimate's standard error is about 1 / sqrt(4000 * variance of the scores) < 3 % of it; four of them.
    assert abs(found / temperature - 1) < 0.12
    best = smoothed_loss(found, logits * temperature, targets)
    for other in found * np.array([0.5, 0.9, 0.99, 1.01, 1.1, 2]):
        assert best <= smoothed_loss(other, logits * temperature, targets)


def test_a_support_that_is_all_right_gives_no_certainty() -> None:
    """Two classes, every example right by the same margin m: p = (S + 1/2) / (S + 1), so T = m / log(2 S + 1)."""
    for size in (4, 40):
        targets = np.arange(size) % 2
        scores = 3.0 * np.eye(2)[targets]
        # found to a relative 1e-6 along log T
        assert fit_temperature(scores, targets) == pytest.approx(3 / np.log(2 * size + 1), rel=1e-5)


def test_temperature_leaves_out_lone_examples_and_has_bounds() -> None:
    scores = np.array([[2.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.5, 9.0]])
    assert fit_temperature(scores, np.array([0, 0, 1])) == fit_temperature(scores[:2], np.array([0, 0]))
    assert fit_temperature(-scores[:2], np.array([0, 0])) == pytest.approx(1e3, rel=1e-3), "wrong answers alone"
    assert fit_temperature(scores, np.array([0, 1, 2])) == 1.0
    assert fit_temperature(np.full((2, 3), -np.inf), np.array([0, 0])) == 1.0


def test_probabilities_allow_minus_infinity() -> None:
    shares = probabilities(np.array([[0.0, -np.inf, 0.0]]), 2.0)
    np.testing.assert_array_equal(shares, [[0.5, 0.0, 0.5]])


@pytest.mark.parametrize("name", ["auroc", "macro_f1", "ece"])
@pytest.mark.parametrize("classes", [2, 4])
def test_a_resample_is_computed_as_its_queries_are(name: str, classes: int) -> None:
    """Counted at once for all resamples, or one by one: as the metric of the drawn queries themselves."""
    answers = random_answers(4, count=12, classes=classes, ties=True)
    rng = np.random.default_rng(5)
    draws = rng.multinomial(12, np.full(12, 1 / 12), size=200)
    draws[0] = 0
    draws[0, 0] = 12  # of one class only
    found = METRICS[name].resampled(answers, draws)
    expected = [METRICS[name].compute(answers.take(np.repeat(np.arange(12), row))) for row in draws]
    numbers = np.array([np.nan if e is None else e for e in expected], np.float64)
    np.testing.assert_allclose(found, numbers, rtol=0, atol=CLOSE)
    assert np.isnan(found[0]) == (name == "auroc")


def test_what_has_no_probabilities_has_no_resampled_area() -> None:
    answers = answers_of(np.array([0, 1]), np.array([0, -1]), classes=2)
    assert np.isnan(METRICS["auroc"].resampled(answers, np.ones((3, 2), int))).all()
    # Right about the first of two: F1 of class 0 is 1, of class 1 0.
    np.testing.assert_allclose(METRICS["macro_f1"].resampled(answers, np.array([[1, 1], [2, 0]])), [0.5, 1.0])
