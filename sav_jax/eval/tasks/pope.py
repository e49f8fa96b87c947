"""POPE: is an object in the picture? Yes/no questions about COCO pictures (Li et al., EMNLP 2023, arXiv 2305.10355)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from sav_jax.eval.metrics import Answers, Metric, Units
from sav_jax.eval.tasks.base import Data, Item, Task
from sav_jax.eval.tasks.release import Release
from sav_jax.eval.tasks.rows import Row, read_items
from sav_jax.examples import Example

_SETTINGS = {
    "random": "drawn at random",
    "popular": "among the commonest of the data set",
    "adversarial": "among those that most often occur beside what is in the picture",
}


def _release(setting: str) -> Release:
    return Release(
        "pope",
        "https://github.com/RUCAIBox/POPE (output/coco)",
        {f"coco_pope_{setting}.json": 3000},
        pictures="val2014/: the 500 pictures it names of COCO 2014 val (http://images.cocodataset.org/zips/val2014.zip)",
    )


def _load(setting: str) -> Callable[[Path], Data]:
    release = _release(setting)

    def load(folder: Path) -> Data:
        folder = folder.with_name(release.folder)
        release.require(f"pope-{setting}", folder)

        def items(row: Row) -> list[Item]:
            picture = row.picture("image", folder, "val2014")
            example = Example(
                row.text("text"),
                (picture,),
                row.one_of("label", ("yes", "no")),
                id=row.name("question_id", str(row.number)),
                source=row.source,
            )
            return [Item(example, group=picture.name)]

        return Data(read_items(release, folder, f"coco_pope_{setting}.json", items))

    return load


def parse_pope(text: str, _: Item | None = None) -> str:
    """POPE's reading of an answer: its first sentence says no if "No", "no" or "not" is among its words, else yes.

    As in the authors' evaluate.py: a sentence ends with the first full stop, commas are dropped, words are what lies
    between spaces.
    """
    sentence = text.partition(".")[0].replace(",", "")
    return "no" if {"No", "no", "not"} & set(sentence.split(" ")) else "yes"


def _counts(answers: Answers) -> tuple[int, int, int]:
    """True positives, all predicted, all real ones, "yes" being positive; what is no "no" counts as "yes"."""
    predicted = np.array([label != "no" for label in answers.predictions])
    positive = np.array([item.label == "yes" for item in answers.items])
    return int((predicted & positive).sum()), int(predicted.sum()), int(positive.sum())


def _precision(answers: Answers) -> float | None:
    hits, predicted, _ = _counts(answers)
    return hits / predicted if predicted else None


def _recall(answers: Answers) -> float | None:
    hits, _, positive = _counts(answers)
    return hits / positive if positive else None


def _f1(answers: Answers) -> float | None:
    hits, predicted, positive = _counts(answers)
    return 2 * hits / (predicted + positive) if predicted + positive else None


def _yes_ratio(answers: Answers) -> Units:
    return Units(np.array([float(label != "no") for label in answers.predictions]), answers.clusters)


METRICS = (
    Metric("precision", 'of those answered "yes", the share that is (POPE)', _precision),
    Metric("recall", 'of those that are "yes", the share answered so (POPE)', _recall),
    Metric("f1", "2 precision recall / (precision + recall) (POPE)", _f1),
    Metric("yes_ratio", 'share of the answers that are "yes"; half of the right ones are (POPE)', _yes_ratio),
)

TASKS = tuple(
    Task(
        f"pope-{setting}",
        f"is an object in the picture? Absent ones are {how} (POPE, COCO val2014)",
        _load(setting),
        source="Li et al.: Evaluating Object Hallucination in Large Vision-Language Models (EMNLP 2023, "
        "arXiv 2305.10355)",
        release=_release(setting),
        prompt="Is there a {object} in the image?",
        split="support is drawn from all pictures; other questions about a picture of the support are not asked",
        labels=("yes", "no"),
        answers={"yes": "Yes", "no": "No"},
        parse=parse_pope,
        metrics=METRICS,
    )
    for setting, how in _SETTINGS.items()
)

GROUPS = {"pope": tuple(task.name for task in TASKS)}
