"""Reading a label out of what a model wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping


def parse_answer(text: str, answers: Mapping[str, str]) -> str | None:
    """Find the one label that a text answers with.

    Option letters ("(A)", "B") are recognised by how they are written: the text is the letter, begins with it and a
    mark ("B. a dog"), or holds exactly one such letter in brackets or as a word in capitals. For other answers, in this
    order, each ignoring case, articles and punctuation: the whole text is an answer; it begins with one; it holds
    exactly one. Of answers that contain each other ("cat", "black cat") the longest counts.

    Args:
      text: what the model wrote.
      answers: label -> the answer that stands for it.

    Returns:
      The label, or None if no answer or several different ones are found.
    """
    letters = {match[1]: label for label, answer in answers.items() if (match := _LETTER_ANSWER.fullmatch(answer))}
    if len(letters) == len(answers):
        return _parse_letter(text.strip(), letters)
    said = _plain(text)
    wanted = {label: _plain(answer) for label, answer in answers.items()}
    by_length = sorted(wanted, key=lambda label: -len(wanted[label]))
    for label in by_length:
        if wanted[label] and f"{said} ".startswith(f"{wanted[label]} "):
            return label
    found = set()
    rest = f" {said} "
    for label in by_length:
        if wanted[label] and f" {wanted[label]} " in rest:
            found.add(label)
            rest = rest.replace(f" {wanted[label]} ", " | ")
    return found.pop() if len(found) == 1 else None


_LETTER_ANSWER = re.compile(r"\(?([A-Z])\)?")


def _parse_letter(text: str, letters: Mapping[str, str]) -> str | None:
    known = "".join(letters)
    start = re.match(rf"\(?([{known}{known.lower()}])(?:[).:,]|$)", text)
    if start:
        return letters[start[1].upper()]
    bracketed = set(re.findall(rf"\(([{known}])\)", text))
    # "A" as a word in capitals is an article more often than an answer, unless it ends the text ("Answer: A").
    words = set(re.findall(rf"\b([{known}])\b(?!\s+\w)", text)) or set(re.findall(rf"\b([{known}])\b", text)) - {"A"}
    found = bracketed or words
    return letters[found.pop()] if len(found) == 1 else None


def _plain(text: str) -> str:
    """Lower case, words and digits only, without articles and without "answer" and "is"."""
    words = re.sub(r"\W+", " ", text.replace("_", " ").casefold()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the", "answer", "is"))
