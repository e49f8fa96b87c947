"""GQA: compositional questions about Visual Genome pictures (Hudson and Manning, CVPR 2019)."""

from __future__ import annotations

from pathlib import Path

from sav_jax.eval.tasks.base import Data, Item, Task
from sav_jax.eval.tasks.release import Release
from sav_jax.eval.tasks.rows import Row, read_items
from sav_jax.eval.tasks.scoring import per_answer
from sav_jax.eval.tasks.vqa import SHORT_ANSWER
from sav_jax.examples import Example

_ASKED, _SHOWN = "testdev_balanced_questions.json", "val_balanced_questions.json"

RELEASE = Release(
    "gqa",
    "https://cs.stanford.edu/people/dorarad/gqa/download.html (questions1.2.zip)",
    {_ASKED: 12578},
    pictures="images/: its pictures (https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip)",
    optional={_SHOWN: 132062},
)


def _load(folder: Path) -> Data:
    RELEASE.require("gqa", folder)
    queries = _read(folder, _ASKED)
    return Data(_read(folder, _SHOWN), queries) if (folder / _SHOWN).is_file() else Data(queries)


def _read(folder: Path, file: str) -> tuple[Item, ...]:
    def items(row: Row) -> list[Item]:
        image, answer = row.text("imageId"), row.text("answer")
        picture = row.picture("imageId", folder, "images", name=f"{image}.jpg")
        question = SHORT_ANSWER.format(question=row.text("question"))
        return [Item(Example(question, (picture,), answer, id=row.key, source=row.source), image, references=(answer,))]

    return read_items(RELEASE, folder, file, items)


def parse_gqa(text: str, _: Item | None = None) -> str:
    """What is compared with the answer, as LLaVA prepares it for GQA's scorer: without full stops at the end, in lower
    case.
    """
    return text.strip().rstrip(".").lower()


TASKS = (
    Task(
        "gqa",
        "compositional questions about pictures of Visual Genome, 12,578 in testdev-balanced (GQA)",
        _load,
        source="Hudson and Manning: GQA (CVPR 2019, arXiv 1902.09506); prompt of LLaVA-1.5 (arXiv 2310.03744)",
        release=RELEASE,
        prompt=SHORT_ANSWER.replace("\n", "\\n"),
        split="support is drawn from val-balanced (from testdev, of other pictures, if there is no val); testdev is "
        "asked",
        parse=parse_gqa,
        metric="exact_match",
        metrics=(
            per_answer(
                "exact_match",
                "share of the answers that are the right one, letter by letter, in lower case and without a full stop "
                "at the end (GQA, LLaVA)",
                lambda text, item: float(text == item.label),
            ),
        ),
        generative=True,
    ),
)
