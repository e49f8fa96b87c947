"""Answers as models write them."""

from __future__ import annotations

import pytest

from sav_jax.eval.parsing import parse_answer

YES_NO = {"hallucination": "Yes", "non-hallucination": "No"}
LETTERS = {"(A)": "(A)", "(B)": "(B)", "(C)": "(C)"}
NAMES = {"AnnualCrop": "AnnualCrop", "black cat": "black cat", "cat": "cat", "sea_lake": "sea_lake", "7": "7"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "hallucination"),
        ("yes.", "hallucination"),
        ("No, the claim is right.", "non-hallucination"),
        (" The answer is: NO", "non-hallucination"),
        ("I would say yes", "hallucination"),
        ("Yes and no", "hallucination"),
        ("It may be yes or no", None),
        ("Not at all", None),
        ("", None),
        ("yesterday", None),
    ],
)
def test_words(text: str, expected: str | None) -> None:
    assert parse_answer(text, YES_NO) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("annualcrop", "AnnualCrop"),
        ("A black cat.", "black cat"),
        ("It shows a black cat", "black cat"),
        ("the cat", "cat"),
        ("cat and black cat", "cat"),
        ("a dog, not a cat", "cat"),
        ("Sea Lake", "sea_lake"),
        ("7", "7"),
        ("the digit 7 it seems", "7"),
        ("17", None),
        ("category", None),
    ],
)
def test_names(text: str, expected: str | None) -> None:
    assert parse_answer(text, NAMES) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(B)", "(B)"),
        ("B", "(B)"),
        ("b", "(B)"),
        ("B. A black cat", "(B)"),
        ("(C) the third", "(C)"),
        ("Answer: A", "(A)"),
        ("A", "(A)"),
        ("A cat is closer to (C) than ever", "(C)"),
        ("The answer is B because A cat sleeps", "(B)"),
        ("A cat", None),
        ("(A) or (B)", "(A)"),
        ("Either (A) or (B)", None),
        ("D", None),
        ("", None),
    ],
)
def test_letters(text: str, expected: str | None) -> None:
    assert parse_answer(text, LETTERS) == expected
