"""Flickr30k captions: five sentences about each picture (Young et al., TACL 2014), in Karpathy's split."""

from __future__ import annotations

from pathlib import Path

from sav_jax.eval.tasks.base import Data, Item, Task
from sav_jax.eval.tasks.release import Release
from sav_jax.eval.tasks.rows import Row, nested_objects, read_items
from sav_jax.eval.tasks.scoring import CIDER
from sav_jax.examples import Example

_FILE = "dataset_flickr30k.json"
_PROMPT = "Provide a one-sentence caption for the provided image."

RELEASE = Release(
    "flickr30k",
    "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip",
    {_FILE: 31014},
    pictures="flickr30k-images/: its pictures (https://shannon.cs.illinois.edu/DenotationGraph/)",
)


def _load(folder: Path) -> Data:
    RELEASE.require("flickr30k", folder)

    def items(row: Row) -> list[tuple[str, Item]]:
        part = row.one_of("split", ("train", "val", "test"))
        sentences = tuple(sentence.text("raw").strip() for sentence in row.objects("sentences"))
        if part == "val":
            return []
        picture = row.picture("filename", folder, "flickr30k-images")
        example = Example(_PROMPT, (picture,), sentences[0], id=picture.name, source=row.source)
        return [(part, Item(example, references=sentences))]

    found = read_items(RELEASE, folder, _FILE, items, nested_objects("images"))
    train, test = (tuple(item for of, item in found if of == part) for part in ("train", "test"))
    return Data(train, test)


TASKS = (
    Task(
        "flickr30k",
        "a caption of the picture; 1,000 pictures of Karpathy's test split, five references each (Flickr30k)",
        _load,
        source="Young et al.: From image descriptions to visual denotations (TACL 2014); split of Karpathy and Fei-Fei "
        "(CVPR 2015, arXiv 1412.2306); prompt of lmms-eval's task flickr30k, which asks all 31,783 pictures",
        release=RELEASE,
        prompt=_PROMPT,
        split="support is drawn from train (29,000 pictures), whose first sentence is shown; test is asked",
        metric="cider",
        metrics=(CIDER,),
        generative=True,
    ),
)
