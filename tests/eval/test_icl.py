"""In-context learning: which demonstrations, how they are laid out, and that their prompts are read once."""

from __future__ import annotations

import copy
import dataclasses
import re
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
from sav_jax.eval.methods.icl import draw_balanced, in_turns, with_demonstrations
from sav_jax.eval.tasks import Item, Task
from sav_jax.examples import Exchange
from sav_jax.extract import plan_prompts

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


def shown_and_asked() -> tuple[list[Item], Example]:
    """Demonstrations with one, two and no pictures, and a query."""
    one, two, three = (picture(28, 28, seed) for seed in range(3))
    shown = [
        Item(Example("which is it? A. cat B. dog", (one,), label="cat")),
        Item(Example("is <image> like <image>?", (two, one), label="dog")),
        Item(Example("no picture?", label="dog")),
    ]
    return shown, Example("both?", (three, two), label="secret", id="7", source="q:7")


@pytest.mark.parametrize("model", ["tiny", "tiny-qwen"])
def test_turns_are_written_as_a_template_writes_a_conversation(model: str) -> None:
    """Against transformers' own rendering of the messages, pictures in the places where zero-shot has them."""
    task = Task("t", "", lambda _: None, answers={"cat": "A"})  # type: ignore[arg-type, return-value]
    shown, query = shown_and_asked()
    prompt = in_turns(task, shown, query)
    processor = sav_jax.load(model).processor
    mark = processor.image_mark

    def user(text: str, images: int) -> dict[str, object]:
        return {"role": "user", "content": [*[{"type": "image"}] * images, {"type": "text", "text": text}]}

    def assistant(text: str) -> dict[str, object]:
        return {"role": "assistant", "content": [{"type": "text", "text": text}]}

    messages = [
        user("which is it? A. cat B. dog", 1),
        assistant("A"),
        user(f"is {mark} like {mark}?", 0),
        assistant("dog"),
        user("no picture?", 0),
        assistant("dog"),
        user("both?", 2),
    ]
    expected = processor.tokenizer.apply_chat_template(
        messages, chat_template=processor.chat_template, add_generation_prompt=True, tokenize=False
    )
    assert processor.text(prompt.question, len(prompt.images), (), prompt.history) == expected
    assert str(expected).endswith(processor.text(query.question, 2)), "the query is asked as zero-shot asks it"
    first, second, third = (item.example.images for item in shown)
    assert prompt.images == (*first, *second, *third, *query.images)
    assert prompt.question == "both?"


def test_pictures_of_turns_are_planned_in_order(lmm: sav_jax.LMM) -> None:
    """The conversation as one text of its own, with marks, gives the same tokens and the same visual plan."""
    shown, query = shown_and_asked()
    turns = in_turns(Task("t", "", lambda _: None), shown, query)  # type: ignore[arg-type, return-value]
    (planned,) = plan_prompts(lmm, [turns])
    text = lmm.processor.text(turns.question, len(turns.images), (), turns.history)
    expected = lmm.processor.expand(lmm.processor.encode_prompt(text), turns.image_sizes())
    np.testing.assert_array_equal(planned.token_ids, expected.token_ids)
    np.testing.assert_array_equal(planned.visual_index, expected.visual_index)


def test_turns_without_demonstrations_are_zero_shot(lmm: sav_jax.LMM) -> None:
    features = read_features(lambda: lmm, grey_split(), settings=Settings(shots=2, demonstrations=0))
    alone, turns = (METHODS[name].run(features) for name in ("zero-shot", "icl-turns"))
    assert turns.texts == alone.texts
    likelihood, of_turns = (METHODS[f"{name}-likelihood"].run(features) for name in ("zero-shot", "icl-turns"))
    assert likelihood.scores is not None
    assert of_turns.scores is not None
    np.testing.assert_allclose(of_turns.scores, likelihood.scores, rtol=0, atol=SCORES)
    # The one turn has its layout all the same.
    one_turn = METHODS["icl-likelihood"].run(features)
    assert one_turn.scores is not None
    assert np.abs(one_turn.scores - likelihood.scores).max() > 100 * SCORES


def test_the_model_reads_turns(lmm: sav_jax.LMM) -> None:
    split = grey_split()
    features = read_features(lambda: lmm, split, settings=Settings(shots=2, demonstrations=3, seed=1))
    outcome, likelihood = (METHODS[name].run(features) for name in ("icl-turns", "icl-turns-likelihood"))
    assert features.reader.passes == len(split.queries), "one pass for both"
    named = {item.example.id: item for item in split.support}
    chosen = [named[name] for name in outcome.facts["demonstrations"]]
    prompts = [in_turns(grey_task(), chosen, query.example) for query in split.queries]
    expected = sav_jax.score_options(lmm, prompts, list(split.labels), progress=False)
    assert likelihood.scores is not None
    np.testing.assert_allclose(likelihood.scores, expected, rtol=0, atol=SCORES)
    turned = [in_turns(grey_task(), chosen[::-1], query.example) for query in split.queries]
    assert np.abs(sav_jax.score_options(lmm, turned, list(split.labels), progress=False) - expected).max() > (
        100 * SCORES
    ), "what was said before would not matter"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[-1]['content'][-1]['text'] }}", "the chat template leaves out what was answered before"),
        (
            "{% for m in messages if m['role'] == 'user' %}{{ m['content'][-1]['text'] }} cat {% endfor %}",
            "the chat template leaves out what was answered before",
        ),
        ("{{ raise_exception('one turn only') }}", "the chat template refuses the prompt: one turn only"),
    ],
)
def test_a_template_without_earlier_turns(lmm: sav_jax.LMM, template: str, message: str) -> None:
    processor = copy.copy(lmm.processor)
    processor.chat_template = template
    query = Example("both?", history=(Exchange("which?", "cat"),), source="q:7")
    with pytest.raises(UserError, match=f"q:7: {re.escape(message)}"):
        plan_prompts(dataclasses.replace(lmm, processor=processor), [query])


def test_marks_of_a_question_are_for_its_own_pictures() -> None:
    one = picture(8, 8)
    history = (Exchange("which?", "cat", images=1),)
    assert Example("is <image> like <image>?", (one, one, one), history=history).marked_question().startswith("is ")
    assert Example("and this?", (one, one), history=history).marked_question() == "<image>\nand this?"
    with pytest.raises(UserError, match='field "question" holds 2 <image> marks for 1 image in field'):
        Example("is <image> like <image>?", (one, one), history=history)
    with pytest.raises(UserError, match='q:1: earlier turns show more images than field "image" has'):
        Example("and this?", (), history=history, source="q:1")


@pytest.mark.parametrize("number", [-1, 7])
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
