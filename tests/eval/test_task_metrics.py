"""Metrics of benchmarks against their published definitions, on cases worked out by hand."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sav_jax.eval.metrics import Answers, Metric, Units
from sav_jax.eval.tasks import TASKS, Item
from sav_jax.eval.tasks.naturalbench import METRICS as NATURALBENCH
from sav_jax.eval.tasks.naturalbench import ROLES, parse_naturalbench
from sav_jax.eval.tasks.pope import METRICS as POPE
from sav_jax.eval.tasks.pope import parse_pope
from sav_jax.eval.tasks.vqa import normalise_vqa, vqa_accuracy
from sav_jax.examples import Example


def value(metrics: Sequence[Metric], name: str, answers: Answers) -> float | None:
    (metric,) = (metric for metric in metrics if metric.name == name)
    found = metric.compute(answers)
    return float(found.values.mean()) if isinstance(found, Units) else found


# NaturalBench: a group's answers, in the order q0i0, q0i1, q1i0, q1i1, and what the paper's definitions make of them.

TRUTH = ("Yes", "No", "No", "Yes")


def naturalbench(*groups: str) -> Answers:
    """Groups of four answers, "Y", "N" or "-" for none."""
    said = {"Y": "Yes", "N": "No", "-": ""}
    items = tuple(
        Item(Example("Is it?", label=label), group=str(g), role=f"{g}/{role}")
        for g, _ in enumerate(groups)
        for role, label in zip(ROLES, TRUTH, strict=True)
    )
    predictions = tuple(said[letter] for group in groups for letter in group)
    return Answers(items, ("Yes", "No"), predictions)


@pytest.mark.parametrize(
    ("group", "questions", "images", "whole"),
    [
        ("YNNY", 2, 2, 1),  # all right
        ("YNNN", 1, 1, 0),  # q1i1 wrong: question 1 and image 1 fail
        ("NNNY", 1, 1, 0),  # q0i0 wrong: question 0 and image 0 fail
        ("YYYY", 0, 0, 0),  # the same to everything
        ("YNYN", 1, 0, 0),  # question 0 right about both; question 1 about neither: each image has one wrong
        ("YYNN", 0, 1, 0),  # image 0 right on both; image 1 on neither: each question has one wrong
        ("NYYN", 0, 0, 0),  # all wrong
        ("Y-NY", 1, 1, 0),  # no answer is a wrong one
    ],
)
def test_naturalbench_of_one_group(group: str, questions: int, images: int, whole: int) -> None:
    answers = naturalbench(group)
    assert value(NATURALBENCH, "q_acc", answers) == questions / 2
    assert value(NATURALBENCH, "i_acc", answers) == images / 2
    assert value(NATURALBENCH, "g_acc", answers) == whole


@given(st.lists(st.text("YN-", min_size=4, max_size=4), min_size=1, max_size=6))
def test_naturalbench_is_the_authors_sum(groups: list[str]) -> None:
    """Q = sum [(q0i0 & !q0i1) + (q1i1 & !q1i0)] / 2N and so on, in yes = 1, no = 0, neither = -1."""
    answers = naturalbench(*groups)
    said = np.array([[{"Y": 1, "N": 0, "-": -1}[letter] for letter in group] for group in groups])
    a, b, c, d = ((said[:, i] == target) for i, target in enumerate((1, 0, 0, 1)))
    count = len(groups)
    assert value(NATURALBENCH, "q_acc", answers) == pytest.approx(((a & b).sum() + (d & c).sum()) / (2 * count))
    assert value(NATURALBENCH, "i_acc", answers) == pytest.approx(((a & c).sum() + (d & b).sum()) / (2 * count))
    assert value(NATURALBENCH, "g_acc", answers) == pytest.approx((a & b & c & d).sum() / count)


def test_naturalbench_counts_whole_groups_whatever_the_order() -> None:
    answers = naturalbench("YNNY", "YNNN")
    assert value(NATURALBENCH, "g_acc", answers.take(np.array([5, 0, 7, 3, 4, 1, 6, 2]))) == 0.5
    # Group 1 lacks a row: it does not count. With nothing whole there is no number.
    assert value(NATURALBENCH, "g_acc", answers.take(np.arange(7))) == 1.0
    assert value(NATURALBENCH, "g_acc", answers.take(np.array([0, 1, 2]))) is None
    (metric,) = (metric for metric in NATURALBENCH if metric.name == "q_acc")
    units = metric.compute(answers)
    assert isinstance(units, Units)
    assert units.clusters == ("0", "0", "1", "1"), "questions of a group are not independent"


@pytest.mark.parametrize(
    ("text", "offered", "label"),
    [
        ("Yes", ("Yes", "No"), "Yes"),
        ("no.", ("Yes", "No"), "No"),
        ("No, yes would be wrong", ("Yes", "No"), "No"),
        ("I say yes, not no", ("Yes", "No"), "Yes"),
        ("Nothing yesterday", ("Yes", "No"), None),  # parts of words do not count
        ("B. a dog", ("A", "B"), "B"),
        ("a", ("A", "B"), "A"),
        ("Option (B), not A", ("A", "B"), "B"),
        ("", ("A", "B"), None),
    ],
)
def test_naturalbench_reads_the_first_word_that_is_an_answer(
    text: str, offered: tuple[str, ...], label: str | None
) -> None:
    assert parse_naturalbench(text, Item(Example("Is it?"), offered=offered)) == label


# SugarCrepe


def sugarcrepe(*pairs: tuple[str, str, float, float]) -> Answers:
    """(answer to the right caption, to the changed one, score of Yes minus that of No for each)."""
    items, predictions, scores = [], [], []
    for i, (positive, negative, first, second) in enumerate(pairs):
        for kind, label, said, margin in (("positive", "Yes", positive, first), ("negative", "No", negative, second)):
            items.append(Item(Example("It?", label=label), group=f"{i // 2}.jpg", role=f"add_att/{i}/{kind}"))
            predictions.append(said)
            scores.append([margin / 2 - 3, -margin / 2 - 3])
    return Answers(tuple(items), ("Yes", "No"), tuple(predictions), np.array(scores))


def test_sugarcrepe_both_ways() -> None:
    answers = sugarcrepe(
        ("Yes", "No", 1.0, -1.0),  # right by both
        ("Yes", "Yes", 2.0, 1.0),  # the right caption is preferred, though both are called right
        ("No", "No", -1.0, -0.5),  # the changed one is preferred
        ("Yes", "No", 1.0, 1.0),  # not preferred: equal
    )
    metrics = TASKS["sugarcrepe"].metrics
    assert value(metrics, "pair_acc", answers) == 2 / 4
    assert value(metrics, "pick_acc", answers) == 2 / 4
    assert value(metrics, "pick_acc", answers.take(np.arange(4))) == 1.0
    assert value(metrics, "pick_acc", answers.take(np.array([0, 2]))) is None
    for name in ("pair_acc", "pick_acc"):
        (metric,) = (metric for metric in metrics if metric.name == name)
        units = metric.compute(answers)
        assert isinstance(units, Units)
        assert units.clusters == ("0.jpg", "0.jpg", "1.jpg", "1.jpg")


def test_sugarcrepe_needs_scores_to_pick() -> None:
    answers = sugarcrepe(("Yes", "No", 1.0, -1.0))
    without = Answers(answers.items, answers.labels, answers.predictions)
    assert value(TASKS["sugarcrepe"].metrics, "pick_acc", without) is None
    assert value(TASKS["sugarcrepe"].metrics, "pair_acc", without) == 1.0


# POPE


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("Yes", "yes"),
        ("No", "no"),
        ("no", "no"),
        ("NO", "yes"),  # as published: only these three spellings
        ("No, there is not.", "no"),
        ("There is not a dog in the image", "no"),
        ("Yes. There is no dog.", "yes"),  # the first sentence alone
        ("There is nothing", "yes"),  # parts of words do not count
        ("There are 1.5 dogs, no cats", "yes"),  # a full stop ends the sentence wherever it stands
        ("It is a dog\nno", "yes"),  # words are what lies between spaces
        ("Not at all", "yes"),
        ("", "yes"),
    ],
)
def test_pope_reads_answers_as_published(text: str, label: str) -> None:
    assert parse_pope(text) == label


def pope(pairs: Sequence[tuple[str, str]]) -> Answers:
    items = tuple(Item(Example("Is there?", label=label), group=f"{i}") for i, (label, _) in enumerate(pairs))
    return Answers(items, ("yes", "no"), tuple(said for _, said in pairs))


def test_pope_scores_as_published() -> None:
    # TP 3, FN 1, FP 2, TN 4; the answer that is neither counts as yes: FP 3.
    pairs = 3 * [("yes", "yes")] + [("yes", "no")] + 2 * [("no", "yes")] + 4 * [("no", "no")] + [("no", "")]
    answers = pope(pairs)
    assert value(POPE, "precision", answers) == pytest.approx(3 / 6)
    assert value(POPE, "recall", answers) == pytest.approx(3 / 4)
    assert value(POPE, "f1", answers) == pytest.approx(2 * (1 / 2) * (3 / 4) / (1 / 2 + 3 / 4))
    assert value(POPE, "yes_ratio", answers) == pytest.approx(6 / 11)


def test_pope_where_nothing_is_yes() -> None:
    none = pope([("no", "no"), ("no", "no")])
    assert [value(POPE, name, none) for name in ("precision", "recall", "f1", "yes_ratio")] == [None, None, None, 0.0]
    missed = pope([("yes", "no"), ("no", "no")])
    assert [value(POPE, name, missed) for name in ("precision", "recall", "f1")] == [None, 0.0, 0.0]


# VizWiz


@pytest.mark.parametrize(
    ("agreeing", "accuracy"),
    # n of ten people agree. Left out one by one: n times one of them, leaving n - 1, and 10 - n times another.
    [
        (0, 0.0),
        (1, 9 * (1 / 3) / 10),
        (2, (2 * 1 / 3 + 8 * 2 / 3) / 10),
        (3, (3 * 2 / 3 + 7) / 10),
        (4, 1.0),
        (10, 1.0),
    ],
)
def test_vqa_accuracy_leaves_out_each_person(agreeing: int, accuracy: float) -> None:
    references = agreeing * ["red"] + [f"blue {i}" for i in range(10 - agreeing)]
    assert vqa_accuracy("Red.", references) == pytest.approx(accuracy, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Coca-Cola can.", "coca cola can"),
        ("two", "2"),
        ("None", "0"),
        ("an apple, a pear", "apple pear"),
        ("1,000", "1000"),
        ("3.5 kg.", "3.5 kg"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("it's red!", "it's red"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("what?", "what"),
        ("a\nb\tc ", "b c"),
        ("unanswerable", "unanswerable"),
    ],
)
def test_vqa_normalises_answers(text: str, normal: str) -> None:
    assert normalise_vqa(text) == normal


@given(st.text("aAn theTwo1,.;?!-'/() \n", max_size=24))
def test_vqa_normalises_as_written_down_from_the_definition(text: str) -> None:
    """Another implementation: marks first, by the text as given; then words."""
    text_in = re.sub(r"[\n\t]", " ", text).strip()
    out = ""
    grouped = bool(re.search("[0-9],[0-9]", text_in))
    for letter in text_in:
        if letter in ';/[]"{}()=+\\_-><@`,?!':
            beside = letter + " " in text_in or " " + letter in text_in
            out += "" if beside or grouped else " "
        else:
            out += letter
    kept = "".join(c for i, c in enumerate(out) if c != "." or out[i + 1 : i + 2].isdigit())
    numbers = {"none": "0", "two": "2", "one": "1", "ten": "10"}
    words = [numbers.get(word, word) for word in kept.lower().split()]
    expected = " ".join(word for word in words if word not in ("a", "an", "the"))
    assert normalise_vqa(text) == expected


def test_vizwiz_scores_written_answers() -> None:
    (metric,) = TASKS["vizwiz-answerable"].metrics
    item = Item(Example("What is it?", label="answerable"), references=("can",) * 3 + ("tin",) * 7)
    unanswerable = Item(Example("What is it?", label="unanswerable"), references=("unanswerable",) * 10)
    answers = Answers(
        (item, item, unanswerable),
        ("answerable", "unanswerable"),
        ("answerable",) * 3,
        texts=("The can", "a tin.", "Unanswerable"),
    )
    units = metric.compute(answers)
    assert isinstance(units, Units)
    np.testing.assert_allclose(units.values, [0.9, 1.0, 1.0], rtol=1e-12)
    assert metric.compute(Answers(answers.items, answers.labels, answers.predictions)) is None, "nothing is written"
    bare = Item(Example("What is it?", label="answerable"))
    assert metric.compute(Answers((bare,), answers.labels, ("answerable",), texts=("can",))) is None


@pytest.mark.parametrize(
    ("text", "label"),
    [("Unanswerable.", "unanswerable"), ("unsuitable image", "unanswerable"), ("a can", "answerable"), (" . ", None)],
)
def test_vizwiz_reads_whether_there_was_an_answer(text: str, label: str | None) -> None:
    parse = TASKS["vizwiz-answerable"].parse
    assert parse is not None
    assert parse(text, Item(Example("What is it?"))) == label


# MHaluBench


def test_mhalubench_precision_and_recall() -> None:
    labels = ("hallucination", "non-hallucination")
    truth, said = (0, 0, 0, 1, 1), (0, 0, 1, 0, 1)
    items = tuple(Item(Example("Is it?", label=labels[i])) for i in truth)
    answers = Answers(items, labels, tuple(labels[i] for i in said))
    metrics = TASKS["mhalubench"].metrics
    assert value(metrics, "precision", answers) == pytest.approx(2 / 3)
    assert value(metrics, "recall", answers) == pytest.approx(2 / 3)
    none = Answers(items, labels, (labels[1],) * 5)
    assert value(metrics, "precision", none) is None
    assert value(metrics, "recall", none) == 0.0
