"""Whole layers, wrong labels, and LoRA asked another task: what the study does with heads and examples besides."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripts_loaded import imported

import sav_jax
from sav_jax.eval.tasks.base import Item
from sav_jax.examples import Example

study = imported("reproduction.study")
heads = imported("reproduction.heads")
variants = imported("reproduction.variants")


def made(seed: int, classes: int, of_each: int, queries: int = 40) -> Any:
    """A draw of questions without pictures."""
    names = tuple("abcdefgh"[:classes])
    support = tuple(Item(Example("?", (), names[i % classes], id=str(i))) for i in range(classes * of_each))
    asked = tuple(Item(Example("?", (), names[i % classes], id=f"q{i}")) for i in range(queries))
    return heads.Draw("made", seed, names, support, asked, tuple(item.example.id for item in asked))


@given(st.integers(0, 1000), st.integers(2, 5), st.integers(1, 20))
def test_as_many_labels_of_each_class_are_wrong(seed: int, classes: int, of_each: int) -> None:
    draw = made(seed, classes, of_each)
    before: set[str] = set()
    for share in (0, *variants.WRONG, 100):
        noisy = variants.mislabelled(draw, share)
        pairs = list(zip(draw.support, noisy.support, strict=True))
        wrong = {right.example.id for right, given_ in pairs if right.label != given_.label}
        assert set(Counter(right.label for right, _ in pairs if right.example.id in wrong).values()) <= {
            round(of_each * share / 100)
        }
        assert len(wrong) == classes * round(of_each * share / 100)
        assert before <= wrong, "what was wrong stays wrong"
        assert all(given_.label in draw.classes for _, given_ in pairs)
        assert [item.example.id for item in noisy.support] == [item.example.id for item in draw.support]
        assert noisy.queries == draw.queries
        before = wrong


def test_layers_and_wrong_labels_of_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against classifiers fitted on whole layers, and on relabelled examples."""
    draw, rng = made(3, 2, 20), np.random.default_rng(0)
    sign = np.array([1.0 if item.label == "a" else -1.0 for item in (*draw.support, *draw.queries)])
    # The second of three layers knows the class, in all its heads together.
    vectors = rng.standard_normal((80, 3, 4, 5)) + sign[:, None, None, None] * np.array([0, 0.4, 0.1])[:, None, None]
    support, queries = vectors[:40].astype(np.float32), vectors[40:].astype(np.float32)
    monkeypatch.setattr(variants, "draws", lambda *_: [draw])
    monkeypatch.setattr(variants, "with_heads", lambda *_: [(draw, support, queries)])
    found = variants._of_task(None, None, "made")
    labels = [item.label for item in draw.support]

    def right(classifier: Any, asked: np.ndarray) -> list[float]:
        return [float(name == item.label) for name, item in zip(classifier.predict(asked), draw.queries, strict=True)]

    def whole(x: np.ndarray) -> np.ndarray:
        return x.reshape(len(x), 3, 1, 20)

    for number in (1, 3):
        classifier = sav_jax.SparseAttentionVectors.fit(whole(support), labels, number)
        assert heads.answers(found["sheet"], f"{number} layers").values[0].tolist() == right(classifier, whole(queries))
    one = sav_jax.SparseAttentionVectors.fit(whole(support), labels, 1)
    assert one.heads == ((1, 0),)
    for share in variants.WRONG:
        noisy = variants.mislabelled(draw, share)
        classifier = sav_jax.SparseAttentionVectors.fit(support, [item.label for item in noisy.support], 12)
        assert heads.answers(found["sheet"], f"{share} % wrong").values[0].tolist() == right(classifier, queries)


def test_losses_are_per_query() -> None:
    own = {"t": study.Answers((np.array([1.0, 1.0, 0.0]),), (("x", "y", "z"),))}
    borrowed = {"t": study.Answers((np.array([1.0, 0.0, 1.0]),), (("x", "y", "z"),))}
    (found,) = variants.losses(own, borrowed).values()
    assert found.values[0].tolist() == [0.0, -1.0, 1.0]
    assert found.clusters == own["t"].clusters


def test_lora_is_asked_both_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every task is asked of what was tuned on it and on the similar one, under every seed."""
    tuned: list[tuple[str, int]] = []

    def fake_tuned(_: Any, task: Any, split: Any, steps: int, seed: int) -> Any:
        assert steps == 20
        assert len(split.support) == 20 * len(split.labels)
        tuned.append((task.name, seed))
        return task.name, seed

    def fake_right(lmm: Any, task: Any, split: Any) -> np.ndarray:
        return np.full(len(split.queries), float(lmm[0] == task.name))

    monkeypatch.setattr(variants, "_tuned", fake_tuned)
    monkeypatch.setattr(variants, "_right", fake_right)
    monkeypatch.setattr(variants.sav_jax, "load", lambda _: None)
    run = study.Study(tmp_path, ("tiny",), (0, 1), True, tmp_path, lambda _: None)
    pairs = (("digits", "digits-scattered"), ("digits-scattered", "digits"))
    found = variants.lora_elsewhere(run, "tiny", pairs)
    assert tuned == [(name, seed) for seed in (0, 1) for name in ("digits", "digits-scattered")]
    for source, target in pairs:
        own, borrowed = (heads.answers(found[target]["sheet"], f"lora of {name}") for name in (target, source))
        assert own.mean == 100
        assert borrowed.mean == 0
        assert len(own.values) == 2
        assert own.clusters == tuple(draw.clusters for draw in heads.draws(run, target, 20))
