"""SugarCrepe: is this caption, or one changed in one detail, the picture's? (Hsieh et al., 2023, arXiv 2306.14610).

Read from the authors' ``add_att.json`` ... or from the rows that the SAVs release made of them, ``SC_add_att.jsonl``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sav_jax.eval.metrics import Answers, Metric, Units
from sav_jax.eval.tasks.base import Data, Item, Task
from sav_jax.eval.tasks.groups import all_right
from sav_jax.eval.tasks.release import Release, warn
from sav_jax.eval.tasks.rows import Row, read_items
from sav_jax.examples import Example

_PAIRS = {
    "add_att": 692,
    "add_obj": 2062,
    "replace_att": 788,
    "replace_obj": 1652,
    "replace_rel": 1406,
    "swap_att": 666,
    "swap_obj": 245,
}
_PROMPT = "Does this image show '{caption}'? Please answer with Yes or No."

RELEASE = Release(
    "sugarcrepe",
    "https://github.com/RAIVNLab/sugar-crepe (data)",
    {f"{subset}.json": count for subset, count in _PAIRS.items()},
    pictures="val2017/: the pictures of COCO 2017 val (http://images.cocodataset.org/zips/val2017.zip)",
    anyof=True,
)
_SAVS = Release(
    RELEASE.folder,
    "https://github.com/chancharikmitra/SAVs (data/sugarcrepe_testset)",
    {f"SC_{subset}.jsonl": 2 * count for subset, count in _PAIRS.items()},
)


def _load(folder: Path) -> Data:
    items: list[Item] = []
    absent = []
    for subset in _PAIRS:
        if (folder / f"{subset}.json").is_file():
            items += read_items(RELEASE, folder, f"{subset}.json", _pair(folder, subset))
        elif (folder / f"SC_{subset}.jsonl").is_file():
            items += read_items(_SAVS, folder, f"SC_{subset}.jsonl", _half(folder, subset))
        else:
            absent.append(subset)
    if not items:
        RELEASE.require("sugarcrepe", folder)
    if absent:
        warn(f"{folder} lacks {', '.join(absent)}: only the other subsets are asked")
    return Data(tuple(items))


def _item(subset: str, key: str, kind: str, caption: str, picture: Path, row: Row) -> Item:
    name = f"{subset}/{key}"
    example = Example(
        _PROMPT.format(caption=caption),
        (picture,),
        "Yes" if kind == "positive" else "No",
        id=f"{name}/{kind}",
        source=row.source,
    )
    # Pairs of one picture are kept together: several subsets share a picture with its caption.
    return Item(example, group=picture.name, role=f"{name}/{kind}", subset=subset)


def _pair(folder: Path, subset: str) -> Callable[[Row], list[Item]]:
    def items(row: Row) -> list[Item]:
        picture = row.picture("filename", folder, "val2017")
        captions = {"positive": row.text("caption"), "negative": row.text("negative_caption")}
        return [_item(subset, str(row.number), kind, caption, picture, row) for kind, caption in captions.items()]

    return items


def _half(folder: Path, subset: str) -> Callable[[Row], list[Item]]:
    def items(row: Row) -> list[Item]:
        asked = re.fullmatch(r"Does this image show '(.*)'\?", row.text("question"), re.DOTALL)
        if asked is None:
            raise row.bad("question", "does not read Does this image show '...'?")
        label = row.one_of("label", ("Yes", "No"))
        # Rows 2i and 2i + 1 are a pair; the release's own question_id skips numbers.
        kind = ("positive", "negative")[row.number % 2]
        if label != ("Yes", "No")[row.number % 2]:
            raise row.bad("label", f"is {label!r}: rows must alternate between Yes and No")
        picture = row.picture("image", folder, "val2017")
        return [_item(subset, str(row.number // 2), kind, asked[1], picture, row)]

    return items


def pair(item: Item) -> str:
    """The pair that an item belongs to."""
    return item.role.rpartition("/")[0]


def _picked(answers: Answers) -> Units | None:
    """Whether the right caption is likelier than the changed one, by the margin of "Yes" over "No"."""
    if answers.scores is None:
        return None
    margin = answers.scores[:, answers.labels.index("Yes")] - answers.scores[:, answers.labels.index("No")]
    pairs: dict[str, dict[str, int]] = {}
    for place, item in enumerate(answers.items):
        pairs.setdefault(pair(item), {})[item.label] = place
    whole = [halves for halves in pairs.values() if len(halves) == 2]
    if not whole:
        return None
    clusters = answers.clusters
    return Units(
        np.array([float(margin[halves["Yes"]] > margin[halves["No"]]) for halves in whole]),
        tuple(clusters[halves["Yes"]] for halves in whole),
    )


TASKS = (
    Task(
        "sugarcrepe",
        "does this picture show what the caption says? Captions changed in one detail, 7,511 pairs (SugarCrepe)",
        _load,
        source="Hsieh et al.: SugarCrepe: Fixing Hackable Benchmarks for Vision-Language Compositionality (NeurIPS "
        "2023, arXiv 2306.14610); prompt of SAVs (arXiv 2412.00142)",
        release=RELEASE,
        prompt=_PROMPT,
        split="support is drawn from all pictures; captions of a picture of the support are not asked",
        labels=("Yes", "No"),
        metric="pair_acc",
        metrics=(
            all_right(
                "pair_acc",
                "share of the pairs with Yes for the right and No for the changed caption (SAVs; chance: 0.25)",
                pair,
                2,
            ),
            Metric(
                "pick_acc",
                "share of the pairs whose right caption is scored above the changed one (SugarCrepe; chance: 0.5)",
                _picked,
            ),
        ),
    ),
)
