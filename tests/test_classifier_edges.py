"""Sparse Attention Vectors: ties, options, bad input, and classifiers on disk."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support_sets import LABELS, separable

from sav_jax import SparseAttentionVectors, UserError, load_classifier
from sav_jax.classifier import choose_shots

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
