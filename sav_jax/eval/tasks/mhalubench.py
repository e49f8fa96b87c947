"""MHaluBench: is a claim about a picture a hallucination? (Chen et al., ACL 2024, arXiv 2402.03190).

Read from the authors' ``MHaluBench_train.json`` (claims in lists) and from rows of single claims as those of the SAVs
release. The authors' val files nest claims in ``segments``; they are to be flattened to such rows.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sav_jax.eval.metrics import Answers, Metric
from sav_jax.eval.tasks.base import Data, Item, Task
from sav_jax.eval.tasks.release import Release
from sav_jax.eval.tasks.rows import Row, read_items
from sav_jax.examples import Example

_PROMPT = "\nClaim:{claim}. Is the Claim hallucinating? Answer the question with Yes or No."
_LABELS = ("hallucination", "non-hallucination")
_PLACES = ("images", "data/image-to-text")

RELEASE = Release(
    "mhalubench",
    "https://huggingface.co/datasets/openkg/MHaluBench",
    {"MHaluBench_train.json": None, "mahalu_train.json": None, "test.json": None},
    pictures="images/ or data/image-to-text/: its pictures (COCO 2014 and TextVQA among them); mahalu_train.json (40 "
    "rows) is the support of https://github.com/chancharikmitra/SAVs, test.json rows as in it: "
    '{"image_path", "claim", "label": "hallucination" or "non-hallucination"}',
    anyof=True,
)


def _load(folder: Path) -> Data:
    RELEASE.require("mhalubench", folder)
    pools = [
        _read(folder, name) for name in ("mahalu_train.json", "MHaluBench_train.json") if (folder / name).is_file()
    ]
    if (folder / "test.json").is_file():
        tested = _read(folder, "test.json")
        return Data(pools[0], tested) if pools else Data(tested)
    if len(pools) == 2:  # the release's support is a part of the authors' rows: ask the others
        return Data(pools[1])
    return Data(pools[0])


def _read(folder: Path, name: str) -> tuple[Item, ...]:
    def items(row: Row) -> list[Item]:
        picture = row.picture("image_path", folder, *_PLACES)
        if "claim_list" not in row.values:
            field = "claim_label" if "claim_label" in row.values else "label"
            return [_item(row, picture, row.text("claim"), row.one_of(field, _LABELS), str(row.number))]
        claims, labels = row.texts("claim_list"), row.texts("ref_claim_label")
        if len(claims) != len(labels):
            raise row.bad("ref_claim_label", f"has {len(labels)} labels for {len(claims)} claims in claim_list")
        for label in labels:
            if label not in _LABELS:
                raise row.bad("ref_claim_label", f"holds {label!r}, which is neither of {', '.join(_LABELS)}")
        key = row.name("id", str(row.number))
        return [
            _item(row, picture, claim, label, f"{key}-{place}")
            for place, (claim, label) in enumerate(zip(claims, labels, strict=True))
        ]

    return read_items(RELEASE, folder, name, items)


def _item(row: Row, picture: Path, claim: str, label: str, key: str) -> Item:
    example = Example(_PROMPT.format(claim=claim), (picture,), label, id=key, source=row.source)
    return Item(example, group=picture.name)


def _precision(answers: Answers) -> float | None:
    said = np.array([label == _LABELS[0] for label in answers.predictions])
    true = np.array([item.label == _LABELS[0] for item in answers.items])
    return float(true[said].mean()) if said.any() else None


def _recall(answers: Answers) -> float | None:
    said = np.array([label == _LABELS[0] for label in answers.predictions])
    true = np.array([item.label == _LABELS[0] for item in answers.items])
    return float(said[true].mean()) if true.any() else None


TASKS = (
    Task(
        "mhalubench",
        "is a claim about a picture a hallucination? Claims in captions and answers of LMMs (MHaluBench)",
        _load,
        source="Chen et al.: Unified Hallucination Detection for Multimodal Large Language Models (ACL 2024, "
        "arXiv 2402.03190); prompt of SAVs (arXiv 2412.00142)",
        release=RELEASE,
        prompt=_PROMPT.replace("\n", "\\n"),
        split="support is drawn from mahalu_train.json or MHaluBench_train.json, test.json is asked; without test.json "
        "all other claims are, but for those about pictures of the support",
        labels=_LABELS,
        answers={"hallucination": "Yes", "non-hallucination": "No"},
        metrics=(
            Metric("precision", "of claims judged hallucinations, the share that are (MHaluBench)", _precision),
            Metric("recall", "of hallucinations, the share judged so (MHaluBench)", _recall),
        ),
    ),
)
