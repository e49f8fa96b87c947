"""Reading a label out of what a model wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping


def parse_answer(text: str, answers: Mapping[str, str]) -> str | None:
    """Find the one label that a text answers with.

    In this order, each ignoring case, articles and punctuation: the whole text is an answer; it begins with one; it
    holds exactly one. Of answers that contain each other ("cat", "black cat") the longest counts.

    Args:
      text: what the model wrote.
      answers: label -> the answer that stands for it.

    Returns:
      The label, or None if no answer or several different ones are found.
    """
    said = _plain(text)
    wanted = {label: _plain(answer) for label, answer in answers.items()}
    for label, answer in wanted.items():
        if said == answer:
            return label
    by_length = sorted(wanted, key=lambda label: -len(wanted[label]))
    for label in by_length:
        if wanted[label] and said.startswith(wanted[label] + " "):
            return label
    found = set()
    rest = f" {said} "
    for label in by_length:
        if wanted[label] and f" {wanted[label]} " in rest:
            found.add(label)
            rest = rest.replace(f" {wanted[label]} ", " | ")
    return found.pop() if len(found) == 1 else None


def _plain(text: str) -> str:
    """Lower case, words and digits only, without articles and words such as "answer"."""
    words = re.sub(r"[^\w]+", " ", text.replace("_", " ").casefold()).split()
    kept = [word for word in words if word not in ("the", "an", "answer", "is")]
    # "a" is an article before another word, and an answer ("A.") by itself.
    return " ".join(word for i, word in enumerate(kept) if word != "a" or len(kept) == 1 or i + 1 == len(kept))
