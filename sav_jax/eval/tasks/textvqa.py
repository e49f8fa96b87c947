"""TextVQA: questions about text in pictures (Singh et al., CVPR 2019)."""

from __future__ import annotations

from pathlib import Path

from sav_jax.eval.tasks.base import Data, Item, Task
from sav_jax.eval.tasks.release import Release
from sav_jax.eval.tasks.rows import Row, nested_objects, read_items
from sav_jax.eval.tasks.scoring import VQA_ACCURACY, commonest
from sav_jax.eval.tasks.vqa import SHORT_ANSWER
from sav_jax.examples import Example

_FILE = "TextVQA_0.5.1_{}.json"

RELEASE = Release(
    "textvqa",
    "https://textvqa.org/dataset/",
    {_FILE.format("val"): 5000},
    pictures="train_images/: the pictures of train and val (https://dl.fbaipublicfiles.com/textvqa/images/"
    "train_val_images.zip)",
    optional={_FILE.format("train"): 34602},
)


def _load(folder: Path) -> Data:
    RELEASE.require("textvqa", folder)
    queries = _read(folder, "val")
    return Data(_read(folder, "train"), queries) if (folder / _FILE.format("train")).is_file() else Data(queries)


def _read(folder: Path, part: str) -> tuple[Item, ...]:
    def items(row: Row) -> list[Item]:
        image, references = row.text("image_id"), tuple(row.texts("answers"))
        picture = row.picture("image_id", folder, "train_images", name=f"{image}.jpg")
        question = SHORT_ANSWER.format(question=row.text("question"))
        name = row.name("question_id", f"{part}-{row.number}")
        example = Example(question, (picture,), commonest(references), id=name, source=row.source)
        return [Item(example, group=image, references=references)]

    return read_items(RELEASE, folder, _FILE.format(part), items, nested_objects("data"))


TASKS = (
    Task(
        "textvqa",
        "questions about text in the picture, 5,000 in val, without OCR tokens in the prompt (TextVQA 0.5.1)",
        _load,
        source="Singh et al.: Towards VQA Models That Can Read (CVPR 2019, arXiv 1904.08920); prompt of LLaVA-1.5 "
        "(arXiv 2310.03744), which adds the words that an OCR system found: this does not",
        release=RELEASE,
        prompt=SHORT_ANSWER.replace("\n", "\\n"),
        split="support is drawn from train (from val, of other pictures, if there is no train), and the commonest "
        "answer shown; val is asked",
        metric="vqa_acc",
        metrics=(VQA_ACCURACY,),
        generative=True,
    ),
)
