"""Sparse Attention Vectors against the paper's equations written as loops, and the laws they obey."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sav_jax import SparseAttentionVectors, UserError, _scoring, load_classifier
from sav_jax.classifier import choose_shots

# Two cosines closer than this may change places: 128 products and sums in float32 are off by some 1e-6.
MARGIN = 1e-5


Support = tuple[np.ndarray, list[str]]


# The reference: the equations of the paper, one example, head and class at a time, in float64


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norms) if norms else 0.0


def reference_centroids(
    heads: np.ndarray, labels: list[str], names: list[str], layer: int, head: int
) -> list[np.ndarray]:
    return [np.mean([heads[i, layer, head] for i in range(len(labels)) if labels[i] == name], axis=0) for name in names]


def reference_cosines(x: np.ndarray, centroids: list[np.ndarray | None]) -> list[float]:
    cosines = [-2.0 if centroid is None else cosine(x, centroid) for centroid in centroids]
    best, second = sorted(cosines, reverse=True)[:2]
    assume(best - second > MARGIN)
    return cosines


def reference_scores(heads: np.ndarray, labels: list[str], leave_one_out: bool) -> np.ndarray:
    heads = heads.astype(np.float64)
    names = sorted(set(labels))
    scores = np.zeros(heads.shape[1:3], int)
    for layer, head in np.ndindex(*scores.shape):
        for i, label in enumerate(labels):
            centroids: list[np.ndarray | None] = list(reference_centroids(heads, labels, names, layer, head))
            if leave_one_out:
                rest = [heads[j, layer, head] for j in range(len(labels)) if labels[j] == label and j != i]
                centroids[names.index(label)] = np.mean(rest, axis=0) if rest else None
            cosines = reference_cosines(heads[i, layer, head], centroids)
            scores[layer, head] += names[int(np.argmax(cosines))] == label
    return scores


def reference_selection(scores: np.ndarray, k: int) -> tuple[tuple[int, int], ...]:
    flat = sorted((-score, index) for index, score in enumerate(scores.ravel().tolist()))
    return tuple((index // scores.shape[1], index % scores.shape[1]) for _, index in flat[:k])


def reference_predictions(
    heads: np.ndarray, labels: list[str], queries: np.ndarray, k: int
) -> tuple[list[str], list[Counter]]:
    heads, queries = heads.astype(np.float64), queries.astype(np.float64)
    names = sorted(set(labels))
    selection = reference_selection(reference_scores(heads, labels, False), k)
    predictions, counters = [], []
    for query in queries:
        votes: Counter = Counter()
        for layer, head in selection:
            centroids: list[np.ndarray | None] = list(reference_centroids(heads, labels, names, layer, head))
            votes[names[int(np.argmax(reference_cosines(query[layer, head], centroids)))]] += 1
        predictions.append(votes.most_common()[0][0])  # as released: of equals, the one counted first
        counters.append(votes)
    return predictions, counters


# Support sets


@st.composite
def support(draw: Any, whole: bool = False) -> tuple[np.ndarray, list[str]]:
    """Heads [N, L, A, H] and labels; with ``whole`` small integers, whose sums are exact in any order."""
    classes = draw(st.sampled_from([2, 4]))
    extra = draw(st.integers(0, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    labels = [*range(classes), *rng.integers(classes, size=extra).tolist()]
    rng.shuffle(labels)
    shape = (2, 3, 4)  # few shapes: each is compiled anew
    centres = rng.standard_normal((classes, *shape))
    heads = centres[labels] + rng.standard_normal((len(labels), *shape))
    heads = np.round(heads * 20) if whole else heads
    return heads.astype(np.float32), [f"class {label}" for label in labels]


def separable(labels: list[str], layers: int = 2, per_layer: int = 3, width: int = 8, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    names = sorted(set(labels))
    centres = rng.standard_normal((len(names), layers, per_layer, width))
    noise = rng.standard_normal((len(labels), layers, per_layer, width))
    return (centres[[names.index(label) for label in labels]] + 0.7 * noise).astype(np.float32)


LABELS = ["ant", "bee", "cow"] * 5


# Against the reference


@given(support(), st.booleans())
def test_scores_are_the_papers(data: Support, leave_one_out: bool) -> None:
    heads, labels = data
    assume(not leave_one_out or max(Counter(labels).values()) > 1)
    expected = reference_scores(heads, labels, leave_one_out)
    sav = SparseAttentionVectors.fit(heads, labels, 1, leave_one_out=leave_one_out)
    np.testing.assert_array_equal(sav.scores, expected)
    assert sav.scores.dtype == np.int32


@given(support(), st.data())
def test_predictions_are_the_papers(data: Support, draw: Any) -> None:
    heads, labels = data
    k = draw.draw(st.integers(1, heads.shape[1] * heads.shape[2]))
    rng = np.random.default_rng(draw.draw(st.integers(0, 99)))
    queries = rng.standard_normal((5, *heads.shape[1:])).astype(np.float32)
    predictions, counters = reference_predictions(heads, labels, queries, k)
    sav = SparseAttentionVectors.fit(heads, labels, k)
    assert sav.heads == reference_selection(sav.scores, k)
    assert sav.predict(queries) == predictions
    votes = sav.votes(queries)
    assert [Counter(dict(zip(sav.labels, map(int, row), strict=True))) for row in votes] == counters
    np.testing.assert_array_equal(sav.predict_proba(queries), votes.astype(np.float32) / np.float32(k))


@given(support())
def test_confidence_is_the_mean_softmax(data: Support) -> None:
    heads, labels = data
    sav = SparseAttentionVectors.fit(heads, labels, 1 + heads.shape[1] * heads.shape[2] // 2, vote="confidence")
    expected = np.zeros((len(heads), len(sav.labels)))
    for i, (layer, head) in itertools.product(range(len(heads)), sav.heads):
        centroids = reference_centroids(heads.astype(np.float64), labels, list(sav.labels), layer, head)
        z = np.array([cosine(heads[i, layer, head].astype(np.float64), c) for c in centroids]) / sav.temperature
        expected[i] += np.exp(z - z.max()) / np.exp(z - z.max()).sum() / sav.num_heads
    probabilities = sav.predict_proba(heads)
    assert probabilities.dtype == np.float32
    # A cosine of 4 products is off by a few 2^-24; the temperature makes that ten times as much.
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    assert sav.predict(heads) == [sav.labels[i] for i in probabilities.argmax(axis=1)]
    assert (sav.votes(heads).sum(axis=1) == sav.num_heads).all()


# Laws


@given(support(whole=True), st.randoms(use_true_random=False), st.booleans())
def test_order_of_examples_does_not_matter(data: Support, random: Random, leave_one_out: bool) -> None:
    heads, labels = data
    assume(not leave_one_out or max(Counter(labels).values()) > 1)
    reference_scores(heads, labels, leave_one_out)  # only to skip sets in which two classes are equally near
    order = random.sample(range(len(labels)), len(labels))
    fit = SparseAttentionVectors.fit
    one = fit(heads, labels, 1, leave_one_out=leave_one_out)
    other = fit(heads[order], [labels[i] for i in order], 1, leave_one_out=leave_one_out)
    np.testing.assert_array_equal(one.scores, other.scores)
    np.testing.assert_array_equal(one.centroids, other.centroids)
    assert one.heads == other.heads
    assert [one.predict(heads)[i] for i in order] == other.predict(heads[order])


@given(support(), st.randoms(use_true_random=False))
def test_order_of_heads_permutes_the_scores(data: Support, random: Random) -> None:
    heads, labels = data
    reference_scores(heads, labels, False)
    n, layers, per_layer, width = heads.shape
    order = random.sample(range(layers * per_layer), layers * per_layer)
    permuted = heads.reshape(n, -1, width)[:, order].reshape(heads.shape)
    one = SparseAttentionVectors.fit(heads, labels, layers * per_layer)
    other = SparseAttentionVectors.fit(permuted, labels, layers * per_layer)
    np.testing.assert_array_equal(one.scores.ravel()[order], other.scores.ravel())
    np.testing.assert_array_equal(one.votes(heads), other.votes(permuted))


@given(support(), st.randoms(use_true_random=False))
def test_class_names_are_only_names(data: Support, random: Random) -> None:
    heads, labels = data
    reference_scores(heads, labels, False)
    names = sorted(set(labels))
    renamed = dict(zip(names, random.sample([f"name {i}" for i in range(9)], len(names)), strict=True))
    k = heads.shape[1] * heads.shape[2]
    one = SparseAttentionVectors.fit(heads, labels, k)
    other = SparseAttentionVectors.fit(heads, [renamed[label] for label in labels], k)
    assert one.heads == other.heads
    np.testing.assert_array_equal(one.scores, other.scores)
    assert [renamed[label] for label in one.predict(heads)] == other.predict(heads)
    columns = [other.labels.index(renamed[name]) for name in one.labels]
    np.testing.assert_array_equal(one.votes(heads), other.votes(heads)[:, columns])


@given(support(), st.integers(-40, 40), st.integers(0, 11))
def test_scaling_a_head_by_a_power_of_two_changes_nothing(data: Support, exponent: int, which: int) -> None:
    heads, labels = data
    layer, head = divmod(which % (heads.shape[1] * heads.shape[2]), heads.shape[2])
    scaled = heads.copy()
    scaled[:, layer, head] *= np.float32(2.0**exponent)
    k = heads.shape[1] * heads.shape[2]
    for vote in ("majority", "confidence"):
        one = SparseAttentionVectors.fit(heads, labels, k, vote=vote)
        other = SparseAttentionVectors.fit(scaled, labels, k, vote=vote)
        np.testing.assert_array_equal(one.scores, other.scores)
        np.testing.assert_array_equal(one.predict_proba(heads), other.predict_proba(scaled))
        assert one.predict(heads) == other.predict(scaled)


@given(support(), st.floats(1e-6, 1e6))
def test_scaling_a_head_changes_nothing(data: Support, factor: float) -> None:
    heads, labels = data
    reference_scores(heads, labels, False)
    one = SparseAttentionVectors.fit(heads, labels, 1)
    other = SparseAttentionVectors.fit(heads * np.float32(factor), labels, 1)
    np.testing.assert_array_equal(one.scores, other.scores)
    assert one.predict(heads) == other.predict(heads * np.float32(factor))


@given(support(whole=True))
def test_duplicating_every_example_changes_nothing(data: Support) -> None:
    heads, labels = data
    k = heads.shape[1] * heads.shape[2]
    reference_scores(heads, labels, False)
    one = SparseAttentionVectors.fit(heads, labels, k)
    other = SparseAttentionVectors.fit(np.concatenate([heads, heads]), labels * 2, k)
    np.testing.assert_array_equal(2 * one.scores, other.scores)
    np.testing.assert_array_equal(one.centroids, other.centroids)
    assert one.heads == other.heads
    assert one.predict(heads) == other.predict(heads)


# Many devices, blocks and chunks


def mesh_of(devices: int) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("data",))


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("examples", [3, 33])
def test_sharded_equals_unsharded(examples: int, leave_one_out: bool) -> None:
    assert jax.device_count() == 4
    labels = (["ant", "bee", "ant"] * examples)[:examples]
    heads = np.round(separable(labels) * 16)  # whole numbers: sums are exact in any order
    alone, *others = (
        SparseAttentionVectors.fit(heads, labels, 4, leave_one_out=leave_one_out, mesh=mesh)
        for mesh in (mesh_of(1), mesh_of(3), mesh_of(4), jax.make_mesh((2, 2), ("data", "model")), None)
    )
    for other in others:
        np.testing.assert_array_equal(alone.scores, other.scores)
        np.testing.assert_array_equal(alone.centroids, other.centroids)
        assert alone.heads == other.heads
    for mesh in (mesh_of(3), mesh_of(4), None):
        assert alone.predict(heads, mesh=mesh_of(1)) == alone.predict(heads, mesh=mesh)
        np.testing.assert_array_equal(alone.votes(heads, mesh=mesh_of(1)), alone.votes(heads, mesh=mesh))


def test_sharding_examples_really_splits_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = _scoring._class_sums

    def spy(heads: jax.Array, *rest: Any, **options: Any) -> jax.Array:
        seen.append(heads)
        return original(heads, *rest, **options)

    monkeypatch.setattr(_scoring, "_class_sums", spy)
    SparseAttentionVectors.fit(separable(LABELS), LABELS, 4)
    (heads,) = seen
    assert {shard.data.shape[0] for shard in heads.addressable_shards} == {len(heads) // 4}
    assert len({shard.device for shard in heads.addressable_shards}) == 4


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize(("block_bytes", "chunk_bytes"), [(1, 1), (500, 3000), (10**9, 1500)])
def test_blocks_and_chunks_change_nothing(
    monkeypatch: pytest.MonkeyPatch, block_bytes: int, chunk_bytes: int, leave_one_out: bool
) -> None:
    labels = LABELS * 3
    heads = np.round(separable(labels) * 16)
    whole = SparseAttentionVectors.fit(heads, labels, 4, leave_one_out=leave_one_out)
    predictions = whole.classify(heads)
    monkeypatch.setattr(_scoring, "_BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(_scoring, "_CHUNK_BYTES", chunk_bytes)
    cut = SparseAttentionVectors.fit(heads, labels, 4, leave_one_out=leave_one_out)
    np.testing.assert_array_equal(whole.scores, cut.scores)
    np.testing.assert_array_equal(whole.centroids, cut.centroids)
    for one, other in zip(predictions, cut.classify(heads), strict=True):
        np.testing.assert_array_equal(one, other)


def test_similarities_of_all_examples_never_exist_at_once() -> None:
    """10,000 examples x 784 heads x 1,000 classes would be 31 GB; what the compiler plans for a chunk is bounded."""
    examples, heads, classes, width = 10_000, 784, 1_000, 128
    mesh = mesh_of(1)
    block, size = _scoring._plan(examples, heads * width * 4, heads * max(classes, width), mesh)
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((size, heads, width), jnp.float32),
            ((size,), jnp.int32),
            ((heads, classes, width), jnp.float32),
            ((heads, classes, width), jnp.float32),
            ((classes,), jnp.int32),
        )
    ]
    count = _scoring._count_right.lower(*shapes, leave_one_out=True, block=block, mesh=mesh).compile()
    sums = _scoring._class_sums.lower(*shapes[:2], num_classes=classes, block=block, mesh=mesh).compile()
    class_sums = heads * classes * width * 4
    assert size * heads * width * 4 <= _scoring._CHUNK_BYTES
    for compiled in (count, sums):
        planned: Any = compiled.memory_analysis()
        assert planned.temp_size_in_bytes < 2 * class_sums + 8 * _scoring._BLOCK_BYTES


@pytest.mark.parametrize("dtype", [np.float16, np.float64, jnp.bfloat16])
def test_every_float_dtype_is_float32_inside(dtype: Any) -> None:
    heads = np.round(separable(LABELS) * 4)  # whole numbers below 256 are exact even in bfloat16
    expected = SparseAttentionVectors.fit(heads, LABELS, 4, leave_one_out=True)
    sav = SparseAttentionVectors.fit(heads.astype(dtype), LABELS, 4, leave_one_out=True)
    np.testing.assert_array_equal(sav.scores, expected.scores)
    np.testing.assert_array_equal(sav.centroids, expected.centroids)
    assert sav.centroids.dtype == np.float32
    assert sav.predict(jnp.asarray(heads.astype(dtype)) if dtype != np.float64 else heads) == expected.predict(heads)


def test_huge_and_tiny_vectors_do_not_overflow() -> None:
    heads = separable(LABELS)
    for factor in (2.0**100, 2.0**-100):
        sav = SparseAttentionVectors.fit(heads * np.float32(factor), LABELS, 4, leave_one_out=True)
        np.testing.assert_array_equal(
            sav.scores, SparseAttentionVectors.fit(heads, LABELS, 4, leave_one_out=True).scores
        )


# Ties and degenerate vectors


def directions(*angles: float) -> np.ndarray:
    """Unit vectors [N, 1, 1, 2] at the given degrees."""
    radians = np.deg2rad(np.array(angles, np.float64))
    return np.stack([np.cos(radians), np.sin(radians)], axis=-1).astype(np.float32)[:, None, None]


def test_vote_tie_goes_to_the_best_ranked_head() -> None:
    support_set = directions(0, 90, 180)
    labels = ["east", "north", "west"]
    heads = np.concatenate([support_set] * 4, axis=2)  # four equal heads: ranked by their number
    sav = SparseAttentionVectors.fit(heads, labels, 4)
    assert sav.heads == ((0, 0), (0, 1), (0, 2), (0, 3))
    # Votes: east 1, north 1, west 2 / north 2, west 2: the head ranked first decides.
    query = np.concatenate([directions(a) for a in (80, 10, 170, 190)], axis=2)
    assert sav.predict(query) == ["west"]
    for angles, expected in (
        ((80, 170, 190, 100), "north"),
        ((170, 80, 100, 190), "west"),
        ((10, 80, 170, 100), "north"),
    ):
        query = np.concatenate([directions(a) for a in angles], axis=2)
        assert sav.predict(query) == [expected]
    four_ways = np.concatenate([directions(a) for a in (170, 80, 10, 80)], axis=2)
    assert sav.votes(four_ways).tolist() == [[1, 2, 1]]
    assert sav.predict(four_ways) == ["north"]


def test_equal_scores_rank_by_layer_then_head() -> None:
    heads = np.tile(directions(0, 90, 10, 80), (1, 3, 4, 1))
    heads[:, 0, 0] = 1  # the one head that cannot tell the classes apart
    sav = SparseAttentionVectors.fit(heads, ["a", "b", "a", "b"], 6)
    assert sav.heads == ((0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2))


def test_zero_vectors_have_cosine_zero() -> None:
    heads = np.tile(directions(0, 180, 90), (1, 1, 2, 1))
    heads[:2, 0, 1] = 0  # class means of zero on head 1
    sav = SparseAttentionVectors.fit(heads, ["a", "b", "c"], 2, vote="confidence")
    probabilities = sav.predict_proba(np.zeros_like(heads))
    np.testing.assert_allclose(probabilities, 1 / 3, atol=1e-6)
    assert sav.predict(np.zeros_like(heads)) == ["a"] * 3  # equally near to all: the first class
    assert np.isfinite(sav.predict_proba(heads)).all()
    assert sav.scores.tolist() == [[3, 2]]  # zeros go to class a: right for example 0, wrong for 1


def test_alone_in_its_class_counts_as_wrong_when_left_out() -> None:
    heads = directions(0, 5, 90)
    labels = ["a", "a", "b"]
    assert SparseAttentionVectors.fit(heads, labels, 1).scores.tolist() == [[3]]
    sav = SparseAttentionVectors.fit(heads, labels, 1, leave_one_out=True)
    assert sav.scores.tolist() == [[2]]
    assert sav.predict(directions(88)) == ["b"]  # its centroid is kept all the same
    with pytest.raises(UserError, match="at least two examples"):
        SparseAttentionVectors.fit(directions(0, 90), ["a", "b"], 1, leave_one_out=True)


# Options


def test_max_layer_selects_only_below() -> None:
    heads = separable(LABELS, layers=4)
    sav = SparseAttentionVectors.fit(heads, LABELS, 5, max_layer=2)
    assert sav.num_layers <= 2
    np.testing.assert_array_equal(sav.scores, SparseAttentionVectors.fit(heads, LABELS, 5).scores)
    below = [pair for pair in SparseAttentionVectors.fit(heads, LABELS, 12).heads if pair[0] < 2]
    assert sav.heads == tuple(below[:5])


def test_queries_may_leave_out_layers_above_the_deepest_head() -> None:
    heads = separable(LABELS, layers=4)
    sav = SparseAttentionVectors.fit(heads, LABELS, 4, max_layer=2)
    assert sav.predict(heads[:, : sav.num_layers]) == sav.predict(heads)
    with pytest.raises(UserError, match=r"this classifier needs \[examples, "):
        sav.predict(heads[:, : sav.num_layers - 1])


def test_class_names_set_the_order_of_columns() -> None:
    heads = separable(LABELS)
    names = ["cow", "ant", "bee"]
    sav = SparseAttentionVectors.fit(heads, LABELS, 6, class_names=names)
    assert sav.labels == ("cow", "ant", "bee")
    by_name = SparseAttentionVectors.fit(heads, LABELS, 6)
    np.testing.assert_array_equal(sav.votes(heads), by_name.votes(heads)[:, [2, 0, 1]])


def test_shots_per_class_equals_fitting_on_the_draw() -> None:
    heads = separable(LABELS)
    sav = SparseAttentionVectors.fit(heads, LABELS, 3, shots_per_class=2, seed=5)
    chosen = choose_shots(LABELS, 2, 5)
    expected = SparseAttentionVectors.fit(heads[chosen], [LABELS[i] for i in chosen], 3)
    assert sav.support == (2, 2, 2)
    np.testing.assert_array_equal(sav.scores, expected.scores)
    np.testing.assert_array_equal(sav.centroids, expected.centroids)


@given(st.lists(st.sampled_from("abc"), min_size=1), st.integers(1, 6), st.integers(0, 9))
def test_draws_of_shots(labels: list[str], shots: int, seed: int) -> None:
    chosen = choose_shots(labels, shots, seed)
    assert chosen == sorted(set(chosen))
    counts = Counter(labels)
    assert Counter(labels[i] for i in chosen) == Counter({name: min(shots, counts[name]) for name in counts})
    assert set(chosen) <= set(choose_shots(labels, shots + 1, seed))
    # Another class beside them does not change a class's draw.
    more = [x for label in labels for x in (label, "other")]
    assert [i // 2 for i in choose_shots(more, shots, seed) if i % 2 == 0] == chosen


def test_draws_differ_by_seed() -> None:
    labels = ["a"] * 50
    assert len({tuple(choose_shots(labels, 5, seed)) for seed in range(10)}) > 5


def test_no_queries() -> None:
    heads = separable(LABELS)
    sav = SparseAttentionVectors.fit(heads, LABELS, 3)
    assert sav.predict(heads[:0]) == []
    assert sav.votes(heads[:0]).shape == sav.predict_proba(heads[:0]).shape == (0, 3)


# Bad input


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"labels": LABELS[:-1]}, "there are 14 labels for 15 examples"),
        ({"labels": ["ant"] * 15}, "at least two classes; all 15 examples are 'ant'"),
        ({"labels": [*LABELS[:-1], 3]}, "label of example 14 is 3; a string is expected"),
        ({"num_heads": 0}, "num_heads is 0; there are 6 heads"),
        ({"num_heads": 7}, "num_heads is 7; there are 6 heads"),
        ({"num_heads": 4, "max_layer": 1}, "num_heads is 4; there are 3 heads"),
        ({"max_layer": 3}, "max_layer is 3; the heads have 1 to 2 layers"),
        ({"max_layer": 0}, "max_layer is 0"),
        ({"vote": "most"}, "vote must be one of majority, confidence, not 'most'"),
        ({"shots_per_class": 0}, "at least 1, not 0"),
        ({"shots_per_class": 2, "seed": -1}, "seed must not be negative"),
        ({"class_names": ["ant", "bee"]}, "label 'cow' is not among class_names"),
        ({"class_names": ["ant", "bee", "cow", "dog"]}, "class 'dog' has no example"),
        ({"class_names": ["ant", "bee", "cow", "cow"]}, "holds a name twice"),
        ({"heads": np.zeros((15, 6, 8), np.float32)}, r"heads have shape \[15, 6, 8\]"),
        ({"heads": np.zeros((15, 2, 3, 8), np.int32)}, "heads have dtype int32"),
        ({"heads": np.zeros((0, 2, 3, 8), np.float32), "labels": []}, "at least two classes; there are no examples"),
    ],
)
def test_bad_input_is_one_clear_line(change: dict, expected: str) -> None:
    arguments = {"heads": separable(LABELS), "labels": LABELS, "num_heads": 2} | change
    with pytest.raises(UserError, match=expected):
        SparseAttentionVectors.fit(**arguments)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_vectors_that_are_not_finite_are_named(value: float, dtype: Any) -> None:
    labels = LABELS * 30  # 450 examples: more than are checked at a time
    heads = separable(labels).astype(dtype)
    sav = SparseAttentionVectors.fit(heads, labels, 6)
    heads[300, 1, 2, 5] = value
    for attempt in (lambda: SparseAttentionVectors.fit(heads, labels, 3), lambda: sav.predict(heads)):
        with pytest.raises(UserError, match="not finite: example 300, layer 1, head 2"):
            attempt()


def test_heads_of_another_model_are_refused() -> None:
    sav = SparseAttentionVectors.fit(separable(LABELS), LABELS, 3)
    for shape in ((1, 2, 4, 8), (1, 2, 3, 16), (1, 3, 3, 8)):
        with pytest.raises(UserError, match=r"heads have shape .*; this classifier needs"):
            sav.predict(np.zeros(shape, np.float32))


# On disk


def test_save_and_load(tmp_path: Path) -> None:
    heads = separable(LABELS)
    sav = SparseAttentionVectors.fit(
        heads,
        LABELS,
        4,
        vote="confidence",
        leave_one_out=True,
        shots_per_class=4,
        max_layer=2,
        seed=3,
        metadata={"a": 1},
    )
    sav.save(tmp_path / "deep/clf", metadata={"question": "Wörter?"})
    assert sorted(path.name for path in (tmp_path / "deep/clf").iterdir()) == [
        "classifier.json",
        "classifier.safetensors",
    ]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["clf"]
    loaded = load_classifier(tmp_path / "deep/clf")
    assert loaded.metadata == {"a": 1, "question": "Wörter?"}
    for name in (
        "heads",
        "labels",
        "support",
        "vote",
        "leave_one_out",
        "shots_per_class",
        "max_layer",
        "seed",
        "temperature",
    ):
        assert getattr(loaded, name) == getattr(sav, name), name
    np.testing.assert_array_equal(loaded.scores, sav.scores)
    np.testing.assert_array_equal(loaded.predict_proba(heads), sav.predict_proba(heads))
    assert loaded.predict(heads) == sav.predict(heads)


def test_equal_classifiers_give_equal_bytes_and_replace_each_other(tmp_path: Path) -> None:
    first, other = (SparseAttentionVectors.fit(separable(LABELS, seed=seed), LABELS, 4) for seed in (0, 1))
    first.save(tmp_path / "a")
    other.save(tmp_path / "b")
    first.save(tmp_path / "b")
    for name in ("classifier.json", "classifier.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert len(list((tmp_path / "b").iterdir())) == 2


def test_saving_where_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    sav = SparseAttentionVectors.fit(separable(LABELS), LABELS, 4)
    for path in (tmp_path / "taken", tmp_path / "taken/clf"):
        with pytest.raises(UserError, match="cannot be written"):
            sav.save(path)


def test_damaged_classifiers(tmp_path: Path) -> None:
    sav = SparseAttentionVectors.fit(separable(LABELS), LABELS, 4)

    def complaint(damage: Callable[[], object]) -> str:
        sav.save(tmp_path / "clf")
        damage()
        with pytest.raises(UserError) as caught:
            load_classifier(tmp_path / "clf")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    description, tensors = tmp_path / "clf/classifier.json", tmp_path / "clf/classifier.safetensors"

    def edit(**changes: Any) -> None:
        content = json.loads(description.read_text()) | changes
        description.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    assert "holds no classifier: classifier.json is missing" in complaint(description.unlink)
    assert "holds no classifier: classifier.safetensors is missing" in complaint(tensors.unlink)
    assert "classifier.json: damaged: " in complaint(lambda: description.write_text("{"))
    assert "classifier.json: damaged: " in complaint(lambda: description.write_bytes(b"\xff"))
    assert "not a classifier of sav_jax" in complaint(lambda: description.write_text("[]"))
    assert "not a classifier of sav_jax" in complaint(lambda: edit(format="other"))
    assert 'field "version" is 99' in complaint(lambda: edit(version=99))
    assert "field 'heads' is missing" in complaint(lambda: edit(heads=None))
    assert "do not fit together" in complaint(lambda: edit(heads=[[0, 0], [0, 1], [0, 2], [5, 0]]))
    assert "do not fit together" in complaint(lambda: edit(labels=["ant", "bee"]))
    assert "damaged: " in complaint(lambda: edit(heads=[1, 2, 3, 4]))
    assert "damaged, or not the file that" in complaint(lambda: tensors.write_bytes(tensors.read_bytes()[:-8]))
    with pytest.raises(UserError, match="holds no classifier"):
        load_classifier(tmp_path / "nowhere")
