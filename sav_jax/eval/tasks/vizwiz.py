"""VizWiz: can a question by a blind photographer be answered from the picture? (Gurari et al., CVPR 2018).

Read from the authors' ``train.json`` and ``val.json``, or from rows as those of the SAVs release.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sav_jax.eval.metrics import Answers, Metric, Units
from sav_jax.eval.tasks.base import Data, Item, Task
from sav_jax.eval.tasks.release import Release
from sav_jax.eval.tasks.rows import Row, read_items
from sav_jax.eval.tasks.vqa import normalise_vqa, vqa_accuracy
from sav_jax.examples import Example

_PROMPT = (
    "\n{question} \nWhen the provided information is insufficient, respond with Unanswerable.\n"
    "Answer the question using a single word or phrase."
)
_LABELS = ("answerable", "unanswerable")

RELEASE = Release(
    "vizwiz-answerable",
    "https://vizwiz.org/tasks-and-datasets/vqa/ (Annotations.zip)",
    {"val.json": 4319, "val.jsonl": None},
    pictures="train/ and val/: its pictures; val.jsonl and train.jsonl are rows as those of SAVs, with "
    '"image", "question", "question_id" and "label": "answerable" or "unanswerable"',
    optional={"train.json": 20523, "train.jsonl": None},
    anyof=True,
)


def _load(folder: Path) -> Data:
    RELEASE.require("vizwiz-answerable", folder)
    queries = _read(folder, "val")
    if not any((folder / name).is_file() for name in RELEASE.optional):
        return Data(queries)
    return Data(_read(folder, "train"), queries)


def _read(folder: Path, part: str) -> tuple[Item, ...]:
    def published(row: Row) -> list[Item]:
        answerable = row.one_of("answerable", (1, 0))
        references = tuple(answer.text("answer") for answer in row.objects("answers"))
        return [_item(row, folder, part, _LABELS[1 - answerable], references)]

    def as_savs(row: Row) -> list[Item]:
        return [_item(row, folder, part, row.one_of("label", _LABELS), ())]

    if (folder / f"{part}.json").is_file():
        return read_items(RELEASE, folder, f"{part}.json", published)
    return read_items(RELEASE, folder, f"{part}.jsonl", as_savs)


def _item(row: Row, folder: Path, part: str, label: str, references: tuple[str, ...]) -> Item:
    example = Example(
        _PROMPT.format(question=row.text("question")),
        (row.picture("image", folder, part),),
        label,
        id=row.name("question_id", f"{part}-{row.number}"),
        source=row.source,
    )
    return Item(example, references=references)


def _parse(text: str, _: Item) -> str | None:
    """What is not said to be unanswerable has been answered."""
    said = normalise_vqa(text)
    if not said:
        return None
    return "unanswerable" if said.split()[0] in ("unanswerable", "unsuitable") else "answerable"


def _soft(answers: Answers) -> Units | None:
    if answers.texts is None or not any(item.references for item in answers.items):
        return None
    if not all(item.references for item in answers.items):
        return None
    values = [vqa_accuracy(text, item.references) for text, item in zip(answers.texts, answers.items, strict=True)]
    return Units(np.array(values), answers.clusters)


TASKS = (
    Task(
        "vizwiz-answerable",
        "can the question be answered from the picture? Asked by blind photographers, 4,319 in val (VizWiz)",
        _load,
        source="Gurari et al.: VizWiz Grand Challenge: Answering Visual Questions from Blind People (CVPR 2018, "
        "arXiv 1802.08218); prompt of SAVs (arXiv 2412.00142)",
        release=RELEASE,
        prompt=_PROMPT.replace("\n", "\\n"),
        split="support is drawn from train (from val if there is no train); val is asked",
        labels=_LABELS,
        parse=_parse,
        metrics=(
            Metric(
                "vqa_acc",
                "VQA accuracy of the written answer: min(n / 3, 1) with n of nine people agreeing, mean over leaving "
                "out each of ten (VQA, VizWiz)",
                _soft,
            ),
        ),
    ),
)
