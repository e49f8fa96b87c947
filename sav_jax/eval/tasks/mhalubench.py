"""MHaluBench: is a claim about a picture a hallucination? (Chen et al., ACL 2024, arXiv 2402.03190).

Read from the authors' ``MHaluBench_train.json`` (claims in lists), from their val files (claims in ``segments``) and
from rows of single claims as those of the SAVs release.

The val files were not at hand. Known of them: they are lists of rows with the fields ``id, image_path, response,
segments, model, label, task_type, prompt`` (for v0.1 from the viewer on the data set's page), pictures are found by the
file name in ``image_path``, and there is one ``label`` a row (public code that reads both files so). The authors' own
code and README call the two tasks image-to-text and text-to-image, write claims as
``[{"segment": text, "claims": [{"claim": text}, ...]}, ...]`` and spell labels as below.

**Not seen**: the inside of ``segments`` in the files themselves, the name of a claim's label in it, the values of
``task_type`` in rows, and in what v0.1 and v0.2 differ. Claims are taken to have the form above, with a label under one
of the two names that claims' labels have in the SAVs release, ``claim_label`` (its code) or ``label`` (its data).
Whatever does not fit is an error; nothing is guessed from a row's ``label``.
"""

from __future__ import annotations

from dataclasses import replace
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
_TASK_TYPES = ("image-to-text", "text-to-image")
_VAL = ("MHaluBench_val-v0.2.json", "MHaluBench_val-v0.1.json")

RELEASE = Release(
    "mhalubench",
    "https://huggingface.co/datasets/openkg/MHaluBench",
    dict.fromkeys(("MHaluBench_train.json", *_VAL, "mahalu_train.json", "test.json")),
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
    for name in ("test.json", *_VAL):
        if (folder / name).is_file():
            tested = _read(folder, name)
            return Data(pools[0], tested) if pools else Data(tested)
    if len(pools) == 2:  # the release's support is a part of the authors' rows: ask the others
        return Data(pools[1])
    return Data(pools[0])


def _read(folder: Path, name: str) -> tuple[Item, ...]:
    def items(row: Row) -> list[Item]:
        if "segments" in row.values:
            return _of_segments(row, folder)
        picture = row.picture("image_path", folder, *_PLACES)
        if "claim_list" not in row.values:
            return [_item(row, picture, row.text("claim"), _label(row), str(row.number))]
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


def _of_segments(row: Row, folder: Path) -> list[Item]:
    """Claims of a row of the val files; none of a picture that was made from text."""
    if row.one_of("task_type", _TASK_TYPES) == "text-to-image":
        return []
    picture = row.picture("image_path", folder, *_PLACES)
    key = row.name("id", str(row.number))
    items = []
    for segment in row.objects("segments"):
        place = f"segments[{segment.number}]"
        if segment.values.get("claims") == []:  # a sentence that claims nothing
            continue
        for found in replace(segment, source=f"{row.source}: {place}").objects("claims"):
            claim = replace(found, source=f"{row.source}: {place}.claims[{found.number}]")
            label = _label(claim)
            items.append(_item(row, picture, claim.text("claim"), label, f"{key}-{segment.number}-{found.number}"))
    return items


def _label(claim: Row) -> str:
    """Of a claim with fields of its own."""
    return str(claim.one_of("claim_label" if "claim_label" in claim.values else "label", _LABELS))


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
        split="support is drawn from mahalu_train.json or MHaluBench_train.json; test.json is asked, or else the "
        "image-to-text rows of MHaluBench_val-v0.2.json, or else of v0.1; without these all other claims are, but for "
        "those about pictures of the support. The inside of the val files' segments is not verified: read is "
        '[{"claims": [{"claim", "claim_label" or "label"}]}], all else is an error',
        labels=_LABELS,
        answers={"hallucination": "Yes", "non-hallucination": "No"},
        metrics=(
            Metric("precision", "of claims judged hallucinations, the share that are (MHaluBench)", _precision),
            Metric("recall", "of hallucinations, the share judged so (MHaluBench)", _recall),
        ),
    ),
)
