"""ScienceQA: multiple-choice questions of school science, some with a picture (Lu et al., NeurIPS 2022)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from sav_jax.errors import UserError
from sav_jax.eval.tasks.base import Data, Item, Task
from sav_jax.eval.tasks.release import Release
from sav_jax.eval.tasks.rows import Row, json_whole, read_items
from sav_jax.eval.tasks.scoring import per_answer
from sav_jax.examples import Example

_PROBLEMS, _SPLITS = "problems.json", "pid_splits.json"
_LETTERS = "ABCDE"
_PROMPT = (
    "Context: {hint}\n{question}\nA. {choice}\nB. ...\nAnswer with the option's letter from the given choices directly."
)

RELEASE = Release(
    "scienceqa",
    "https://github.com/lupantech/ScienceQA (data/scienceqa)",
    {_PROBLEMS: 21208, _SPLITS: None},
    pictures="images/train/ and images/test/: a folder per problem with its picture",
)


def _load(task: str, *, pictures_only: bool) -> Callable[[Path], Data]:
    def load(folder: Path) -> Data:
        folder = folder.with_name(RELEASE.folder)
        RELEASE.require(task, folder)
        parts = _parts(folder)

        def items(row: Row) -> list[tuple[str, Item]]:
            part = parts.get(row.key)
            item = _item(row, folder, part or "")
            wanted = part is not None and (item.example.images or not pictures_only)
            return [(row.key, item)] if wanted else []

        found = dict(read_items(RELEASE, folder, _PROBLEMS, items))
        absent = [name for name in parts if name not in found] if not pictures_only else []
        if absent:
            raise UserError(f"{folder / _SPLITS}: names problem {absent[0]!r}, which {_PROBLEMS} has not")
        train, test = (tuple(found[n] for n in parts if n in found and parts[n] == of) for of in ("train", "test"))
        return Data(train, test)

    return load


def _parts(folder: Path) -> dict[str, str]:
    """Problem -> "train" or "test"."""
    content = json_whole(folder / _SPLITS)
    found: dict[str, str] = {}
    for part in ("train", "test"):
        names = content.get(part) if isinstance(content, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f'{folder / _SPLITS}: field "{part}" must be a list of strings')
        found |= dict.fromkeys(names, part)
    return found


def _item(row: Row, folder: Path, part: str) -> Item:
    choices = row.texts("choices")
    if len(choices) > len(_LETTERS):
        raise row.bad("choices", f"holds {len(choices)} choices; there are {len(_LETTERS)} at most")
    answer = row.whole("answer")
    if not 0 <= answer < len(choices):
        raise row.bad("answer", f"is {answer}, the place of none of the {len(choices)} choices")
    hint = row.values.get("hint") or ""
    if not isinstance(hint, str):
        raise row.bad("hint", "must be a string")
    lines = [f"Context: {hint.strip()}"] if hint.strip() else []
    lines += [row.text("question").strip(), *(f"{a}. {b}" for a, b in zip(_LETTERS, choices, strict=False))]
    lines.append("Answer with the option's letter from the given choices directly.")
    images: tuple[Path, ...] = ()
    if part and row.values.get("image") is not None:
        images = (row.picture("image", folder, "images", name=f"{part}/{row.key}/{row.text('image')}"),)
    letter = _LETTERS[answer]
    return Item(
        Example("\n".join(lines), images, letter, id=row.key, source=row.source),
        offered=tuple(_LETTERS[: len(choices)]),
        references=(letter,),
        subset="with picture" if images else "without picture",
    )


def parse_scienceqa(text: str, item: Item) -> str | None:
    """The letter that a text answers with, as LLaVA's eval_science_qa.py reads it: the letter alone, or followed by a
    full stop and a space at the beginning of the text, or after "The answer is ".
    """
    said = text.strip().replace("\n", ". ")
    first = re.match(r"([A-E])\. ", said)
    named = re.search(r"The answer is ([A-E])\.", said) or re.search(r"The answer is ([A-E])", said)
    found = said if said in tuple(_LETTERS) else first[1] if first else named[1] if named else None
    return found if found in item.offered else None


_ACCURACY = per_answer(
    "acc",
    'share of the questions answered with the right letter: alone, "B. ...", or "The answer is B" (LLaVA)',
    lambda text, item: float(text == item.label),
)

TASKS = tuple(
    Task(
        name,
        description,
        _load(name, pictures_only=pictures_only),
        source="Lu et al.: Learn to Explain (NeurIPS 2022, arXiv 2209.09513); prompt: the form for multiple choice of "
        "LLaVA-1.5 (docs/Evaluation.md of its release), the hint in front as in lmms-eval",
        release=RELEASE,
        prompt=_PROMPT.replace("\n", "\\n"),
        split="support is drawn from train; test is asked",
        parse=parse_scienceqa,
        metrics=(_ACCURACY,),
        generative=True,
    )
    for name, description, pictures_only in (
        ("scienceqa", "multiple-choice questions of school science, 4,241 in test (ScienceQA)", False),
        ("scienceqa-image", "those with a picture, whose accuracy LLaVA calls SQA-I (ScienceQA)", True),
    )
)
