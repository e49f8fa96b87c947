"""Methods that read head features, against scikit-learn or NumPy written from the equations, and their laws."""

from __future__ import annotations

import dataclasses
import tracemalloc
from typing import Any

import numpy as np
import PIL.Image
import pytest
from heads_made import NAMES, ON_HEADS, TextReader, drawn, features_of
from hypothesis import given, settings
from hypothesis import strategies as st

from sav_jax import SparseAttentionVectors
from sav_jax.eval.calibration import fit_temperature
from sav_jax.eval.features import Features, Heads
from sav_jax.eval.methods import METHODS, Outcome, hec, probes
from sav_jax.eval.methods._logistic import fit_logistic
from sav_jax.eval.methods.sav import vote_scores
from sav_jax.eval.tasks import Item
from sav_jax.examples import Example

# Scores are of order 1 to 100 and computed in float64 from float32 features: what is left is the rounding of float32
# products, of relative size 1e-7, where similarities of whole examples are used.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def answer(name: str, features: Features) -> tuple[Outcome, np.ndarray, np.ndarray]:
    """A method's outcome, its scores and its support's scores."""
    outcome = METHODS[name].run(features)
    assert outcome.predictions is not None
    assert outcome.scores is not None
    assert outcome.support_scores is not None
    assert outcome.scores.shape == (len(features.split.queries), len(features.split.labels))
    assert outcome.support_scores.shape == (len(features.split.support), len(features.split.labels))
    return outcome, outcome.scores, outcome.support_scores


def made(
    classes: int = 3, shots: int = 5, queries: int = 40, **options: Any
) -> tuple[Features, np.ndarray, np.ndarray]:
    """Features, the heads of the support [S, M, H] and those of the queries [Q, M, H]."""
    heads, of_row, texts = drawn(classes, shots, queries, **options)
    number = classes * shots
    flat = heads.reshape(len(heads), -1, heads.shape[-1]).astype(np.float64)
    return features_of(heads, of_row, number, texts), flat[:number], flat[number:]


def lengths_one(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# HEC


def hec_v(support: np.ndarray, targets: np.ndarray, queries: np.ndarray, classes: int) -> np.ndarray:
    """Probabilities of every head, [R, M, C], from the equations: an explicit pseudo-inverse and explicit distances."""
    x, q = lengths_one(support), lengths_one(queries)
    size, width = len(x), x.shape[2]
    out = np.empty((len(q), x.shape[1], classes))
    for m in range(x.shape[1]):
        present = [c for c in range(classes) if (targets == c).any()]
        means = {c: x[targets == c, m].mean(axis=0) for c in present}
        centred = np.stack([x[i, m] - means[targets[i]] for i in range(size)])
        covariance = centred.T @ centred / (size - 1)
        inverse = width * np.linalg.pinv((size - 1) * covariance + np.trace(covariance) * np.eye(width))
        logits = np.full((len(q), classes), -np.inf)
        for c in present:
            difference = q[:, m] - means[c]
            distance = np.einsum("rd,de,re->r", difference, inverse, difference)
            logits[:, c] = -0.5 * distance + np.log((targets == c).mean())
        powers = np.exp((logits - logits.max(axis=1, keepdims=True)) / 10)
        out[:, m] = powers / powers.sum(axis=1, keepdims=True)
    return out


@pytest.mark.parametrize("classes", [2, 4])
def test_hec_is_the_published_equations(classes: int) -> None:
    features, support, queries = made(classes)
    targets = features.targets
    _, scores, left_out = answer("hec", features)
    rank = hec_v(support, targets, support, classes)[np.arange(len(targets)), :, targets].mean(axis=0)
    chosen = np.argsort(-rank)[:3]
    expected = np.log(hec_v(support[:, chosen], targets, queries[:, chosen], classes).mean(axis=1))
    np.testing.assert_allclose(scores, expected, **CLOSE)
    # The closed form is what is left after leaving each example out and fitting again.
    for i in range(len(targets)):
        rest = np.arange(len(targets)) != i
        refitted = hec_v(support[rest][:, chosen], targets[rest], support[[i]][:, chosen], classes)
        np.testing.assert_allclose(left_out[i], np.log(refitted.mean(axis=1))[0], **CLOSE)
    model = hec.fit_vision(features.heads[0], targets, classes, 3)
    np.testing.assert_array_equal(model.heads, chosen)
    np.testing.assert_allclose(model.scores, rank, **CLOSE)


def test_hec_is_a_linear_discriminant_analysis() -> None:
    """On one head: scikit-learn's, given the covariance, with the temperature of the release."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    features, support, queries = made(4, shape=(1, 1, 6))
    features = dataclass_settings(features, num_heads=1)
    x, q, size, width = lengths_one(support[:, 0]), lengths_one(queries[:, 0]), len(support), 6

    class Regularised:
        """Of one class: what adds up to (S + tr(S) / (N - 1) I) / N."""

        def fit(self, vectors: np.ndarray) -> Regularised:
            centred = vectors - vectors.mean(axis=0)
            own = centred.T @ centred / len(vectors)
            self.covariance_ = own + np.trace(own) / (size - 1) * np.eye(width)
            return self

    model = LinearDiscriminantAnalysis(solver="lsqr", covariance_estimator=Regularised()).fit(x, features.targets)
    prior = np.log(1 / 4)
    logits = (width / size * (model.decision_function(q) - prior) + prior) / 10
    _, scores, _ = answer("hec", features)
    np.testing.assert_allclose(scores, logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)), **CLOSE)


def dataclass_settings(features: Features, **options: Any) -> Features:
    features.settings = dataclasses.replace(features.settings, **options)
    return features


@pytest.mark.parametrize(("shots", "width"), [(1, 8), (2, 8), (2, 2), (12, 2)])
def test_hec_with_few_and_with_many_examples(shots: int, width: int) -> None:
    """Fewer examples than dimensions, more, and one per class: a covariance of nothing."""
    features, support, queries = made(2, shots, shape=(3, 2, width))
    targets = features.targets
    outcome, scores, left_out = answer("hec", features)
    assert np.isfinite(scores).all()
    heads = hec.fit_vision(features.heads[0], targets, 2, 3).heads
    if shots > 1:
        expected = hec_v(support[:, heads], targets, queries[:, heads], 2).mean(axis=1)
        np.testing.assert_allclose(scores, np.log(expected), **CLOSE)
        for i in range(len(targets)):
            rest = np.arange(len(targets)) != i
            refitted = hec_v(support[rest][:, heads], targets[rest], support[[i]][:, heads], 2).mean(axis=1)[0]
            np.testing.assert_allclose(left_out[i], np.log(refitted), **CLOSE)
    else:  # the nearest of the two examples, by distance
        x, q = lengths_one(support[:, heads]), lengths_one(queries[:, heads])
        logits = -0.5 * width * ((q[:, :, None] - x.swapaxes(0, 1)) ** 2).sum(axis=3) / 10
        z = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
        np.testing.assert_allclose(scores, np.log(z.mean(axis=1)), **CLOSE)
        assert (left_out[np.arange(2), targets] == -np.inf).all()
        assert fit_temperature(left_out, targets) == 1.0
    assert len(set(outcome.predictions or ())) == 2


def test_hec_of_equal_examples_in_a_class() -> None:
    """Left out, one of two examples of the only class that varies leaves no scatter at all."""
    heads, of_row, _ = drawn(2, 3, 5)
    heads[[0, 2]] = heads[4]  # class 0 does not vary
    kept = [0, 2, 1, 3, *range(6, 16)]
    features = features_of(heads[kept], [of_row[i] for i in kept], 4)
    _, scores, left_out = answer("hec", features)
    assert np.isfinite(scores).all()
    assert np.isfinite(left_out).all()
    assert (left_out.argmax(axis=1) == features.targets).mean() >= 0.5


def hec_t(x: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Probabilities of every head, [R, M, C]."""
    logits = -0.5 * ((lengths_one(x)[:, :, None] - lengths_one(texts).swapaxes(0, 1)) ** 2).sum(axis=3)
    return np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)


def text_vectors(features: Features) -> np.ndarray:
    """[C, M, H]."""
    reader = features.reader
    assert isinstance(reader, TextReader)
    texts = np.stack([reader.table[f"a photo of a {name}.\nWhat?"] for name in features.split.labels])
    return texts.reshape(len(texts), -1, texts.shape[-1]).astype(np.float64)


def test_hec_text_is_the_published_equations() -> None:
    features, support, queries = made(4)
    texts, targets = text_vectors(features), features.targets
    outcome, scores, of_support = answer("hec-text", features)
    rank = hec_t(support, texts)[np.arange(len(targets)), :, targets].mean(axis=0)
    chosen = np.argsort(-rank)[:3]
    assert outcome.facts["heads"] == [[m // 2, m % 2] for m in chosen]
    for found, x in ((scores, queries), (of_support, support)):
        np.testing.assert_allclose(found, np.log(hec_t(x, texts)[:, chosen].mean(axis=1)), **CLOSE)


def test_class_texts_end_with_the_question_that_all_share() -> None:
    features = features_of(*drawn(2, 2, 1)[:2], 4)
    features.task = dataclasses.replace(features.task, class_prompt="one {label} here")

    def texts(questions: tuple[str, ...]) -> list[str]:
        picture = PIL.Image.new("RGB", (2, 2))
        support = tuple(
            Item(Example(question, (picture,), label=name))
            for question, name in zip(questions, ("ant", "bee", "ant", "bee"), strict=True)
        )
        features.split = dataclasses.replace(features.split, support=support)
        return hec.class_texts(features)

    assert texts(("<image>\nWhat?",) * 4) == ["one ant here\nWhat?", "one bee here\nWhat?"]
    assert texts(("Is it A?", "Is it A?", "Is it B?", "Is it B?")) == ["one ant here", "one bee here"]


def test_hec_both_adds_probabilities() -> None:
    features, _, _ = made(4)
    (_, vision, vision_left), (_, text, text_support) = (answer(name, features) for name in ("hec", "hec-text"))
    outcome, scores, left_out = answer("hec-both", features)
    alpha = outcome.facts["alpha"]
    assert alpha in (0.1, 10.0)
    np.testing.assert_allclose(np.exp(scores), (np.exp(text) + alpha * np.exp(vision)) / (1 + alpha), **CLOSE)
    np.testing.assert_allclose(
        np.exp(left_out), (np.exp(text_support) + alpha * np.exp(vision_left)) / (1 + alpha), **CLOSE
    )


def test_alpha_follows_what_classifies_left_out_examples_right() -> None:
    targets = np.arange(4)
    good, bad = (np.log(np.full((4, 4), 0.1) + 0.6 * np.eye(4)[order]) for order in ([0, 1, 2, 3], [1, 2, 3, 0]))
    assert hec.choose_alpha(good, bad, targets) == 0.1
    assert hec.choose_alpha(bad, good, targets) == 10.0
    assert hec.choose_alpha(good, np.full((4, 4), -np.inf), targets) == 1.0


# Nearest centroids


@pytest.mark.parametrize("name", ["centroid-last-layer", "centroid-all-layers", "centroid-all-heads"])
def test_centroids_are_scikit_learns(name: str) -> None:
    from sklearn.metrics.pairwise import cosine_similarity
    from sklearn.neighbors import NearestCentroid

    features, support, queries = made(4, noise=1.5)
    groups = {
        "centroid-last-layer": [[4, 5]],
        "centroid-all-layers": [[0, 1], [2, 3], [4, 5]],
        "centroid-all-heads": [[m] for m in range(6)],
    }[name]
    targets, cosines, votes = features.targets, [], []
    for group in groups:
        x, q = (part[:, group].reshape(len(part), -1) for part in (support, queries))
        centroids = np.stack([x[targets == c].mean(axis=0) for c in range(4)])
        cosines.append(cosine_similarity(q, centroids))
        # On the unit sphere the nearest by distance is the nearest by cosine.
        votes.append(
            NearestCentroid()
            .fit(
                np.repeat(lengths_one(centroids), 2, axis=0) + 1e-9 * np.tile([[-1], [1]], (4, 1)),
                np.repeat(np.arange(4), 2),
            )
            .predict(lengths_one(q))
        )
    outcome, scores, _ = answer(name, features)
    np.testing.assert_allclose(scores, np.mean(cosines, axis=0) / 0.1, **CLOSE)
    counts = (np.array(votes)[:, :, None] == np.arange(4)).sum(axis=0)
    predicted = np.array([features.split.labels.index(label) for label in outcome.predictions or ()])
    assert (counts[np.arange(len(counts)), predicted] == counts.max(axis=1)).all()
    clear = (counts == counts.max(axis=1, keepdims=True)).sum(axis=1) == 1
    assert clear.sum() > len(counts) / 2
    assert outcome.classifier is None


def test_all_heads_is_sav_without_a_choice() -> None:
    features, _, _ = made(4, noise=1.5)
    every, _, _ = answer("centroid-all-heads", features)
    sav, _, _ = answer("sav", dataclass_settings(features, num_heads=6))
    assert every.predictions == sav.predictions


@pytest.mark.parametrize("name", ["sav", "centroid-last-layer", "centroid-all-layers", "centroid-all-heads"])
@pytest.mark.parametrize("shots", [1, 2, 5])
def test_left_out_votes_are_those_of_refitted_centroids(name: str, shots: int) -> None:
    features, support, _ = made(4, shots)
    targets = features.targets
    _, _, left_out = answer(name, features)
    if name == "sav":
        classifier = SparseAttentionVectors.fit(
            features.heads[0].whole(), [item.label for item in features.split.support], 3, class_names=NAMES
        )
        groups = [[2 * layer + head] for layer, head in classifier.heads]
        np.testing.assert_array_equal(vote_scores(classifier, features.heads[0].whole(), targets), left_out)
    else:
        groups = {
            "centroid-last-layer": [[4, 5]],
            "centroid-all-layers": [[0, 1], [2, 3], [4, 5]],
            "centroid-all-heads": [[m] for m in range(6)],
        }[name]
    for i in range(len(targets)):
        rest = np.arange(len(targets)) != i
        cosines = np.zeros(4)
        for group in groups:
            x = support[:, group].reshape(len(support), -1)
            for c in range(4):
                if (targets[rest] == c).any():
                    cosines[c] += lengths_one(x[rest][targets[rest] == c].mean(axis=0)) @ lengths_one(x[i])
        np.testing.assert_allclose(left_out[i], cosines / len(groups) / 0.1, **CLOSE)


# Neighbours and probes


def concatenated(x: np.ndarray) -> np.ndarray:
    """All heads, each of length 1: of length 1 together."""
    return lengths_one(x).reshape(len(x), -1) / np.sqrt(x.shape[1])


@pytest.mark.parametrize("shots", [1, 2, 6])
def test_knn_is_scikit_learns(shots: int) -> None:
    from sklearn.neighbors import KNeighborsClassifier

    features, support, queries = made(3, shots, noise=2.0)
    x, q, targets = concatenated(support), concatenated(queries), features.targets

    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances**2 / 2) / 0.07)

    def smoothed(model: Any, vectors: np.ndarray, number: int) -> np.ndarray:
        share = np.zeros((len(vectors), 3))
        share[:, model.classes_] = model.predict_proba(vectors)
        return np.log((number * share + 1) / (number + 3))

    tried = {}
    for number in (1, 3, 5, 9, 15, 25):
        if number >= len(x):
            break
        left_out = np.empty((len(x), 3))
        for i in range(len(x)):
            rest = np.arange(len(x)) != i
            model = KNeighborsClassifier(number, weights=weights, algorithm="brute").fit(x[rest], targets[rest])
            left_out[i] = smoothed(model, x[[i]], number)[0]
        tried[number] = (left_out.argmax(axis=1) == targets).sum(), left_out[np.arange(len(x)), targets].sum(), left_out
    best = max(tried, key=lambda number: tried[number][:2])
    outcome, scores, left_out = answer("knn", features)
    assert outcome.facts == {"neighbours": best}
    np.testing.assert_allclose(left_out, tried[best][2], **CLOSE)
    model = KNeighborsClassifier(best, weights=weights, algorithm="brute").fit(x, targets)
    np.testing.assert_allclose(scores, smoothed(model, q, best), **CLOSE)


@pytest.mark.parametrize(("classes", "shots", "noise"), [(2, 4, 1.0), (4, 5, 1.0), (4, 10, 4.0), (3, 1, 1.0)])
def test_ridge_is_scikit_learns(classes: int, shots: int, noise: float) -> None:
    from sklearn.linear_model import Ridge, RidgeClassifierCV

    features, support, queries = made(classes, shots, noise=noise)
    x, q, targets = concatenated(support), concatenated(queries), features.targets
    outcome, scores, left_out = answer("ridge", features)
    alpha = outcome.facts["alpha"]
    model = RidgeClassifierCV(alphas=probes.RIDGE_PENALTIES).fit(x, targets)
    assert model.alpha_ == alpha
    expected = model.decision_function(q)
    if classes == 2:
        expected = np.stack([-expected, expected], axis=1)
    np.testing.assert_allclose(scores, expected, **CLOSE)
    wanted = 2.0 * (targets[:, None] == np.arange(classes)) - 1
    for i in range(len(x)):
        rest = np.arange(len(x)) != i
        refitted = Ridge(alpha=alpha).fit(x[rest], wanted[rest]).predict(x[[i]])[0]
        np.testing.assert_allclose(left_out[i], refitted, **CLOSE)


@pytest.mark.parametrize(("classes", "shots"), [(2, 4), (4, 5)])
def test_logistic_on_the_rotation_is_logistic_on_the_features(classes: int, shots: int) -> None:
    from sklearn.linear_model import LogisticRegression

    features, support, queries = made(classes, shots, noise=2.0)
    x, q, targets = concatenated(support), concatenated(queries), features.targets
    outcome, scores, held_out = answer("logistic", features)
    gram = x @ x.T
    folds = probes.assign_folds(gram.sum(axis=1), targets, classes)
    np.testing.assert_array_equal(np.bincount(folds), np.full(min(5, shots), len(x) // min(5, shots)))

    def fitted(strength: float, rows: np.ndarray) -> Any:
        return LogisticRegression(C=strength, solver="newton-cholesky", tol=1e-10).fit(x[rows], targets[rows])

    tried = {}
    for strength in probes.LOGISTIC_STRENGTHS:
        tried[strength] = np.empty((len(x), classes))
        for fold in range(folds.max() + 1):
            tried[strength][folds == fold] = fitted(strength, folds != fold).predict_log_proba(x[folds == fold])
    own = {strength: scores[np.arange(len(x)), targets].mean() for strength, scores in tried.items()}
    best = max(own, key=lambda strength: own[strength])
    assert outcome.facts == {"C": best}
    np.testing.assert_allclose(scores, fitted(best, np.ones(len(x), bool)).predict_log_proba(q), **CLOSE)
    np.testing.assert_allclose(held_out, tried[best], **CLOSE)


@pytest.mark.parametrize(("classes", "noise"), [(2, 1.0), (3, 0.2), (6, 2.0)])
def test_the_logistic_solver_is_scikit_learns_whatever_the_penalty(classes: int, noise: float) -> None:
    """Unequal classes, few and many features, separable or not; several fits at once, each from the last penalty's."""
    from scipy.special import log_softmax
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(classes)
    targets = np.repeat(np.arange(classes), rng.integers(5, 25, classes))
    x = rng.standard_normal((classes, 40))[targets] + noise * rng.standard_normal((len(targets), 40))
    x = lengths_one(x)
    gram = x @ x.T
    folds = probes.assign_folds(gram.sum(axis=1), targets, classes)
    rotation = probes.Rotation.of(gram)
    assert rotation.support.shape[1] == min(len(x) - 1, 40)
    wanted = (targets[:, None] == np.arange(classes)).astype(np.float64)
    used = np.stack([folds != 0, folds != 1, folds >= 0], axis=1).astype(np.float64)
    weights = np.zeros((rotation.support.shape[1] + 1, 3, classes))
    for strength in probes.LOGISTIC_STRENGTHS:
        weights, logits = fit_logistic(rotation.support, rotation.values, wanted, used, strength, weights)
        for fit in range(3):
            rows = used[:, fit] == 1
            model = LogisticRegression(C=strength, solver="newton-cholesky", tol=1e-10).fit(x[rows], targets[rows])
            expected = model.predict_log_proba(x)
            # Everything is float64 here, and the solver stops when no logit moves by more than 1e-7.
            np.testing.assert_allclose(log_softmax(logits[:, fit], axis=1), expected, rtol=1e-6, atol=1e-6)
            own = rotation.rotate(x @ x.T) @ weights[:-1, fit] + weights[-1, fit]
            np.testing.assert_allclose(log_softmax(own, axis=1), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("classes", [2, 5])
def test_the_logistic_probe_makes_nothing_of_the_size_of_the_rotation(classes: int) -> None:
    rng = np.random.default_rng(0)
    targets = np.arange(600) % classes
    x = lengths_one(rng.standard_normal((classes, 700))[targets] + 4 * rng.standard_normal((600, 700)))
    gram = x @ x.T
    folds = probes.assign_folds(gram.sum(axis=1), targets, classes)
    rotation = probes.Rotation.of(gram)
    tracemalloc.start()
    probes.cross_validated(rotation.support, rotation.values, targets, classes, folds)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Some twenty arrays of 600 x 6 fits x 5 classes, which grow with the examples and not with their square.
    assert peak < 25 * 600 * 6 * classes * 8 + 2**20
    assert classes > 2 or peak < rotation.support.nbytes


def test_folds_one_by_one_are_as_folds_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    features, _, _ = made(4, 5, noise=2.0)
    outcome, scores, held_out = answer("logistic", features)
    monkeypatch.setattr(probes, "_AT_ONCE", 2 * held_out.size)  # two, two, and the last one
    again, *arrays = answer("logistic", features)
    assert again.facts == outcome.facts
    for one, other in zip((scores, held_out), arrays, strict=True):
        # The solver stops when no logit moves by more than 1e-7; where it stands then depends on the last bits.
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


def test_logistic_on_one_example_per_class_has_nothing_to_leave_out() -> None:
    features, _, _ = made(3, 1)
    outcome = METHODS["logistic"].run(features)
    assert outcome.facts == {"C": 1.0}
    assert outcome.support_scores is None
    assert outcome.scores is not None
    assert np.isfinite(outcome.scores).all()


@pytest.mark.parametrize("name", ON_HEADS)
def test_features_without_information_are_no_error(name: str) -> None:
    """All examples equal, and one head dead."""
    heads, of_row, texts = drawn(3, 4, 2)
    heads[:] = heads[0]
    heads[:, 1, 1] = 0
    texts[:, 1, 1] = 0
    _, scores, left_out = answer(name, features_of(heads, of_row, 12, texts))
    assert np.isfinite(scores).all()
    assert np.isfinite(left_out).all()
    if name not in ("hec-text", "hec-both"):  # their texts differ
        # Products of equal rows may be summed in another order, no more: the bound is that of the float32 products.
        np.testing.assert_allclose(scores, scores[:, :1].repeat(3, axis=1), **CLOSE)


# Laws


@pytest.mark.parametrize("name", ON_HEADS)
@settings(max_examples=6)
@given(
    seed=st.integers(0, 10),
    classes=st.permutations(range(3)),
    rows=st.permutations(range(12)),
    queries=st.permutations(range(6)),
    per_layer=st.permutations(range(2)),
    layers=st.permutations(range(3)),
)
def test_renaming_and_reordering_change_nothing(
    name: str,
    seed: int,
    classes: list[int],
    rows: list[int],
    queries: list[int],
    per_layer: list[int],
    layers: list[int],
) -> None:
    """Scores follow the permutation of classes, examples and heads."""
    heads, of_row, texts = drawn(3, 4, 2, seed=seed)
    # Integer head scores tie, and then the first head wins: sav is left its order of heads, the last layer its place.
    if name == "sav":
        per_layer = [0, 1]
    if name in ("sav", "centroid-last-layer"):
        layers = [0, 1, 2]
    _, scores, left_out = answer(name, features_of(heads, of_row, 12, texts))
    order = [*rows, *(12 + query for query in queries)]
    place = np.argsort(classes)  # class c becomes column place[c]
    permuted = heads[order][:, layers][:, :, per_layer]
    renamed = [int(place[of_row[row]]) for row in order]
    other = features_of(
        np.ascontiguousarray(permuted),
        renamed,
        12,
        np.ascontiguousarray(texts[classes][:, layers][:, :, per_layer]),
        names=[NAMES[c] for c in classes],
    )
    _, permuted_scores, permuted_left_out = answer(name, other)
    # Another order of heads and examples is another order of float32 sums. A cosine of one head or one layer, a sum of
    # 8 or 16 products, is then off by 16 * 2**-24 = 1e-6 at most, as a rule by 1e-7; temperatures of 0.1 and 0.07 make
    # that 1e-6, a tenth of the bound (7e-7 was measured over all seeds). What ranks heads or examples is float64 or,
    # for sav, whole numbers, so that nothing jumps.
    np.testing.assert_allclose(permuted_scores, scores[queries][:, classes], **CLOSE)
    np.testing.assert_allclose(permuted_left_out, left_out[rows][:, classes], **CLOSE)


@pytest.mark.parametrize("name", ON_HEADS)
def test_rows_need_not_be_in_order(name: str) -> None:
    """Support and queries are rows anywhere in one array, and are taken in blocks."""
    heads, of_row, texts = drawn(3, 4, 60)
    plain = features_of(heads, of_row, 12, texts)
    mixed = features_of(heads, of_row, 12, texts)
    order = np.random.default_rng(0).permutation(len(heads))
    array = np.ascontiguousarray(heads[np.argsort(order)])
    mixed.heads = Heads(array, order[:12]), Heads(array, order[12:])
    for one, other in zip(answer(name, plain)[1:], answer(name, mixed)[1:], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_consecutive_rows_are_not_copied() -> None:
    array = np.arange(24, dtype=np.float32).reshape(6, 2, 2, 1)
    assert np.shares_memory(Heads(array, np.array([2, 3, 4])).whole(), array)
    for rows in ([2, 3, 4], [2, 4, 3], [5], [0, 2]):
        np.testing.assert_array_equal(Heads(array, np.array(rows)).whole(), array[rows])
