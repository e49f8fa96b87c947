"""Tasks by name, their cards, drawn tasks, and tasks of the user's own."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from sav_jax.errors import UserError
from sav_jax.eval.metrics import Answers, Units
from sav_jax.eval.parsing import parse_answer
from sav_jax.eval.tasks import GROUPS, TASKS, Data, Item, card, find_task, find_tasks, split_task
from sav_jax.eval.tasks.files import from_files
from sav_jax.eval.tasks.groups import joined
from sav_jax.eval.tasks.release import Release, find_picture
from sav_jax.examples import EncodedImage, Example
from sav_jax.train.tiny_data import HELD_OUT_SEEDS
from sav_jax.world.glyphs import HELD_OUT_FACES
from sav_jax.world.objects import HARMFUL, HARMLESS
from sav_jax.world.scene import Scene, draw, sample_scene
from sav_jax.world.several import sample_images

DRAWN = (
    "drawn-textures", "drawn-glyphs", "drawn-hallucination", "drawn-safety", "drawn-paired", "drawn-multiimage",
    "drawn-styles",
)  # fmt: skip


@cache
def loaded(name: str) -> Data:
    return TASKS[name].load(Path("nowhere") / name)


# Names


def test_names() -> None:
    assert [task.name for task in find_tasks(" digits, pope ,pope-random,digits")] == ["digits", *GROUPS["pope"]]
    assert len(find_task("blink")) == 14
    assert find_task("tfds:dtd")[0].name == "tfds:dtd"
    for name, members in GROUPS.items():
        assert name not in TASKS
        assert set(members) <= TASKS.keys()
    for name in TASKS:
        assert find_tasks(name) == [TASKS[name]]
        assert not set(name) & set("/, "), "names are parts of file names and of lists"


@pytest.mark.parametrize("name", ["nothing", "tfds:", "Digits"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(
        UserError, match=rf"no task is called '{name}'.*; 'sav-jax eval --tasks list' prints all, and tfds:"
    ):
        find_tasks(f"digits,{name}")


def test_no_names() -> None:
    with pytest.raises(UserError, match="no task is named; 'sav-jax eval --tasks list' prints all"):
        find_tasks(" , ")


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.labels])
def test_answers_are_read_back(name: str) -> None:
    """What the model has to answer for a label stands for this label."""
    task = TASKS[name]
    assert task.labels is not None
    for label in task.labels:
        if task.parse is None:
            assert parse_answer(task.answer(label), {label: task.answer(label) for label in task.labels}) == label
        elif name == "drawn-glyphs":
            assert task.parse(task.answer(label), Item(Example("Is it?"))) == label
        elif name != "vizwiz-answerable":  # which is answered in free words
            offered = ("A", "B") if label in ("A", "B") else ("Yes", "No")
            assert task.parse(task.answer(label), Item(Example("Is it?"), offered=offered)) == label


# Cards


@pytest.mark.parametrize("name", list(TASKS))
def test_cards(name: str, tmp_path: Path) -> None:
    task = TASKS[name]
    text = card(task, tmp_path)
    assert text.startswith(f"{name}\n{'=' * len(name)}\n\nasked ")
    plain = " ".join(text.split())
    for part in (task.description, task.source, task.split, f"metric {task.metric}: ", f"version {task.version}"):
        assert " ".join(part.split()) in plain
    assert task.source
    assert task.prompt
    for metric in task.metrics:
        assert f"{metric.name}: {metric.description}" in plain
    if task.release is not None:
        assert f"in {tmp_path / task.release.folder}: NOT THERE" in plain
        assert str(task.release) in plain
    # Readable in a terminal: only an address or a command that cannot be broken may be longer than a line.
    for line in text.splitlines():
        assert len(line) <= 100 or len(line.split()) == 1


def test_a_card_says_when_the_data_are_there(tmp_path: Path) -> None:
    (tmp_path / "pope").mkdir()
    (tmp_path / "pope" / "coco_pope_random.json").touch()
    assert f"in {tmp_path / 'pope'}: there. Expected:" in " ".join(card(TASKS["pope-random"], tmp_path).split())
    assert "NOT THERE (coco_pope_popular.json missing)" in " ".join(card(TASKS["pope-popular"], tmp_path).split())


# Drawn tasks


@pytest.mark.parametrize("name", DRAWN)
def test_drawn_tasks(name: str) -> None:
    task, data = TASKS[name], loaded(name)
    assert data.queries is not None
    assert 1000 <= len(data.queries) <= 2000
    for part in (data.pool, data.queries):
        count = Counter(item.label for item in part)
        assert set(count) == set(task.labels or ())
        assert len(set(count.values())) == 1, "classes are balanced"
        assert count.most_common()[0][1] >= 50
        assert {item.example.load_images()[0].size for item in part[:20]} == {(32, 32)}
        seeds = [int(item.example.id.partition("-")[0]) for item in part]
        assert min(seeds) > HELD_OUT_SEEDS + 10**9, "beyond all that the bundled model was trained and evaluated on"
    digests = [
        {(item.example.question, *item.example.image_digests()) for item in part} for part in (data.pool, data.queries)
    ]
    assert not digests[0] & digests[1]
    assert len(digests[1]) == len(data.queries), "no query is asked twice"
    split = split_task(task, data, 20, 0)
    assert (split.leaked, split.available) == (0, len(data.queries))


def test_drawn_tasks_are_the_same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from sav_jax.eval.tasks import drawn

    faces = []

    def noting(scene: Scene) -> PIL.Image.Image:
        faces.append(scene.thing.face)
        return draw(scene)

    monkeypatch.setattr(drawn, "draw", noting)
    for name in ("drawn-glyphs", "drawn-hallucination"):
        again = TASKS[name].load(Path("elsewhere"))
        for first, second in zip(loaded(name).pool[:40], again.pool[:40], strict=True):
            assert first.example.question == second.example.question
            assert first.example.image_digests() == second.example.image_digests()
    assert set(faces) == {"", *HELD_OUT_FACES}, "glyphs are in faces that training never draws"


@pytest.mark.parametrize(
    ("text", "letter"), [("a", "a"), ("B.", "b"), ("It is a q", "q"), ("The letter is a", "a"), ("seven", None)]
)
def test_letters_are_read(text: str, letter: str | None) -> None:
    parse = TASKS["drawn-glyphs"].parse
    assert parse is not None
    assert parse(text, Item(Example("What letter is this?"))) == letter


@pytest.mark.parametrize("name", ["drawn-textures", "drawn-glyphs", "digits-scattered"])
def test_pixels_say_nothing_about_what_is_drawn(name: str) -> None:
    """The class centroids of 50 raw pictures each are hardly better than guessing."""
    task, data = TASKS[name], loaded(name)
    split = split_task(task, data, 50, 0)

    def pixels(items: tuple[Item, ...]) -> np.ndarray:
        return np.stack([np.asarray(item.example.load_images()[0], np.float32).ravel() for item in items])

    support, labels = pixels(split.support), np.array([item.label for item in split.support])
    centroids = np.stack([support[labels == label].mean(axis=0) for label in split.labels])
    queries = pixels(split.queries)
    nearest = ((centroids**2).sum(axis=1) - 2 * queries @ centroids.T).argmin(axis=1)
    right = np.mean([split.labels[i] == item.label for i, item in zip(nearest, split.queries, strict=True)])
    chance = 1 / len(split.labels)
    # Guessing 1,200 queries or more is right within 3 standard errors of sqrt(chance (1 - chance) / n) <= 0.0125; as
    # much again for what little colours and sizes give away.
    assert abs(right - chance) < 6 * np.sqrt(chance * (1 - chance) / len(queries))


def test_scattered_digits_are_those_of_the_other_task() -> None:
    plain, scattered = (loaded(name).pool for name in ("digits", "digits-scattered"))
    assert [(i.example.id, i.label) for i in plain] == [(i.example.id, i.label) for i in scattered]
    places = set()
    for item in scattered[:300]:
        (image,) = item.example.load_images()
        assert image.size == (32, 32)
        pixels = np.asarray(image, np.float32)
        corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]]
        ground = np.median(corners, axis=0)  # at most one or two corners are under the digit
        inked = np.abs(pixels - ground).max(axis=2) > 24
        assert inked.any()
        columns = np.flatnonzero(inked.any(axis=0))
        assert columns[-1] - columns[0] < 26
        places.add(int(columns.mean()) // 8)
    assert places == {0, 1, 2, 3}
    again = TASKS["digits-scattered"].load(Path("elsewhere")).pool
    assert [i.example.image_digests() for i in again[:20]] == [i.example.image_digests() for i in scattered[:20]]


def test_safety_is_a_rule_over_the_names_of_objects() -> None:
    seen = set()
    for item in loaded("drawn-safety").pool:
        name = sample_scene(int(item.example.id), "object", held_out=True).thing.name
        assert item.label == ("harmful" if name in HARMFUL else "harmless")
        assert name not in item.example.question
        seen.add(name)
    assert seen == {*HARMFUL, *HARMLESS}


def test_paired_questions_have_opposite_answers_about_images_that_differ_in_one_thing() -> None:
    data = loaded("drawn-paired")
    assert data.queries is not None
    groups: dict[str, dict[str, Item]] = {}
    for item in data.queries:
        groups.setdefault(item.group, {})[item.role.rpartition("/")[2]] = item
    assert len(groups) == 300
    assert Counter(group["q0i0"].subset for group in groups.values()) == dict.fromkeys(
        ("color", "shape", "texture", "relation"), 75
    )
    for group in groups.values():
        assert {role: item.label for role, item in group.items()} == {
            "q0i0": "yes", "q0i1": "no", "q1i0": "no", "q1i1": "yes"
        }  # fmt: skip
        assert group["q0i0"].example.question == group["q0i1"].example.question != group["q1i0"].example.question
        pictures = {role: item.example.image_digests() for role, item in group.items()}
        assert pictures["q0i0"] == pictures["q1i0"] != pictures["q0i1"] == pictures["q1i1"]
        words = [group[role].example.question.split() for role in ("q0i0", "q1i1")]
        if group["q0i0"].subset == "relation":
            assert sorted(word.rstrip("?") for word in words[0]) == sorted(word.rstrip("?") for word in words[1])
    answers = tuple(item for item in data.queries[:8])
    guessed = Answers(answers, ("yes", "no"), ("yes", "no", "no", "yes", *4 * ("yes",)))
    values = {}
    for metric in TASKS["drawn-paired"].metrics:
        units = metric.compute(guessed)
        assert isinstance(units, Units)
        values[metric.name] = units.values.tolist()
    assert values == {"q_acc": [1.0, 1.0, 0.0, 0.0], "i_acc": [1.0, 1.0, 0.0, 0.0], "g_acc": [1.0, 0.0]}


def test_two_images_are_compared_as_the_scenes_say() -> None:
    for item in loaded("drawn-multiimage").pool:
        one, two = sample_images(int(item.example.id), held_out=True)
        same = {
            "name": one.thing.name == two.thing.name,
            "color": one.thing.color == two.thing.color,
            "number": len(one.things) == len(two.things),
        }[item.subset]
        assert item.label == ("same" if same else "different")
        assert len(item.example.images) == 2
    counts = Counter((item.subset, item.label) for item in loaded("drawn-multiimage").queries or ())
    assert set(counts.values()) == {200}


def test_styles_are_told_by_the_picture_alone() -> None:
    """The question is always the same, and whatever else agrees or differs does so by chance."""
    data = loaded("drawn-styles")
    assert {item.example.question for item in data.pool} == {TASKS["drawn-styles"].prompt}
    shared: dict[str, list[bool]] = {"same": [], "different": []}
    for item in data.pool:
        one, two = (sample_scene(int(item.example.id) + i, "shape", held_out=True) for i in range(2))
        assert one.thing.size == two.thing.size == "large"
        shared[item.label].append(one.thing.name == two.thing.name)
    # A twelfth of 120 pairs, 10 with a standard deviation of 3, whatever the label.
    assert all(sum(agree) < 10 + 5 * 3 for agree in shared.values())


def test_claims_come_in_pairs() -> None:
    data = loaded("drawn-hallucination")
    assert data.queries is not None
    groups: dict[str, list[Item]] = {}
    for item in (*data.pool, *data.queries):
        groups.setdefault(item.group, []).append(item)
    for true, false in groups.values():
        assert (true.label, false.label) == ("non-hallucination", "hallucination")
        assert true.example.image_digests() == false.example.image_digests()
        swapped = {"small": "large", "large": "small"}
        said = " ".join(swapped.get(word, word) for word in true.example.question.split())
        assert said == false.example.question
    # Each size is claimed as often truly as falsely in the long run, so that the text alone says nothing.
    small = Counter(item.label for item in data.queries if " small " in item.example.question)
    assert abs(small["hallucination"] - small["non-hallucination"]) < 0.25 * sum(small.values())
    (metric,) = TASKS["drawn-hallucination"].metrics
    items = tuple(data.queries[:4])
    half = Answers(
        items, ("hallucination", "non-hallucination"), ("non-hallucination", "hallucination", *2 * ("hallucination",))
    )
    units = metric.compute(half)
    assert isinstance(units, Units)
    assert units.values.tolist() == [1.0, 0.0]
    assert units.clusters == (items[0].group, items[2].group)


# Tasks of the user's own


def test_one_file_may_be_split(tmp_path: Path) -> None:
    rows = [{"question": f"What is {i}?", "label": "odd" if i % 2 else "even"} for i in range(8)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = from_files(path)
    data = task.load(tmp_path)
    assert data.queries is None
    split = split_task(task, data, 2, 0)
    asked = {item.example.question for item in split.queries}
    assert len(asked) == 4
    assert asked | {item.example.question for item in split.support} == {row["question"] for row in rows}
    both = from_files(path, path).load(tmp_path)
    assert both.queries is not None
    assert len(both.queries) == 8
    other = tmp_path / "other.jsonl"
    other.write_text('{"question": "What?", "label": "none"}\n')
    with pytest.raises(UserError, match=r'other.jsonl:1: field "label" is \'none\', which no row of .*rows.jsonl has'):
        from_files(path, other)


# What readers share


def test_a_picture_inside_another_file_is_like_one_by_itself(tmp_path: Path) -> None:
    noise = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    noise.save(tmp_path / "a.png")
    for name in ("a.png", "b.jpg", "c.png"):
        if name != "a.png":
            noise.save(tmp_path / name, exif=exif)
        content = (tmp_path / name).read_bytes()
        inside = Example("What?", (EncodedImage((tmp_path / name).read_bytes),))
        alone = Example("What?", (tmp_path / name,))
        assert inside.image_sizes() == alone.image_sizes() == [(5, 7) if name == "a.png" else (7, 5)]
        assert inside.image_digests() == alone.image_digests() == [hashlib.sha256(content).hexdigest()]
        assert inside.load_images()[0].tobytes() == alone.load_images()[0].tobytes()
    broken = Example("What?", (EncodedImage(lambda: b"not a picture"),), source="set[3]")
    for read in (broken.load_images, broken.image_sizes):
        with pytest.raises(
            UserError, match=r'set\[3\]: field "image": an image in memory cannot be read: not a picture'
        ):
            read()


def test_pictures_are_found_by_the_end_of_their_path(tmp_path: Path) -> None:
    for name in ("train2014/a.jpg", "images/b.jpg", "c.jpg", "images/sub/a.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    places = ("images",)
    assert find_picture(tmp_path, "/home/x/coco/train2014/a.jpg", places) == tmp_path / "train2014" / "a.jpg"
    assert find_picture(tmp_path, "sub/a.jpg", places) == tmp_path / "images" / "sub" / "a.jpg"
    assert find_picture(tmp_path, "/data/b.jpg", places) == tmp_path / "images" / "b.jpg"
    assert find_picture(tmp_path, "c.jpg", places) == tmp_path / "c.jpg"
    assert find_picture(tmp_path, "../c.jpg", places) == tmp_path / "c.jpg"
    assert find_picture(tmp_path, "d.jpg", places) is None
    assert find_picture(tmp_path / "elsewhere", str(tmp_path / "c.jpg"), places) == tmp_path / "c.jpg"


def test_a_release_says_what_is_wanted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    release = Release("some", "https://example.org", {"a.json": 1200, "b/*.json": None}, "and pictures", {"c.json": 5})
    assert (
        str(release)
        == "a.json (1,200 rows), b/*.json; if there also c.json (5 rows) from https://example.org; and pictures"
    )
    assert release.missing(tmp_path) == ["a.json", "b/*.json"]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.json").touch()
    with pytest.raises(UserError, match=r"^task t: .* lacks a.json; put there: a.json \(1,200 rows\), b/"):
        release.require("t", tmp_path)
    anyof = Release("some", "https://example.org", release.files, anyof=True)
    assert anyof.missing(tmp_path) == []
    anyof.require("t", tmp_path)
    release.check_count(tmp_path, "a.json", 1200)
    release.check_count(tmp_path, "b/*.json", 7)
    assert capsys.readouterr().err == ""
    release.check_count(tmp_path, "c.json", 4)
    assert "c.json has 4 rows where the release has 5: results will not compare" in capsys.readouterr().err


def test_groups_that_share_something_are_joined() -> None:
    def item(group: str, key: str) -> Item:
        return Item(Example(f"What is {key}?"), group=group)

    items = [item("1", "a"), item("1", "b"), item("2", "c"), item("3", "b"), item("3", "d"), item("4", "e")]
    items += [item("5", "d"), item("6", "c")]
    found = joined(items, lambda item: item.example.question)
    assert [item.group for item in found] == ["1", "1", "2", "1", "1", "4", "1", "2"]
    assert [item.example for item in found] == [item.example for item in items]
