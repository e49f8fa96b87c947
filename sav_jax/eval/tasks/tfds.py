"""Image classification sets of tensorflow-datasets, read without TensorFlow. Preparing them needs it, once.

Any set with one picture and one class per example can be asked for by its name there: ``tfds:dtd``,
``tfds:eurosat/rgb``, ``tfds:cifar10:3.0.2``.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sav_jax.errors import UserError
from sav_jax.eval.tasks.base import Data, Item, Task
from sav_jax.eval.tasks.release import Release
from sav_jax.examples import EncodedImage, Example

PREFIX = "tfds:"
_PLAIN = "What is in the image? Answer with the class name."
_OPTIONS_SEED = 0  # of the options that a question offers
_QUERY_SPLITS = ("test", "validation")

_Question = Callable[[str, Sequence[str], int], tuple[str, tuple[str, ...]]]
"""Text and offered labels of a question, from (right label, all labels, number of the example)."""


def _release(name: str) -> Release:
    set_name = name.partition("/")[0]
    return Release(
        set_name,
        "the set's authors, by tensorflow-datasets",
        {"**/dataset_info.json": None},
        pictures=f'prepare it once with: pip install "sav-jax[prepare]" && {_preparing(name, Path("DATA_DIR"))}',
    )


def _preparing(name: str, data_dir: Path) -> str:
    arguments = f"{name!r}, data_dir={str(data_dir)!r}, file_format='array_record'"
    return f'python -c "import tensorflow_datasets as tfds; tfds.builder({arguments}).download_and_prepare()"'


def _named(name: str) -> str:
    return f"set {name} of tensorflow-datasets"


def _load(name: str, question: _Question) -> Callable[[Path], Data]:
    """A reader of the set ``name``."""

    def load(folder: Path) -> Data:
        builder = _builder(name, folder.parent)
        image, label = _features(name, builder)
        names = [shown(name) for name in builder.info.features[label].names]
        splits = builder.info.splits
        if "train" not in splits:
            raise UserError(f"{_named(name)}: has no split called train, only {', '.join(splits)}")
        asked = next((split for split in _QUERY_SPLITS if split in splits), None)
        first = _items(name, builder, "train", image, label, names, question)
        if asked is None:
            return Data(_twins_together(first))
        everything = _twins_together(first + _items(name, builder, asked, image, label, names, question))
        return Data(everything[: len(first)], everything[len(first) :])

    return load


def _builder(name: str, data_dir: Path) -> Any:
    """The builder of a set that was prepared."""
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise UserError(f'{_named(name)}: reading it needs tensorflow-datasets: pip install "sav-jax[data]"') from None
    path, _, version = name.partition(":")
    # Beside our own folder, where tensorflow-datasets puts things by itself.
    roots = [data_dir, Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()]
    found: list[Path] = []
    for root in roots:
        infos = sorted((root / path).glob("**/dataset_info.json"))
        found = [info.parent for info in infos if not version or info.parent.name == version]
        if found:
            break
    if not found:
        nothing = f"{_named(name)}: nothing prepared in {' or '.join(str(root / path) for root in roots)}"
        known = tfds.list_builders(with_community_datasets=False)
        if (plain := path.partition("/")[0]) not in known:
            near = difflib.get_close_matches(plain, known, n=3)
            hint = f" (did you mean {' or '.join(near)}?)" if near else ""
            raise UserError(f"{nothing}, and tensorflow-datasets has no set of that name{hint}")
        raise UserError(f'{nothing}; prepare it once: pip install "sav-jax[prepare]" && {_preparing(name, data_dir)}')
    if len(found) > 1:
        named = ", ".join(f"{PREFIX}{info.parent.relative_to(root).as_posix()}:{info.name}" for info in found)
        raise UserError(f"{_named(name)}: prepared in several forms; name one: {named}")
    stored = json.loads((found[0] / "dataset_info.json").read_text(encoding="utf-8")).get("fileFormat", "tfrecord")
    if stored != "array_record":
        raise UserError(
            f"{_named(name)}: {found[0]} was prepared as {stored}, which only TensorFlow reads; remove that "
            f"folder and prepare it again: {_preparing(name, root)}"
        )
    return tfds.builder_from_directory(found[0])


def _features(name: str, builder: Any) -> tuple[str, str]:
    """Names of the only picture and the only class, or of those that the set calls input and target."""
    from tensorflow_datasets.core.features import ClassLabel, Image

    features = builder.info.features
    keys = builder.info.supervised_keys
    if (
        keys
        and len(keys) == 2
        and all(isinstance(key, str) for key in keys)
        and isinstance(features[keys[0]], Image)
        and isinstance(features[keys[1]], ClassLabel)
    ):
        return keys[0], keys[1]
    pictures = [key for key, feature in features.items() if isinstance(feature, Image)]
    classes = [key for key, feature in features.items() if isinstance(feature, ClassLabel)]
    if len(pictures) == len(classes) == 1:
        return pictures[0], classes[0]
    raise UserError(
        f"{_named(name)}: has {len(pictures)} pictures and {len(classes)} classes per example; a classification "
        "set has one of each"
    )


def _items(
    name: str,
    builder: Any,
    split: str,
    image: str,
    label: str,
    names: Sequence[str],
    question: _Question,
) -> tuple[Item, ...]:
    """A split's examples; their pictures stay where they are."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.features import Image

    # Pictures stay encoded, masks and the like among them.
    still = {key: tfds.decode.SkipDecoding() for key, kind in builder.info.features.items() if isinstance(kind, Image)}
    source = builder.as_data_source(split=split, decoders=still)
    items = []
    for number in range(len(source)):
        record = source[number]
        right = names[int(record[label])]
        asked, offered = question(right, names, number)
        example = Example(
            asked,
            (EncodedImage(partial(_encoded, source, number, image)),),
            right,
            id=f"{split}-{number}",
            source=f"{PREFIX}{name} {split}[{number}]",
        )
        # The digest groups pictures that the set holds twice; it is replaced below.
        items.append(Item(example, group=hashlib.sha256(bytes(record[image])).hexdigest(), offered=offered))
    return tuple(items)


def _encoded(source: Any, number: int, image: str) -> bytes:
    return bytes(source[number][image])


def _twins_together(items: tuple[Item, ...]) -> tuple[Item, ...]:
    """Make a group of items with the same picture, so that none of them is support when another is asked."""
    count = Counter(item.group for item in items)
    return tuple(dataclasses.replace(item, group=item.group if count[item.group] > 1 else "") for item in items)


def _four_options(stem: str) -> _Question:
    """The SAVs release's form: four classes, the right one among them, drawn and ordered by a fixed seed."""

    def question(right: str, names: Sequence[str], number: int) -> tuple[str, tuple[str, ...]]:
        rng = np.random.default_rng([_OPTIONS_SEED, number])
        others = [name for name in names if name != right]
        wrong = rng.choice(len(others), size=3, replace=False)
        options = [right, *(others[i] for i in wrong)]
        offered = tuple(options[i] for i in rng.permutation(4))
        listed = " ".join(f"{letter}. {name}" for letter, name in zip("ABCD", offered, strict=True))
        return f"\n{stem}\n{listed} Answer with the class name.", offered

    return question


def _plain(text: str) -> _Question:
    return lambda right, names, number: (text, ())


def shown(label: str) -> str:
    """A class name as people write it."""
    return label.replace("_", " ")


def tfds_task(name: str) -> Task:
    """The task of any classification set of tensorflow-datasets, by its name there: NAME, NAME/CONFIG, NAME:VERSION."""
    return Task(
        f"{PREFIX}{name.replace('/', '.')}",  # a part of file names
        f"which class is it? The set {name} of tensorflow-datasets",
        _load(name, _plain(_PLAIN)),
        source=f"tensorflow-datasets, {name}",
        release=_release(name),
        prompt=_PLAIN,
        split="support is drawn from train; test is asked, or validation, or else all the others",
    )


def _two_forms(name: str, stem: str, description: str, source: str, class_prompt: str, split: str) -> tuple[Task, Task]:
    """A set with the four options of the SAVs release, and plainly."""
    plain = f"{stem} Answer with the class name."
    common: dict[str, Any] = {
        "release": _release(name),
        "split": split,
        "class_prompt": class_prompt,
    }
    return (
        Task(
            name,
            f"{description}, four offered (as SAVs asks)",
            _load(name, _four_options(stem)),
            source=f"{source}; prompt of SAVs (arXiv 2412.00142)",
            prompt=f"\\n{stem}\\nA. {{class}} B. {{class}} C. {{class}} D. {{class}} Answer with the class name.",
            **common,
        ),
        Task(
            f"{name}-plain",
            f"{description}, none offered",
            _load(name, _plain(plain)),
            source=source,
            prompt=plain,
            **common,
        ),
    )


TASKS = (
    *_two_forms(
        "eurosat",
        "What type of remote sensing image does the given image belong to?",
        "which of 10 kinds of land is it? 27,000 satellite pictures (EuroSAT, RGB)",
        "Helber et al.: EuroSAT: A Novel Dataset and Deep Learning Benchmark for Land Use and Land Cover "
        "Classification (2019, arXiv 1709.00029), as eurosat/rgb of tensorflow-datasets",
        "a satellite photo of {label}.",
        "support is drawn from all 27,000, the others are asked (there is no official test split)",
    ),
    *_two_forms(
        "oxford_iiit_pet",
        "What type of animal is in the image?",
        "which of 37 breeds of cats and dogs is it? 3,669 queries (Oxford-IIIT Pet)",
        "Parkhi et al.: Cats and Dogs (CVPR 2012), as oxford_iiit_pet of tensorflow-datasets",
        "a photo of a {label}, a type of pet.",
        "support is drawn from train (3,680); test is asked (3,669)",
    ),
)
