"""Multimodal task vectors as a method: means, search, answers, and that none is made twice."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from eval_made import grey_split, grey_task, made_features, read_features

import sav_jax
from sav_jax import UserError
from sav_jax.eval.features import Features
from sav_jax.eval.methods import METHODS, Settings, mtv
from sav_jax.eval.methods.mtv import demonstrated
from sav_jax.generation import Generation
from sav_jax.models.intervention import HeadEdit
from sav_jax.reading import Readings, read
from sav_jax.task_vectors import Recipe, find_heads

# Log-likelihoods of order ten in another company.
SCORES = 1e-4

RECIPE = Recipe(prompts=8, steps=3, examples=2, masks=4, draws=3, validation=4)
SETTINGS = Settings(shots=2, demonstrations=2, mtv=RECIPE)


def features_of(lmm: sav_jax.LMM, settings: Settings = SETTINGS, cache: str | None = None) -> Features:
    task = dataclasses.replace(grey_task(), answers={"dark": "black"})
    return read_features(lambda: lmm, grey_split(), task=task, settings=settings, cache=cache)


def test_prompts_whose_heads_are_averaged() -> None:
    split = grey_split(shots=3)
    settings = Settings(shots=3, demonstrations=3, mtv=dataclasses.replace(RECIPE, prompts=20))
    prompts = demonstrated(made_features(split, settings=settings))
    asked = [prompt.id for prompt in prompts]
    support = [item.example.id for item in split.support]
    assert len(prompts) == 20
    assert sorted(asked[:9]) == sorted(asked[9:18]) == sorted(support), "every example in turn"
    images = {id(item.example.images[0]): item for item in split.support}
    for prompt in prompts:
        *shown, query = [images[id(image)] for image in prompt.images]
        assert query.example.id == prompt.id
        assert query not in shown
        assert sorted(item.label for item in shown) == sorted(split.labels)
        answered = [line.removeprefix("Answer: ") for line in prompt.question.splitlines() if line[:8] == "Answer: "]
        assert answered == [item.label for item in shown]
    again = demonstrated(made_features(split, settings=settings))
    assert [prompt.images for prompt in again] == [prompt.images for prompt in prompts]
    other = demonstrated(made_features(split, settings=dataclasses.replace(settings, seed=1)))
    assert [prompt.images for prompt in other] != [prompt.images for prompt in prompts]


def test_the_three_steps_put_together_here(lmm: sav_jax.LMM) -> None:
    features = features_of(lmm)
    outcome, likelihood = (METHODS[name].run(features) for name in ("mtv", "mtv-likelihood"))
    prompts = demonstrated(features)
    split, answers = features.split, [features.task.answer(label) for label in features.split.labels]
    distinct = {tuple(map(id, prompt.images)) for prompt in prompts}
    assert features.reader.passes == len(features.reader.prompts) == len(distinct)
    # Three steps of two, four at the end, and the queries once for both methods.
    assert features.reader.patched_passes == 3 * 2 + 4 + len(split.queries)
    means = sav_jax.extract_heads(lmm, prompts, progress=False).mean(axis=0)
    support = [item.example for item in split.support]
    found = find_heads(lmm, support, answers, features.targets, means, RECIPE, 0, progress=False)
    assert outcome.facts["heads_replaced"] == found.mask.sum() > 0
    np.testing.assert_allclose(outcome.facts["support_loss"], found.loss, rtol=0, atol=SCORES)
    np.testing.assert_allclose(outcome.facts["support_loss_without"], found.loss_before, rtol=0, atol=SCORES)
    edit = HeadEdit.replacing(means, found.mask)
    queries = [item.example for item in split.queries]
    expected = read(lmm, queries, answers, 3, edit=edit, keep_heads=False, progress=False)
    assert outcome.texts == tuple(generation.text for generation in expected.generations)
    assert likelihood.scores is not None
    np.testing.assert_allclose(likelihood.scores, expected.scores, rtol=0, atol=SCORES)
    best = expected.scores.argmax(axis=1)
    assert likelihood.predictions == tuple(split.labels[column] for column in best)
    assert np.abs(expected.scores - features.option_scores).max() > 100 * SCORES, "the heads would not matter"


def test_a_second_run_makes_no_pass(lmm: sav_jax.LMM, tmp_path: Path) -> None:
    runs = []
    for _ in range(2):
        features = features_of(lmm, cache=str(tmp_path))
        runs.append((METHODS["mtv-likelihood"].run(features), features.reader))
    (first, _), (second, reader) = runs
    assert (reader.passes, reader.patched_passes) == (0, 0)
    assert first.scores is not None
    np.testing.assert_array_equal(second.scores, first.scores)
    assert second.facts == first.facts
    # Another recipe is another search; the means are the same.
    other = dataclasses.replace(SETTINGS, mtv=dataclasses.replace(RECIPE, steps=2))
    features = features_of(lmm, other, cache=str(tmp_path))
    METHODS["mtv"].run(features)
    assert features.reader.passes == 0
    assert features.reader.patched_passes >= 2 * 2 + 4
    # Another seed has other demonstrations.
    features = features_of(lmm, dataclasses.replace(SETTINGS, seed=1), cache=str(tmp_path))
    METHODS["mtv"].run(features)
    assert features.reader.passes > 0


def test_what_a_patched_model_writes_is_read_as_if_it_were_not_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Going on behind the label, too: a word more does no harm, a label written into the next is none."""
    split = grey_split()
    texts = tuple(("dark dark", "Middle. And so on", "brightbright", "")[i % 4] for i in range(len(split.queries)))
    plain = made_features(split, texts=("",) * len(split.support) + texts)
    patched = made_features(split)
    readings = Readings((), np.zeros((0,)), np.zeros((0,)), tuple(Generation(text, ()) for text in texts), 0)
    monkeypatch.setattr(mtv, "_readings", lambda _: (readings, {"heads_replaced": 1}))
    expected = METHODS["zero-shot"].run(plain).predictions
    outcome = METHODS["mtv"].run(patched)
    assert outcome.predictions == expected
    assert expected is not None
    assert expected[:4] == ("dark", "middle", "", "")
    assert (outcome.texts, outcome.facts) == (texts, {"heads_replaced": 1})


def test_impossible_numbers_of_demonstrations() -> None:
    """One of the six is the query."""
    features = made_features(grey_split(), settings=Settings(demonstrations=6))
    with pytest.raises(UserError, match=r"--demonstrations is 6; there are 5 labelled examples to choose from"):
        demonstrated(features)
