"""OK-VQA: questions about COCO pictures that need knowledge from elsewhere (Marino et al., CVPR 2019)."""

from __future__ import annotations

from pathlib import Path

from sav_jax.eval.tasks.base import Data, Item, Task
from sav_jax.eval.tasks.release import Release
from sav_jax.eval.tasks.rows import Row, nested_objects, read_items
from sav_jax.eval.tasks.scoring import VQA_ACCURACY, commonest
from sav_jax.eval.tasks.vqa import SHORT_ANSWER
from sav_jax.examples import Example

_QUESTIONS, _ANSWERS = "OpenEnded_mscoco_{}2014_questions.json", "mscoco_{}2014_annotations.json"

RELEASE = Release(
    "okvqa",
    "https://okvqa.allenai.org/download.html",
    {_QUESTIONS.format("val"): 5046, _ANSWERS.format("val"): 5046},
    pictures="val2014/ and train2014/: pictures of COCO 2014 (http://images.cocodataset.org/zips/val2014.zip)",
    optional={_QUESTIONS.format("train"): 9009, _ANSWERS.format("train"): 9009},
)


def _load(folder: Path) -> Data:
    RELEASE.require("okvqa", folder)
    queries = _read(folder, "val")
    if not all((folder / name).is_file() for name in RELEASE.optional):
        return Data(queries)
    return Data(_read(folder, "train"), queries)


def _read(folder: Path, part: str) -> tuple[Item, ...]:
    file = _ANSWERS.format(part)

    def answers(row: Row) -> list[tuple[int, tuple[str, ...]]]:
        return [(row.whole("question_id"), row.replies())]

    known = dict(read_items(RELEASE, folder, file, answers, nested_objects("annotations")))

    def items(row: Row) -> list[Item]:
        number, image = row.whole("question_id"), row.whole("image_id")
        if number not in known:
            raise row.bad("question_id", f"is {number}, to which {file} has no answers")
        place = f"{part}2014"
        picture = row.picture("image_id", folder, place, name=f"COCO_{place}_{image:012}.jpg")
        question = SHORT_ANSWER.format(question=row.text("question"))
        example = Example(question, (picture,), commonest(known[number]), id=str(number), source=row.source)
        return [Item(example, group=picture.name, references=known[number])]

    return read_items(RELEASE, folder, _QUESTIONS.format(part), items, nested_objects("questions"))


TASKS = (
    Task(
        "okvqa",
        "questions about COCO pictures that need knowledge from elsewhere, 5,046 in val (OK-VQA)",
        _load,
        source="Marino et al.: OK-VQA (CVPR 2019, arXiv 1906.00067); prompt of LLaVA-1.5 (arXiv 2310.03744)",
        release=RELEASE,
        prompt=SHORT_ANSWER.replace("\n", "\\n"),
        split="support is drawn from train (from val, of other pictures, if there is no train), and the commonest "
        "answer shown; val is asked",
        metric="vqa_acc",
        metrics=(VQA_ACCURACY,),
        generative=True,
    ),
)
