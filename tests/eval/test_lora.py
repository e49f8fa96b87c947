"""Low-rank fine-tuning as a method: learned on the support alone, its recipe chosen there, nothing done twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from eval_made import grey_split, read_features

import sav_jax
from sav_jax.eval.methods import METHODS, Settings
from sav_jax.eval.methods.lora import grid, held_out
from sav_jax.train.data import ChatData

SETTINGS = Settings(shots=4, batch_size=4, lora_rank=4, lora_rates=(1e-9, 1e-2), lora_steps=(6,))


def test_a_quarter_of_every_class_is_held_out() -> None:
    targets = np.array([0] * 8 + [1] * 3 + [2] + [3] * 4)
    for seed in range(5):
        learned, held = held_out(targets, seed)
        assert sorted([*learned, *held]) == list(range(len(targets)))
        assert np.bincount(targets[held], minlength=4).tolist() == [2, 1, 0, 1]
    assert any((held_out(targets, 0)[1] != held_out(targets, seed)[1]).any() for seed in range(1, 5))


def test_the_grid_is_every_rate_with_every_length() -> None:
    recipes = grid((1e-3, 1e-4), (5, 10), rank=8, batch_size=4, seed=3)
    assert [(r.learning_rate, r.steps) for r in recipes] == [(1e-3, 5), (1e-3, 10), (1e-4, 5), (1e-4, 10)]
    assert {(r.rank, r.alpha, r.optimization.seed, r.optimization.batch_size) for r in recipes} == {(8, 16.0, 3, 4)}


def test_the_better_recipe_is_chosen_and_learns(
    lmm: sav_jax.LMM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = grey_split(shots=4)
    features = read_features(lambda: lmm, split, settings=SETTINGS, cache=str(tmp_path))
    base = features.support_option_scores[np.arange(len(split.support)), features.targets].mean()
    before = features.reader.passes
    written, likely = (METHODS[name].run(features) for name in ("lora", "lora-likelihood"))
    assert written.texts is not None
    assert len(written.texts) == len(split.queries)
    assert likely.scores is not None
    assert likely.scores.shape == (len(split.queries), len(split.labels))
    # A rate of 1e-9 learns nothing, so that the held-out answers stay unlikely.
    assert written.facts == likely.facts
    assert written.facts["learning_rate"] == 1e-2
    assert [row["learning_rate"] for row in written.facts["sweep"]] == [1e-9, 1e-2]
    # Both held-out readings and the queries, each once.
    held = len(held_out(features.targets, SETTINGS.seed)[1])
    assert features.reader.passes - before == 2 * held + len(split.queries)
    tuned, _ = features.kept["lora", split.digest, SETTINGS]
    answers = list(split.labels)
    scores = sav_jax.score_options(tuned, [item.example for item in split.support], answers)
    assert scores[np.arange(len(split.support)), features.targets].mean() > base + 1

    def trained_again(self: ChatData, step: int) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(ChatData, "__getitem__", trained_again)
    again = read_features(lambda: lmm, split, settings=SETTINGS, cache=str(tmp_path))
    repeated = METHODS["lora-likelihood"].run(again)
    assert again.reader.passes == 0
    np.testing.assert_array_equal(repeated.scores, likely.scores)
