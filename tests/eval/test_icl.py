"""In-context learning: which demonstrations, how they are laid out, and that their prompts are read once."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from checkpoints import picture
from eval_made import grey_split, grey_task, made_features, read_features
from hypothesis import given
from hypothesis import strategies as st

import sav_jax
from sav_jax import Example, UserError
from sav_jax.eval.methods import METHODS, Settings
from sav_jax.eval.methods.icl import draw_balanced, with_demonstrations
from sav_jax.eval.tasks import Item, Task

# Log-probabilities of order ten in another program and other company.
SCORES = 1e-4


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(0, 2**31), st.data())
def test_draws_are_balanced_seeded_and_nested(classes: list[int], seed: int, data: st.DataObject) -> None:
    targets = np.array(classes)
    number = data.draw(st.integers(1, len(targets)))
    drawn = draw_balanced(targets, number, np.random.default_rng(seed))
    assert len(drawn) == len(set(drawn)) == number
    assert drawn == draw_balanced(targets, len(targets), np.random.default_rng(seed))[:number]
    counts = {target: int((targets[drawn] == target).sum()) for target in classes}
    for target, count in counts.items():
        # A class is short of another by more than one only if it has no more to give.
        assert count >= max(counts.values()) - 1 or count == int((targets == target).sum())


def test_other_seeds_draw_others_in_another_order() -> None:
    targets = np.repeat(np.arange(4), 5)
    draws = [draw_balanced(targets, 4, np.random.default_rng(seed)) for seed in range(20)]
    assert len({tuple(draw) for draw in draws}) > 15
    assert len({tuple(targets[draw]) for draw in draws}) > 5, "the order of the classes is drawn, too"


def test_layout() -> None:
    task = Task("t", "", lambda _: None, answers={"cat": "A"})  # type: ignore[arg-type, return-value]
    one, two, three = (picture(8, 8, seed) for seed in range(3))
    shown = [
        Item(Example("Which is it? A. cat B. dog", (one,), label="cat")),
        Item(Example("Is <image> like <image>?", (two, one), label="dog")),
        Item(Example("No picture?", label="dog")),
    ]
    prompt = with_demonstrations(task, shown, Example("Both?", (three, two), label="secret", id="7", source="q:7"))
    assert prompt.question == (
        "<image>\nWhich is it? A. cat B. dog\nAnswer: A\n\n"
        "Is <image> like <image>?\nAnswer: dog\n\n"
        "No picture?\nAnswer: dog\n\n"
        "<image><image>\nBoth?\nAnswer:"
    )
    assert prompt.images == (one, two, one, three, two)
    assert prompt.label is None


def test_the_model_reads_the_demonstrations(lmm: sav_jax.LMM) -> None:
    """Against the library's own generation and option scoring of prompts put together here."""
    split = grey_split()
    task = dataclasses.replace(grey_task(), answers={"dark": "black"})
    features = read_features(lambda: lmm, split, task=task, settings=Settings(shots=2, demonstrations=3, seed=1))
    outcome, likelihood = (METHODS[name].run(features) for name in ("icl", "icl-likelihood"))
    assert features.reader.passes == len(features.reader.prompts) == len(split.queries), "one pass for both"
    chosen = [
        next(item for item in split.support if item.example.id == name) for name in outcome.facts["demonstrations"]
    ]
    assert sorted(item.label for item in chosen) == sorted(split.labels)
    prompts = [
        Example(
            "".join(f"<image>\n{i.example.question}\nAnswer: {task.answer(i.label)}\n\n" for i in chosen)
            + f"<image>\n{query.example.question}\nAnswer:",
            tuple(image for item in (*chosen, query) for image in item.example.images),
        )
        for query in split.queries
    ]
    written = sav_jax.generate(lmm, prompts, 3, progress=False)
    assert outcome.texts == tuple(generation.text for generation in written)
    answers = [task.answer(label) for label in split.labels]
    expected = sav_jax.score_options(lmm, prompts, answers, progress=False)
    assert likelihood.scores is not None
    np.testing.assert_allclose(likelihood.scores, expected, rtol=0, atol=SCORES)
    assert likelihood.predictions == tuple(split.labels[column] for column in expected.argmax(axis=1))
    assert np.ptp(expected, axis=0).min() > 100 * SCORES, "the queries would not matter"
    other = read_features(lambda: lmm, split, task=task, settings=Settings(shots=2, demonstrations=3, seed=2))
    again = METHODS["icl-likelihood"].run(other)
    assert again.scores is not None
    assert np.abs(again.scores - expected).max() > 100 * SCORES, "the demonstrations would not matter"


def test_a_second_run_reads_nothing(lmm: sav_jax.LMM, tmp_path: Path) -> None:
    split, settings = grey_split(), Settings(shots=2, demonstrations=2)
    runs = []
    for _ in range(2):
        features = read_features(lambda: lmm, split, settings=settings, cache=str(tmp_path))
        runs.append((METHODS["icl"].run(features), features.reader.passes))
    assert [passes for _, passes in runs] == [len(split.queries), 0]
    assert runs[0][0].texts == runs[1][0].texts
    assert not (tmp_path / "heads").exists(), "heads are not kept"


def test_only_offered_answers_count(lmm: sav_jax.LMM) -> None:
    split = grey_split()
    queries = tuple(dataclasses.replace(item, offered=("middle", "bright")) for item in split.queries)
    split = dataclasses.replace(split, queries=queries)
    outcome = METHODS["icl-likelihood"].run(read_features(lambda: lmm, split))
    assert outcome.scores is not None
    assert outcome.predictions is not None
    assert set(outcome.predictions) <= {"middle", "bright"}


@pytest.mark.parametrize("number", [0, 7])
def test_impossible_numbers_of_demonstrations(number: int) -> None:
    features = made_features(grey_split(), settings=Settings(demonstrations=number))
    with pytest.raises(UserError, match=rf"--demonstrations is {number}; there are 6 labelled examples"):
        METHODS["icl"].run(features)


def test_a_prompt_that_is_too_long_names_its_query(lmm: sav_jax.LMM) -> None:
    split = grey_split()
    short = dataclasses.replace(lmm, max_tokens=150)
    features = read_features(lambda: short, split, settings=Settings(shots=2, demonstrations=6))
    with pytest.raises(UserError) as caught:
        METHODS["icl"].run(features)
    source = split.queries[0].example.source
    message = str(caught.value)
    assert message.startswith(f"{source} after 6 demonstrations (--demonstrations): the prompt has ")
    assert message.endswith("reads at most 150")
    assert "\n" not in message


def test_videos_among_the_demonstrations() -> None:
    frames = [picture(8, 8, seed) for seed in range(2)]
    task = Task("t", "", lambda _: None)  # type: ignore[arg-type, return-value]
    one, two = (
        Example("Up?", (picture(8, 8),), label="no", videos=(sav_jax.Video(frames, fps=1),), frames=3) for _ in range(2)
    )
    prompt = with_demonstrations(task, [Item(one)], two)
    assert prompt.question == "<image><video>\nUp?\nAnswer: no\n\n<image><video>\nUp?\nAnswer:"
    assert prompt.videos == one.videos + two.videos
    assert prompt.frames == 3
