"""NaturalBench: two questions about two pictures, with opposite answers (Li et al., 2024, arXiv 2410.14669).

The VQA form is read from the authors' parquet files or from an export of their columns as rows, with paths for
pictures; the retrieval form from the rows of the SAVs release.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from sav_jax.errors import UserError
from sav_jax.eval.tasks.base import Data, Item, Task
from sav_jax.eval.tasks.groups import all_right, joined
from sav_jax.eval.tasks.parquet import parquet_objects
from sav_jax.eval.tasks.release import Release
from sav_jax.eval.tasks.rows import Row, read_items
from sav_jax.examples import Example

ROLES = ("q0i0", "q0i1", "q1i0", "q1i1")
"""Question and picture of a group's four items, in the order of both releases."""

# Appended without a space, as by the authors (lmms-eval puts one).
_SUFFIXES = {
    "yes_no": "Please answer Yes or No.",
    "multiple_choice": "Please output the letter corresponding to the correct option.",
}
_ANSWERS = {"yes_no": ("Yes", "No"), "multiple_choice": ("A", "B")}

RELEASE = Release(
    "naturalbench",
    "https://huggingface.co/datasets/BaiqiL/NaturalBench",
    {"data/*.parquet": 1900, "naturalbench.jsonl": 1900},
    pictures="naturalbench.jsonl is an export with the same columns in which Image_0 and Image_1 are paths, such as "
    "images/0_0.jpg",
    anyof=True,
)

RETRIEVAL = Release(
    "naturalbench-retrieval",
    "https://github.com/chancharikmitra/SAVs (data)",
    {"naturalbench_ret_test.jsonl": 3800},
    pictures="images/: its pictures train_00000.jpg ... as exported from "
    "https://huggingface.co/datasets/BaiqiL/NaturalBench",
)
_RELEASED = Release(
    RETRIEVAL.folder,
    RETRIEVAL.address,
    {**RETRIEVAL.files, "naturalbench_ret_train.jsonl": 40},
    RETRIEVAL.pictures,
)


def _load(folder: Path) -> Data:
    def items(row: Row) -> list[Item]:
        kind = row.one_of("Question_Type", tuple(_SUFFIXES))
        pictures = [row.image(f"Image_{i}", folder, "images") for i in (0, 1)]
        group = row.name("Index", str(row.number))
        found = []
        for role in ROLES:
            question, picture = role[1], role[3]
            label = row.one_of(f"Image_{picture}_Question_{question}", _ANSWERS[kind])
            example = Example(
                row.text(f"Question_{question}") + _SUFFIXES[kind],
                (pictures[int(picture)],),
                label,
                id=f"{group}-{role}",
                source=row.source,
            )
            found.append(Item(example, group=group, role=f"{group}/{role}", offered=_ANSWERS[kind], subset=kind))
        return found

    if (folder / "naturalbench.jsonl").is_file():
        return Data(read_items(RELEASE, folder, "naturalbench.jsonl", items))
    if not any(folder.glob("data/*.parquet")):
        RELEASE.require("naturalbench", folder)
    return Data(read_items(RELEASE, folder, "data/*.parquet", items, parquet_objects))


def parse_naturalbench(text: str, item: Item) -> str | None:
    """The authors' reading of an answer: the first of the two offered that occurs as a word, in any case."""
    first, second = (re.search(rf"\b{answer}\b", text, re.IGNORECASE) for answer in item.offered)
    if first is None or second is None:
        return item.offered[0] if first else item.offered[1] if second else None
    return item.offered[0] if first.start() < second.start() else item.offered[1]


# Retrieval


def _retrieval(with_released_support: bool) -> Callable[[Path], Data]:
    def load(folder: Path) -> Data:
        release = _RELEASED if with_released_support else RETRIEVAL
        folder = folder.with_name(release.folder)
        release.require("naturalbench-retrieval" + "-released" * with_released_support, folder)

        def item(row: Row, group: str, role: str) -> Item:
            example = Example(
                f"\n{row.text('question')} Answer with Yes or No.",
                (row.picture("image", folder, "images"),),
                row.one_of("label", ("Yes", "No")),
                id=str(row.number),
                source=row.source,
            )
            return Item(example, group=group, role=f"{group}/{role}" if role else "")

        def tested(row: Row) -> list[Item]:
            return [item(row, str(row.number // 4), ROLES[row.number % 4])]

        queries = read_items(release, folder, "naturalbench_ret_test.jsonl", tested)
        for start in range(0, len(queries), 4):
            _check_group(queries[start : start + 4])
        # A picture with its caption may stand in several groups: they are drawn or asked together.
        queries = joined(queries, lambda item: item.example.images)
        if not with_released_support:
            return Data(queries)
        return Data(
            read_items(release, folder, "naturalbench_ret_train.jsonl", lambda row: [item(row, "", "")]), queries
        )

    return load


def _check_group(items: tuple[Item, ...]) -> None:
    """Rows have no column for their places in a group: make sure that nothing was taken out or moved."""
    examples = [item.example for item in items]
    if len(examples) < 4:
        raise UserError(f"{examples[0].source}: begins a group of {len(examples)} rows; every four rows are a group")
    for field, first, second in (("question", 0, 1), ("question", 2, 3), ("image", 0, 2), ("image", 1, 3)):
        values = [(examples[i].question, examples[i].images)[field == "image"] for i in (first, second)]
        if values[0] != values[1]:
            raise UserError(
                f'{examples[second].source}: field "{field}" differs from {examples[first].source}: every four rows '
                "are a group of two questions (rows 0, 1 and 2, 3) about two pictures (rows 0, 2 and 1, 3)"
            )


def _question(item: Item) -> str:
    return item.role[:-2]


def _picture(item: Item) -> str:
    return f"{_group(item)}/{item.role[-2:]}"


def _group(item: Item) -> str:
    return item.role.rpartition("/")[0]


METRICS = (
    all_right("q_acc", "share of the questions answered rightly about both pictures (chance: 0.25)", _question, 2),
    all_right(
        "i_acc", "share of the pictures about which both questions are answered rightly (chance: 0.25)", _picture, 2
    ),
    all_right("g_acc", "share of the groups with all four answers right (chance: 0.0625)", _group, 4),
)
_SOURCE = (
    "Li et al.: NaturalBench: Evaluating Vision-Language Models on Natural Adversarial Samples (NeurIPS 2024, "
    "arXiv 2410.14669)"
)
_RETRIEVAL_PROMPT = "\\nDoes this image show '{caption}'? Answer with Yes or No."

TASKS = (
    Task(
        "naturalbench",
        "two questions about two pictures, each with opposite answers: 1,900 groups of four (NaturalBench, VQA)",
        _load,
        source=_SOURCE,
        release=RELEASE,
        prompt="{question}Please answer Yes or No. | {question}Please output the letter corresponding to the correct "
        "option.",
        split="support is drawn from all groups; groups of which an item was drawn are not asked",
        labels=("Yes", "No", "A", "B"),
        parse=parse_naturalbench,
        metric="g_acc",
        metrics=METRICS,
    ),
    Task(
        "naturalbench-retrieval",
        "is this the picture's caption? Two captions and two pictures: 950 groups of four (NaturalBench, retrieval)",
        _retrieval(False),
        source=f"{_SOURCE}; rows and prompt of SAVs (arXiv 2412.00142)",
        release=RETRIEVAL,
        prompt=_RETRIEVAL_PROMPT,
        split="support is drawn from naturalbench_ret_test.jsonl; groups that share a picture with it are not asked",
        labels=("Yes", "No"),
        metric="g_acc",
        metrics=METRICS,
    ),
    Task(
        "naturalbench-retrieval-released",
        "the same with the released support of 40 rows, which 53 of the queries repeat: needs --allow-leak",
        _retrieval(True),
        source=f"{_SOURCE}; rows and prompt of SAVs (arXiv 2412.00142)",
        release=_RELEASED,
        prompt=_RETRIEVAL_PROMPT,
        split="support is drawn from naturalbench_ret_train.jsonl (20 rows per class); all rows of "
        "naturalbench_ret_test.jsonl are asked, those 40 and 13 equal ones among them",
        labels=("Yes", "No"),
        metric="g_acc",
        metrics=METRICS,
    ),
)
