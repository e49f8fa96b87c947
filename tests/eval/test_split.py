"""Splits: who is shown, who is asked, and what may not be in both."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from eval_made import grey_items, grey_task
from hypothesis import given
from hypothesis import strategies as st

from sav_jax import Example, UserError
from sav_jax.eval.tasks import TASKS, Data, Item, split_task
from sav_jax.eval.tasks.base import Digests

DIGITS = TASKS["digits"].load(Path())


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    assert DIGITS.queries is None
    data = load_digits()
    assert len(DIGITS.pool) == len(data.images) == 1797
    assert [item.label for item in DIGITS.pool] == [str(target) for target in data.target]
    assert {item.example.question for item in DIGITS.pool} == {"What digit is this?"}
    for i in (0, 1000, 1796):
        (image,) = DIGITS.pool[i].example.load_images()
        pixels = np.asarray(image)
        assert (pixels == pixels[..., :1]).all()
        np.testing.assert_array_equal(np.round(pixels[..., 0] * (16 / 255)), data.images[i])


def ids(items: tuple[Item, ...]) -> list[str]:
    return [item.example.id for item in items]


def test_split() -> None:
    split = split_task(TASKS["digits"], DIGITS, shots=20, seed=0)
    assert Counter(item.label for item in split.support) == dict.fromkeys("0123456789", 20)
    assert split.labels == tuple("0123456789")
    assert split.available == len(split.queries) == 1597
    assert split.leaked == 0
    assert not set(ids(split.support)) & set(ids(split.queries))
    assert split == split_task(TASKS["digits"], DIGITS, shots=20, seed=0)
    assert split.digest != split_task(TASKS["digits"], DIGITS, shots=20, seed=1).digest


def test_fewer_shots_and_limits_are_part_of_more() -> None:
    many, few = (split_task(TASKS["digits"], DIGITS, shots, seed=3) for shots in (20, 5))
    assert set(ids(few.support)) < set(ids(many.support))
    limited = split_task(TASKS["digits"], DIGITS, 20, seed=3, limit=50)
    assert limited.available == 1597
    asked = ids(many.queries)
    positions = [asked.index(name) for name in ids(limited.queries)]
    assert len(positions) == 50
    assert positions == sorted(positions)
    assert len({item.label for item in limited.queries}) == 10


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"shots": 7}, "task grey: class 'bright' has 6 examples, fewer than --shots 7"),
        ({"shots": 6}, "task grey: --shots 6 leaves no queries"),
        ({"shots": 0}, "at least 1, not 0"),
        ({"shots": 2, "limit": 0}, "--limit must be at least 1"),
        ({"shots": 2, "seed": -1}, "seed must not be negative"),
    ],
)
def test_impossible_splits(options: dict[str, int], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        split_task(grey_task(), Data(grey_items()), options["shots"], options.get("seed", 0), options.get("limit"))


def test_labels_must_be_the_tasks() -> None:
    task = dataclasses.replace(grey_task(), labels=("dark", "middle"))
    with pytest.raises(UserError, match="task grey: 'bright' is none of its labels"):
        split_task(task, Data(grey_items()), 2, 0)
    ordered = dataclasses.replace(grey_task(), labels=("middle", "bright", "dark"))
    assert split_task(ordered, Data(grey_items()), 2, 0).labels == ("middle", "bright", "dark")
    items = grey_items()
    with pytest.raises(UserError, match=r'grey\[0\]: field "label" is \'bright\', which no support example has'):
        split_task(grey_task(), Data(tuple(i for i in items if i.label != "bright"), items[:3]), 2, 0)


def grouped(count: int = 8) -> tuple[Item, ...]:
    """Pairs: one picture, a right and a wrong claim."""
    rng = np.random.default_rng(1)
    items = []
    for i in range(count):
        image = PIL.Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
        for label in ("yes", "no"):
            example = Example(f"Claim {label} {i}?", (image,), label, id=f"{i}{label}")
            items.append(Item(example, group=str(i), role=label))
    return tuple(items)


@given(seed=st.integers(0, 1000), shots=st.integers(1, 3), limit=st.integers(1, 12))
def test_groups_are_never_split(seed: int, shots: int, limit: int) -> None:
    split = split_task(grey_task(), Data(grouped()), shots, seed)
    shown = {item.group for item in split.support}
    assert not shown & {item.group for item in split.queries}
    assert len(shown) + len(split.queries) // 2 == 8
    limited = split_task(grey_task(), Data(grouped()), shots, seed, limit)
    assert set(Counter(item.group for item in limited.queries).values()) == {2}
    assert 2 <= len(limited.queries) <= max(2, limit)


def test_a_query_that_stands_in_the_support_is_refused_and_counted() -> None:
    items = grey_items()
    # The same picture and question under another label is as much of a leak.
    twins = tuple(dataclasses.replace(item, example=dataclasses.replace(item.example, id="twin")) for item in items[:2])
    data = Data(items[:12], (*items[12:], *twins))
    pattern = r"task grey: 2 queries also stand in the support.* the first being grey\[0\] = grey\[0\] \(--allow-leak"
    with pytest.raises(UserError, match=pattern):
        split_task(grey_task(), data, 4, 0)
    split = split_task(grey_task(), data, 4, 0, allow_leak=True)
    assert split.leaked == 2
    assert len(split.queries) == 8
    other_question = tuple(
        dataclasses.replace(item, example=dataclasses.replace(item.example, question="How dark?")) for item in twins
    )
    assert split_task(grey_task(), Data(items[:12], (*items[12:], *other_question)), 4, 0).leaked == 0


def test_a_picture_that_was_saved_again_is_the_same_picture(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    arrays = rng.integers(0, 255, (4, 6, 8, 3), dtype=np.uint8)
    pictures = [PIL.Image.fromarray(array) for array in arrays]
    for i, image in enumerate(pictures):
        image.save(tmp_path / f"{i}.png")
    pictures[1].save(tmp_path / "again.bmp")
    pictures[2].transpose(PIL.Image.Transpose.ROTATE_90).save(
        tmp_path / "turned.png", exif=PIL.Image.Exif()
    )  # other pixels of another size

    def item(file: str, label: str) -> Item:
        return Item(Example("What?", (tmp_path / file,), label, id=file, source=file))

    pool = (item("0.png", "a"), item("1.png", "b"))
    queries = (item("2.png", "a"), item("3.png", "b"), item("turned.png", "a"))
    assert split_task(grey_task(), Data(pool, queries), 1, 0).leaked == 0
    resaved = Data(pool, (*queries, item("again.bmp", "a"), Item(Example("What?", (pictures[0],), "a", id="memory"))))
    with pytest.raises(UserError, match=r"2 queries also stand in the support.*the first being again\.bmp = 1\.png"):
        split_task(grey_task(), resaved, 1, 0)
    assert split_task(grey_task(), resaved, 1, 0, allow_leak=True).leaked == 2
    # Only pictures of the same size and question are decoded; what is no picture is found before any model runs.
    (tmp_path / "odd.png").write_bytes(b"GIF89a no picture")
    with pytest.raises(UserError, match=r"odd\.png cannot be read"):
        split_task(grey_task(), Data(pool, (*queries, item("odd.png", "a"))), 1, 0)


def test_digest_depends_on_all_that_a_method_sees() -> None:
    dark, bright = PIL.Image.new("RGB", (2, 2)), PIL.Image.new("RGB", (2, 2), "white")
    variants = [
        Example("What?", (dark,), "a"),
        Example("Who?", (dark,), "a"),
        Example("What?", (dark,), "b"),
        Example("What?", (bright,), "a"),
        Example("What?", (dark, dark), "a"),
    ]
    digests = Digests()
    assert len({digests.whole(Item(example)) for example in variants}) == 5
    assert len({digests.prompt(Item(example)) for example in variants}) == 4
    same = Item(Example("What?", (dark.copy(),), "a", id="7", source="x"))
    assert digests.whole(same) == digests.whole(Item(variants[0]))
