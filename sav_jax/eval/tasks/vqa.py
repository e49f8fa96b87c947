"""VQA accuracy: agreement of a written answer with ten people's (Antol et al., ICCV 2015; VQA's and VizWiz' scorer)."""

from __future__ import annotations

import re
from collections.abc import Sequence

SHORT_ANSWER = "{question}\nAnswer the question using a single word or phrase."
"""How LLaVA-1.5 asks for short answers (Liu et al., arXiv 2310.03744; docs/Evaluation.md of its release)."""

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
"""Marks that are dropped where the text has them beside a space, and become a space elsewhere."""
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = frozenset(("a", "an", "the"))
# Words that may lack one of their apostrophes.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't
    not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
    won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_SPELT = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # the published table has it this way round


def normalise_vqa(text: str) -> str:
    """An answer as VQA compares it: lower case, without punctuation and articles, numbers to ten as digits.

    The steps of VQA's scorer (GT-Vision-Lab/VQA, vqaEval.py), which VizWiz took over. A mark is dropped if the text has
    it beside a space, or has a comma between digits; otherwise it becomes a space. Full stops stay only before digits.
    The first scorer left answers alone where all ten people agree; as in later ones, they are normalised always.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    grouped = re.search(r"\d,\d", text) is not None
    plain = text
    for mark in _PUNCTUATION:
        beside = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if beside or grouped else " ")
    plain = re.sub(r"\.(?!\d)", "", plain)
    words = [_DIGITS.get(word, word) for word in plain.lower().split()]
    return " ".join(_SPELT.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Mean over leaving out each person of min(people who agree / 3, 1).

    Args:
      answer: what the model wrote.
      references: what people answered, ten in VQA and VizWiz.
    """
    return _agreement(normalise_vqa(answer), [normalise_vqa(reference) for reference in references])


def vizwiz_accuracy(answer: str, references: Sequence[str]) -> float:
    """The same as VizWiz' scorer has it: only the written answer is normalised, people's are taken as published.

    Args:
      answer, references: as in :func:`vqa_accuracy`.
    """
    return _agreement(normalise_vqa(answer), references)


def _agreement(given: str, references: Sequence[str]) -> float:
    agreeing = [reference == given for reference in references]
    total = sum(agreeing)
    return sum(min((total - own) / 3, 1.0) for own in agreeing) / len(agreeing)
