"""VizWiz: questions of blind photographers about their pictures (Gurari et al., CVPR 2018), and whether these tell.

Read from the authors' ``train.json`` and ``val.json``, or from rows as those of the SAVs release.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from sav_jax.eval.metrics import Answers, Metric, Units
from sav_jax.eval.tasks.base import Data, Item, Task
from sav_jax.eval.tasks.release import Release
from sav_jax.eval.tasks.rows import Row, read_items
from sav_jax.eval.tasks.scoring import VIZWIZ_ACCURACY, commonest
from sav_jax.eval.tasks.vqa import normalise_vqa, vizwiz_accuracy
from sav_jax.examples import Example

_PROMPT = (
    "\n{question} \nWhen the provided information is insufficient, respond with Unanswerable.\n"
    "Answer the question using a single word or phrase."
)
_ANSWER_PROMPT = (
    "{question}\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
    "Answer the question using a single word or phrase."
)
_LABELS = ("answerable", "unanswerable")
_PAPER = (
    "Gurari et al.: VizWiz Grand Challenge: Answering Visual Questions from Blind People (CVPR 2018, arXiv 1802.08218)"
)

RELEASE = Release(
    "vizwiz",
    "https://vizwiz.org/tasks-and-datasets/vqa/ (Annotations.zip)",
    {"val.json": 4319, "val.jsonl": None},
    pictures="train/ and val/: its pictures; val.jsonl and train.jsonl are rows as those of SAVs, with "
    '"image", "question", "question_id" and "label": "answerable" or "unanswerable"',
    optional={"train.json": 20523, "train.jsonl": None},
    anyof=True,
)


ANSWERS = dataclasses.replace(
    RELEASE,
    files={"val.json": 4319},
    optional={"train.json": 20523},
    pictures="train/ and val/: its pictures",
    anyof=False,
)


def _load(folder: Path) -> Data:
    folder = folder.with_name(RELEASE.folder)
    RELEASE.require("vizwiz-answerable", folder)
    queries = _read(folder, "val")
    if not any((folder / name).is_file() for name in RELEASE.optional):
        return Data(queries)
    return Data(_read(folder, "train"), queries)


def _load_answers(folder: Path) -> Data:
    folder = folder.with_name(ANSWERS.folder)
    ANSWERS.require("vizwiz", folder)

    def read(part: str) -> tuple[Item, ...]:
        return read_items(ANSWERS, folder, f"{part}.json", lambda row: [_answered(row, folder, part)])

    queries = read("val")
    return Data(read("train"), queries) if (folder / "train.json").is_file() else Data(queries)


def _answered(row: Row, folder: Path, part: str) -> Item:
    references = tuple(answer.text("answer") for answer in row.objects("answers"))
    item = _item(row, folder, part, commonest(references), references, _ANSWER_PROMPT)
    return dataclasses.replace(item, subset=row.text("answer_type"))


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


def _item(row: Row, folder: Path, part: str, label: str, references: tuple[str, ...], prompt: str = _PROMPT) -> Item:
    example = Example(
        prompt.format(question=row.text("question")),
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
    values = [vizwiz_accuracy(text, item.references) for text, item in zip(answers.texts, answers.items, strict=True)]
    return Units(np.array(values), answers.clusters)


TASKS = (
    Task(
        "vizwiz-answerable",
        "can the question be answered from the picture? Asked by blind photographers, 4,319 in val (VizWiz)",
        _load,
        source=f"{_PAPER}; prompt of SAVs (arXiv 2412.00142)",
        release=RELEASE,
        prompt=_PROMPT.replace("\n", "\\n"),
        split="support is drawn from train (from val if there is no train); val is asked",
        labels=_LABELS,
        parse=_parse,
        metrics=(
            Metric(
                "vqa_acc",
                f"of the written answer: {VIZWIZ_ACCURACY.description}",
                _soft,
            ),
        ),
    ),
    Task(
        "vizwiz",
        "questions of blind photographers about their pictures, 4,319 in val (VizWiz)",
        _load_answers,
        source=f"{_PAPER}; prompt of LLaVA-1.5 (arXiv 2310.03744)",
        release=ANSWERS,
        prompt=_ANSWER_PROMPT.replace("\n", "\\n"),
        split="support is drawn from train (from val if there is no train), and the commonest answer shown; val is "
        "asked",
        metric="vqa_acc",
        metrics=(VIZWIZ_ACCURACY,),
        generative=True,
    ),
)
