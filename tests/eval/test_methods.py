"""Methods that need no further model: guessing, pixels, asking, and sparse attention vectors with its curves."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from eval_made import grey_split, grey_task, made_features
from support_sets import separable

from sav_jax import Example, SparseAttentionVectors, UserError
from sav_jax.classifier import CONFIDENCE_TEMPERATURE
from sav_jax.eval.methods import METHODS, Outcome, Settings
from sav_jax.eval.methods.sav import vote_scores
from sav_jax.eval.sweeps import sweep
from sav_jax.eval.tasks import TASKS, Data, Item, Task, split_task


@pytest.mark.filterwarnings("ignore:self.within_class_std_dev_ has at least 1 zero:UserWarning")  # white margins
def test_pixels_is_scikit_learns_nearest_centroid() -> None:
    from sklearn.neighbors import NearestCentroid

    task = TASKS["digits"]
    split = split_task(task, task.load(Path()), 20, 0)
    vectors = {
        part: np.stack([np.asarray(item.example.load_images()[0], np.float64).ravel() for item in items])
        for part, items in (("support", split.support), ("queries", split.queries))
    }
    model = NearestCentroid().fit(vectors["support"], [item.label for item in split.support])
    expected = model.predict(vectors["queries"])
    outcome = METHODS["pixels"].run(made_features(split, np.zeros((1797, 1, 4, 1), np.float32)))
    assert outcome.predictions == tuple(expected)


def test_pixels_of_several_sizes() -> None:
    sizes = [(100, 40), (20, 30), (64, 64), (500, 400)]
    items = tuple(
        Item(Example("?", (PIL.Image.new("RGB", size, colour),), label=colour, source=str(size), id=f"{size}{colour}"))
        for size in sizes
        for colour in ("black", "white")
    )
    split = split_task(Task("sizes", "", lambda _: Data(items)), Data(items), 2, 0)
    outcome = METHODS["pixels"].run(made_features(split))
    assert outcome.predictions == tuple(item.label for item in split.queries)
    texts = tuple(Item(Example(f"{i}{name}?", label=name, source=f"rows.jsonl:{i}")) for i in range(2) for name in "ab")
    split = split_task(Task("texts", "", lambda _: Data(texts)), Data(texts), 1, 0)
    with pytest.raises(UserError, match=r"rows.jsonl:.: method pixels needs one image per example, not 0"):
        METHODS["pixels"].run(made_features(split))


def test_chance() -> None:
    assert METHODS["chance"].run(made_features(grey_split())) == Outcome(None, accuracy=1 / 3)


def test_zero_shot_reads_what_the_model_wrote() -> None:
    split = grey_split()
    task = dataclasses.replace(grey_task(), answers={"dark": "black"})
    written = ["" for _ in split.support] + ["Black.", "it is bright", "middle", "no idea"] * 3
    outcome = METHODS["zero-shot"].run(made_features(split, task=task, texts=tuple(written)))
    assert outcome.predictions == ("dark", "bright", "middle", "") * 3
    assert outcome.texts == tuple(written[len(split.support) :])
    own = dataclasses.replace(task, parse=lambda text, item: item.label if text == "middle" else None)
    outcome = METHODS["zero-shot"].run(made_features(split, task=own, texts=tuple(written)))
    wanted = ["", "", split.queries[2].label, ""]
    assert outcome.predictions is not None
    assert list(outcome.predictions[:4]) == wanted


def test_zero_shot_likelihood_takes_the_likeliest_answer_that_is_offered() -> None:
    split = grey_split()
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((len(split.support) + len(split.queries), 3)).astype(np.float32)
    asked = scores[len(split.support) :]
    outcome = METHODS["zero-shot-likelihood"].run(made_features(split, scores=scores))
    assert outcome.predictions == tuple(split.labels[column] for column in asked.argmax(axis=1))
    assert outcome.scores is not None
    np.testing.assert_array_equal(outcome.scores, asked)
    queries = tuple(dataclasses.replace(item, offered=("dark", "middle")) for item in split.queries)
    outcome = METHODS["zero-shot-likelihood"].run(
        made_features(dataclasses.replace(split, queries=queries), scores=scores)
    )
    assert outcome.predictions == tuple(split.labels[1 + column] for column in asked[:, 1:].argmax(axis=1))


def test_sav_is_the_classifier() -> None:
    split = grey_split(shots=3)
    heads = separable([item.label for item in (*split.support, *split.queries)], 3, 4, 8)
    features = made_features(split, heads, settings=Settings(shots=3, num_heads=5))
    labels = [item.label for item in split.support]
    expected = SparseAttentionVectors.fit(heads[:9], labels, 5)
    outcome = METHODS["sav"].run(features)
    assert outcome.predictions == tuple(expected.predict(heads[9:]))
    assert outcome.classifier is not None
    assert outcome.classifier.heads == expected.heads
    assert outcome.scores is not None
    layer, head = np.array(expected.heads).T
    queries = heads[9:, layer, head].astype(np.float64)
    centroids = expected.centroids.astype(np.float64)
    norms = np.linalg.norm(queries, axis=-1)[..., None] * np.linalg.norm(centroids, axis=-1)
    cosines = np.einsum("qkh,kch->qkc", queries, centroids) / norms
    # float64 sums of a few terms of order ten
    np.testing.assert_allclose(outcome.scores, cosines.mean(1) / CONFIDENCE_TEMPERATURE, rtol=0, atol=1e-12)


def test_left_out_scores_are_those_of_centroids_without_the_example() -> None:
    split = grey_split(shots=3)
    heads = separable([item.label for item in (*split.support, *split.queries)], 2, 3, 8)
    labels = [item.label for item in split.support]
    classifier = SparseAttentionVectors.fit(heads[:9], labels, 4)
    targets = np.array([split.labels.index(label) for label in labels])
    left_out = vote_scores(classifier, heads[:9], targets)
    for row in range(9):
        rest = [i for i in range(9) if i != row]
        layer, head = np.array(classifier.heads).T
        of_class = [heads[[i for i in rest if labels[i] == name]][:, layer, head].mean(0) for name in split.labels]
        without = dataclasses.replace(classifier, centroids=np.stack(of_class, axis=1))
        # Centroids are float32: a relative 2^-24 of values of order ten.
        np.testing.assert_allclose(left_out[row], vote_scores(without, heads[row : row + 1])[0], rtol=0, atol=1e-5)


def test_a_lone_example_says_nothing_about_its_class() -> None:
    split = grey_split(shots=1)
    heads = separable([item.label for item in (*split.support, *split.queries)])
    classifier = SparseAttentionVectors.fit(heads[:3], [item.label for item in split.support], 4)
    targets = np.array([split.labels.index(item.label) for item in split.support])
    scores = vote_scores(classifier, heads[:3], targets)
    np.testing.assert_array_equal(scores[np.arange(3), targets], 0)


def test_curves_are_those_of_classifiers_fitted_for_each_point() -> None:
    split = grey_split(shots=2, per_class=30)
    heads = separable([item.label for item in (*split.support, *split.queries)], 4, 3, 4, seed=3)
    heads += np.random.default_rng(0).standard_normal(heads.shape).astype(np.float32)
    curves = sweep(made_features(split, heads), 5)
    labels, asked = [item.label for item in split.support], [item.label for item in split.queries]

    def accuracy(number: int, depth: int | None = None) -> float:
        classifier = SparseAttentionVectors.fit(heads[: len(labels)], labels, number, max_layer=depth)
        return float(np.mean([a == b for a, b in zip(classifier.predict(heads[len(labels) :]), asked, strict=True)]))

    assert curves.numbers == (1, 2, 5, 10, 12)
    assert curves.by_number == tuple(accuracy(number) for number in curves.numbers)
    assert len(set(curves.by_number)) > 1
    assert curves.depths == (1, 2, 3, 4)
    assert curves.by_depth == (accuracy(3, 1), *(accuracy(5, depth) for depth in (2, 3, 4)))


def test_impossible_numbers_of_heads() -> None:
    features = made_features(grey_split(), settings=Settings(num_heads=7))
    with pytest.raises(UserError, match="--num-heads is 7; there are 6 heads"):
        METHODS["sav"].run(features)
