"""BLINK: fourteen kinds of questions about one to four pictures (Fu et al., ECCV 2024, arXiv 2404.12390).

Only val has answers: support is drawn from it, all other questions are asked. Read from the authors' parquet files or
from rows as those of the SAVs release.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sav_jax.eval.tasks.base import Data, Item, Task
from sav_jax.eval.tasks.parquet import parquet_objects
from sav_jax.eval.tasks.release import Release
from sav_jax.eval.tasks.rows import Row, read_items
from sav_jax.examples import IMAGE_MARK, AnyImage, Example

# Name -> questions in val, letters, what is asked.
_KINDS = {
    "Art_Style": (117, 2, "which picture is in the style of the first?"),
    "Counting": (120, 4, "how many are there?"),
    "Forensic_Detection": (132, 4, "which picture is a real photograph?"),
    "Functional_Correspondence": (130, 4, "which point serves the same purpose on the second object?"),
    "IQ_Test": (150, 4, "which picture goes on with the pattern?"),
    "Jigsaw": (150, 2, "which picture is the missing part of the first?"),
    "Multi-view_Reasoning": (133, 2, "does the camera move left or right?"),
    "Object_Localization": (122, 2, "which box is right?"),
    "Relative_Depth": (124, 2, "which point is closer?"),
    "Relative_Reflectance": (134, 3, "which point has the darker surface?"),
    "Semantic_Correspondence": (139, 4, "which point means the same on the second object?"),
    "Spatial_Relation": (143, 2, "do two things stand so?"),
    "Visual_Correspondence": (172, 4, "which point is the same point of the scene?"),
    "Visual_Similarity": (135, 2, "which picture is most like the first?"),
}
# SAVs says "options" in these and "choices" in the others.
_OPTIONS = ("Multi-view_Reasoning", "Object_Localization", "Visual_Correspondence")
_PICTURES = ("image_1", "image_2", "image_3", "image_4")
_LETTERS = ("(A)", "(B)", "(C)", "(D)")


def _release(kind: str) -> Release:
    count = _KINDS[kind][0]
    return Release(
        "blink",
        "https://huggingface.co/datasets/BLINK-Benchmark/BLINK",
        {f"{kind}/val-*.parquet": count, f"{kind}.json": count},
        pictures=f"{kind}.json is a list of rows as those of SAVs, "
        '{"question", "label": "(A)", "image_1": "val_..._1.png", ..., "image_4"}, with the pictures in images/',
        anyof=True,
    )


def task_name(kind: str) -> str:
    """The task's name for the authors' name of a kind of question."""
    return f"blink-{kind.lower().replace('_', '-')}"


def _load(kind: str) -> Callable[[Path], Data]:
    release, letters = _release(kind), _LETTERS[: _KINDS[kind][1]]

    def pictures(row: Row, folder: Path) -> tuple[AnyImage, ...]:
        named = [field for field in _PICTURES if row.values.get(field) is not None]
        if not named:
            raise row.bad("image_1", "is missing")
        return tuple(row.image(field, folder, "images") for field in named)

    def published(row: Row, folder: Path) -> list[Item]:
        shown = pictures(row, folder)
        choices = row.texts("choices")
        offered = _LETTERS[: len(choices)]
        listed = " ".join(f"{letter} {choice}" for letter, choice in zip(offered, choices, strict=False))
        word = "options" if kind in _OPTIONS else "choices"
        question = f"{IMAGE_MARK}\n" * len(shown) + f"{row.text('question')} Select from the following {word}. {listed}"
        return _made(row, question, shown, row.one_of("answer", offered), offered)

    def as_savs(row: Row, folder: Path) -> list[Item]:
        question = row.text("question")
        offered = tuple(letter for letter in _LETTERS if letter in question) or letters
        return _made(row, question, pictures(row, folder), row.one_of("label", offered), offered)

    def _made(row: Row, question: str, shown: tuple[AnyImage, ...], label: str, offered: tuple[str, ...]) -> list[Item]:
        name = row.name("idx", str(row.number))
        example = Example(question, shown, label, id=name, source=row.source)
        return [Item(example, offered=offered)]

    def load(folder: Path) -> Data:
        folder = folder.with_name(release.folder)
        release.require(task_name(kind), folder)
        if (folder / f"{kind}.json").is_file():
            return Data(read_items(release, folder, f"{kind}.json", lambda row: as_savs(row, folder)))
        pattern = f"{kind}/val-*.parquet"
        return Data(read_items(release, folder, pattern, lambda row: published(row, folder), parquet_objects))

    return load


TASKS = tuple(
    Task(
        task_name(kind),
        f"{asked} {count} questions with {letters} choices (BLINK, {kind})",
        _load(kind),
        source="Fu et al.: BLINK: Multimodal Large Language Models Can See but Not Perceive (ECCV 2024, "
        "arXiv 2404.12390); prompt of SAVs (arXiv 2412.00142)",
        release=_release(kind),
        prompt="<image>\\n (for each picture) {question} Select from the following "
        f"{'options' if kind in _OPTIONS else 'choices'}. (A) {{choice}} (B) {{choice}} ...",
        split="support is drawn from val; all other questions of val are asked (test has no answers)",
        labels=_LETTERS[:letters],
    )
    for kind, (count, letters, asked) in _KINDS.items()
)

GROUPS = {"blink": tuple(task.name for task in TASKS)}
