"""Hateful Memes: is a picture with its text hateful? (Kiela et al., NeurIPS 2020, arXiv 2005.04790)."""

from __future__ import annotations

from pathlib import Path

from sav_jax.eval.tasks.base import Data, Item, Task
from sav_jax.eval.tasks.release import Release
from sav_jax.eval.tasks.rows import Row, read_items
from sav_jax.examples import Example

_PROMPT = '\nThe text on the image reads: "{text}". Is this meme hateful? Answer the question with Yes or No.'
_LABELS = ("not-hateful", "hateful")
# Asked: the first of these that is there. The first release calls dev_seen dev.
_ASKED = ("test_seen.jsonl", "dev_seen.jsonl", "dev.jsonl")

RELEASE = Release(
    "hateful-memes",
    "https://hatefulmemeschallenge.com",
    {"test_seen.jsonl": 1000, "dev_seen.jsonl": 500, "dev.jsonl": 500},
    pictures="img/: its pictures",
    optional={"train.jsonl": 8500},
    anyof=True,
)


def _load(folder: Path) -> Data:
    RELEASE.require("hateful-memes", folder)

    def items(row: Row) -> list[Item]:
        example = Example(
            _PROMPT.format(text=row.text("text")),
            (row.picture("img", folder, "img"),),
            _LABELS[row.one_of("label", (0, 1))],
            id=row.name("id", str(row.number)),
            source=row.source,
        )
        return [Item(example)]

    asked = next(name for name in _ASKED if (folder / name).is_file())
    queries = read_items(RELEASE, folder, asked, items)
    if (folder / "train.jsonl").is_file():
        return Data(read_items(RELEASE, folder, "train.jsonl", items), queries)
    return Data(queries)


TASKS = (
    Task(
        "hateful-memes",
        "is a picture with its text hateful? 1,000 queries in test_seen, 500 in dev_seen (Hateful Memes)",
        _load,
        source="Kiela et al.: The Hateful Memes Challenge (NeurIPS 2020, arXiv 2005.04790)",
        release=RELEASE,
        prompt=_PROMPT.replace("\n", "\\n"),
        split="support is drawn from train.jsonl; test_seen.jsonl is asked, else dev_seen.jsonl",
        labels=_LABELS,
        answers={"hateful": "Yes", "not-hateful": "No"},
        metric="auroc",
    ),
)
