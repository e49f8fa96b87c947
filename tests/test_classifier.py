"""Sparse Attention Vectors against the paper's equations written as loops, and the laws they obey."""

from __future__ import annotations

import itertools
from collections import Counter
from random import Random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support_sets import LABELS, separable

from sav_jax import SparseAttentionVectors, _scoring
from sav_jax.models.aligned import aligned_zeros

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


# Against the reference


@given(support(), st.booleans())
def test_scores_are_the_papers(data: Support, leave_one_out: bool) -> None:
    heads, labels = data
    assume(not leave_one_out or max(Counter(labels).values()) > 1)
    expected = reference_scores(heads, labels, leave_one_out)
    sav = SparseAttentionVectors.fit(heads, labels, 1, leave_one_out=leave_one_out)
    np.testing.assert_array_equal(sav.scores, expected)
    assert sav.scores.dtype == np.int32


@given(support(), st.integers(0, 2**32 - 1))
def test_a_head_that_hardly_varies_is_not_chosen_for_what_it_leaves_out(data: Support, seed: int) -> None:
    """Without an example its class is further from it than others are. Where that is less than float32 resolves,
    rounding would decide, and a head that knows nothing could come first.
    """
    heads, labels = data
    assume(min(Counter(labels).values()) > 1)
    rng = np.random.default_rng(seed)
    still = rng.standard_normal(4)[None] * (1 + 1e-8 * rng.standard_normal((len(labels), 4)))
    heads[:, 0, 1] = still.astype(np.float32)
    assert SparseAttentionVectors.fit(heads, labels, 1, leave_one_out=True).scores[0, 1] == 0


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
    assert jax.device_count() == 8
    labels = (["ant", "bee", "ant"] * examples)[:examples]
    heads = np.round(separable(labels) * 16)  # whole numbers: sums are exact in any order
    alone, *others = (
        SparseAttentionVectors.fit(heads, labels, 4, leave_one_out=leave_one_out, mesh=mesh)
        for mesh in (mesh_of(1), mesh_of(3), mesh_of(8), jax.make_mesh((2, 4), ("data", "model")), None)
    )
    for other in others:
        np.testing.assert_array_equal(alone.scores, other.scores)
        np.testing.assert_array_equal(alone.centroids, other.centroids)
        assert alone.heads == other.heads
    for mesh in (mesh_of(3), mesh_of(8), None):
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
    assert {shard.data.shape[0] for shard in heads.addressable_shards} == {len(heads) // 8}
    assert len({shard.device for shard in heads.addressable_shards}) == 8


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
    block, size = _scoring._plan(examples, heads * width * 4, max(classes, width), mesh)
    group = _scoring._group(block, heads, max(classes, width))
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
    how: dict[str, Any] = {"leave_one_out": True, "block": block, "group": group, "mesh": mesh}
    count = _scoring._count_right.lower(*shapes, scaled=True, **how).compile()
    sums = _scoring._class_sums.lower(*shapes[:2], num_classes=classes, mesh=mesh).compile()
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


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_huge_and_tiny_vectors_do_not_overflow(leave_one_out: bool) -> None:
    heads = separable(LABELS)
    plain = SparseAttentionVectors.fit(heads, LABELS, 4, leave_one_out=leave_one_out)
    for factor in (2.0**118, 2.0**100, 2.0**-100, 2.0**-120):
        sav = SparseAttentionVectors.fit(heads * np.float32(factor), LABELS, 4, leave_one_out=leave_one_out)
        np.testing.assert_array_equal(sav.scores, plain.scores)
    of_head = np.float32(2) ** np.array([90, -90, 0], np.float32)[:, None]
    mixed = heads * of_head  # [N, L, K, H]
    sav = SparseAttentionVectors.fit(mixed, LABELS, 4, leave_one_out=leave_one_out)
    np.testing.assert_array_equal(sav.scores, plain.scores)


def test_heads_that_begin_where_xla_wants_are_used_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = _scoring.local_mesh()
    heads = aligned_zeros((64 * mesh.size, 6, 16))
    heads[:] = np.random.default_rng(0).normal(size=heads.shape)
    labels = np.arange(len(heads)) % 2
    shifted = np.empty(heads.size + 1, np.float32)[1:].reshape(heads.shape)  # four bytes behind
    shifted[:] = heads
    (own, _), (copied, _) = (next(_scoring._chunks(x, labels, 2, len(x), mesh)) for x in (heads, shifted))
    first = heads.ctypes.data
    assert own.addressable_shards[0].data.unsafe_buffer_pointer() == first
    assert copied.addressable_shards[0].data.unsafe_buffer_pointer() != shifted.ctypes.data
    np.testing.assert_array_equal(own, copied)
    sizes = len(heads), heads[:1].nbytes, 16, mesh
    assert _scoring._in_place(heads, mesh)
    assert not _scoring._in_place(shifted, mesh)
    assert not _scoring._in_place(heads[:-1], mesh)
    monkeypatch.setattr(_scoring, "_CHUNK_BYTES", heads.nbytes // 3)
    assert _scoring._plan(*sizes, in_place=True)[1] == len(heads)
    assert _scoring._plan(*sizes)[1] == len(heads) // 4, "chunks of one size"
