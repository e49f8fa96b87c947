"""Paths in buckets behave as those on a disk do, and what the service refuses is one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from buckets import Buckets
from checkpoints import picture

import sav_jax
from sav_jax import UserError
from sav_jax._files import check_output_file, check_output_folder, write_file, write_folder
from sav_jax._storage import BucketPath, file_finder, lies_in, local, location
from sav_jax.aim import Aim, Layout, load_aim
from sav_jax.headstore import HeadStore, check_head_array_path, read_head_array, write_head_array
from sav_jax.models.fusion import FusionConfig, initial_params
from sav_jax.train.chats import read_chats
from sav_jax.train.documents import read_documents


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("gs://bucket/a/b", "gs://bucket/a/b"),
        ("gs://bucket/a//b/", "gs://bucket/a/b"),
        ("gs://bucket/", "gs://bucket"),
        (Path("gs://bucket/a"), "gs://bucket/a"),
        (BucketPath("bucket", "a"), "gs://bucket/a"),
        ("a/b", "a/b"),
        (Path("/a"), "/a"),
    ],
)
def test_locations(given: str | Path, shown: str) -> None:
    found = location(given)
    assert str(found) == shown
    assert isinstance(found, BucketPath if shown.startswith("gs:") else Path)
    assert location(found) == found


def test_parts_of_a_path_in_a_bucket() -> None:
    path = location("gs://bucket/a/b.JPG")
    assert (path.name, path.suffix, str(path.parent), str(path.parent.parent)) == (
        "b.JPG",
        ".JPG",
        "gs://bucket/a",
        "gs://bucket",
    )
    assert str(path.parent / "../c" / "./d") == "gs://bucket/c/d"
    assert lies_in(path, path.parent)
    assert lies_in(path, path)
    assert not lies_in(path.parent / "b", path.parent / "bc")


@pytest.mark.parametrize("given", ["s3://bucket/a", "https://x.org/a", "gs://", "gs:///a"])
def test_other_urls(given: str) -> None:
    with pytest.raises(UserError, match="not a path that is known here; use a local one or gs://bucket/name"):
        location(given)
    with pytest.raises(UserError, match=r"a model must lie on a local disk"):
        local(given, "a model")


def test_as_on_a_disk(buckets: Buckets, tmp_path: Path) -> None:
    """The same operations, the same answers: local folder and bucket."""
    found = []
    for root in (location(tmp_path), location("gs://bucket/deep/er")):
        for name in ("b.txt", "a/z.png", "a/b/ü & ?.txt", "a-b.txt", "samples_x.jsonl"):
            write_file(root / name, name.encode())
        write_folder(root / "a", {"y": b"1", "x": b"2"})
        (root / "b.txt").unlink()
        (root / "b.txt").unlink(missing_ok=True)
        with pytest.raises(FileNotFoundError) as missing:
            (root / "b.txt").read_bytes()
        with pytest.raises(FileNotFoundError):
            (root / "b.txt").unlink()
        with pytest.raises(FileNotFoundError):
            root.read_bytes() if isinstance(root, BucketPath) else (root / "none").read_bytes()
        with pytest.raises(UserError, match="is a file; the output is a folder"):
            check_output_folder(root / "a/x")
        with pytest.raises(UserError, match="is a folder; the output is a file"):
            check_output_file(root / "a")
        with pytest.raises(UserError, match=r"holds other things \(no run.json\)"):
            check_output_folder(root / "a", "run.json")
        finds = file_finder()
        found.append(
            [
                missing.value.strerror,
                sorted(path.name for path in root.iterdir()),
                sorted(path.name for path in root.glob("*.txt")),
                [(root / name).is_file() for name in ("a", "a/x", "a/b", "none")],
                [(root / name).is_dir() for name in ("a", "a/x", "a/b", "none")],
                [(root / name).exists() for name in ("a", "a/x", "a/b", "none")],
                [finds(root / name) for name in ("a/x", "a/y", "a/none")],
                (root / "a/b/ü & ?.txt").read_text(encoding="utf-8"),
                [check_output_folder(root / name, "x") == root / name for name in ("a", "new")],
            ]
        )
    assert found[0] == found[1]
    assert "deep/er/a/b/ü & ?.txt" in buckets.objects["bucket"]
    assert not [name for name in buckets.objects["bucket"] if name.endswith(".tmp")]


def test_what_says_that_all_is_there_comes_last(buckets: Buckets) -> None:
    write_folder("gs://bucket/clf", {"tensors": b"1", "json": b"2"})
    assert buckets.writes == ["bucket/clf/tensors", "bucket/clf/json"]
    buckets.writes.clear()
    write_head_array("gs://bucket/heads", np.ones((3, 1, 2, 4), np.float32), [{"id": str(i)} for i in range(3)])
    assert buckets.writes[-1] == "bucket/heads/meta.json"


def test_refusals_come_before_the_work(buckets: Buckets) -> None:
    refused = r"somebody does not have storage.objects.create access\.$"
    for bucket, why in (("locked", refused), ("none", r"The specified bucket does not exist\.$")):
        for check in (check_output_folder, check_output_file, check_head_array_path):
            with pytest.raises(UserError, match=f"gs://{bucket}/a: cannot be written: .*{why}") as caught:
                check(f"gs://{bucket}/a")
            assert "\n" not in str(caught.value)
    store = HeadStore.open("gs://locked/heads")
    with pytest.raises(UserError, match=f"gs://locked/heads: .*{refused}"):
        store.write(["0" * 8], np.zeros((1, 1, 1, 1), np.float32))
    buckets.objects["bucket"]["theirs/meta.json"] = b"{}", 1
    with pytest.raises(UserError, match="gs://bucket/theirs: exists and is not a head array"):
        check_head_array_path("gs://bucket/theirs")
    assert set(buckets.objects["bucket"]) == {"theirs/meta.json"}


def test_a_head_array_in_a_bucket(buckets: Buckets, tmp_path: Path) -> None:
    """The objects are the files of a local one; a half-written one is no array, and is written over."""
    rng = np.random.default_rng(0)
    heads, rows = rng.normal(size=(5, 2, 3, 4)).astype(np.float32), [{"id": str(i)} for i in range(5)]
    write_head_array(tmp_path / "heads", heads, rows)
    check_head_array_path("gs://bucket/heads")
    write_head_array("gs://bucket/heads", heads, rows)
    files = [path for path in (tmp_path / "heads").rglob("*") if path.is_file()]
    stored = {path.relative_to(tmp_path / "heads").as_posix(): path.read_bytes() for path in files}
    assert buckets.contents("bucket", "heads") == stored
    np.testing.assert_array_equal(read_head_array("gs://bucket/heads")[0], heads)
    del buckets.objects["bucket"]["heads/meta.json"]
    with pytest.raises(UserError, match="gs://bucket/heads: not a complete head array"):
        read_head_array("gs://bucket/heads")
    write_head_array("gs://bucket/heads", heads[:2], rows[:2])
    assert len(read_head_array("gs://bucket/heads")[1]) == 2


def test_an_overloaded_service_is_asked_again(buckets: Buckets) -> None:
    buckets.put("bucket", "a", b"1")
    buckets.failing = 1
    assert location("gs://bucket/a").read_bytes() == b"1"


def test_rows_and_pictures_in_a_bucket(buckets: Buckets, tmp_path: Path) -> None:
    """Relative, absolute and class folders; what is wrong names the row."""
    for i, name in enumerate(("photos/day/a.png", "photos/day/in/b.png", "photos/night/c.png", "photos/.hidden/d.png")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(20, 24, seed=i).save(tmp_path / name)
        buckets.put("bucket", name, (tmp_path / name).read_bytes())
    buckets.put("bucket", "photos/night/notes.txt", b"")
    (tmp_path / "photos/night/notes.txt").touch()
    here = sav_jax.read_examples(tmp_path / "photos", "When?")
    there = sav_jax.read_examples("gs://bucket/photos", "When?")
    assert [e.id for e in there] == [e.id for e in here] == ["day/a.png", "day/in/b.png", "night/c.png"]
    for a, b in zip(here, there, strict=True):
        assert (a.label, a.image_digests(), a.image_sizes()) == (b.label, b.image_digests(), b.image_sizes())
        assert np.array_equal(np.asarray(a.load_images()[0]), np.asarray(b.load_images()[0]))

    rows = '{"question": "?", "image": "../photos/day/a.png"}\n{"question": "?", "image": "gs://bucket/photos/night/c.png"}'
    buckets.put("bucket", "rows/rows.jsonl", rows.encode())
    (tmp_path / "rows.jsonl").write_text(rows.replace("../", ""))
    for file in ("gs://bucket/rows/rows.jsonl", tmp_path / "rows.jsonl"):
        digests = [example.image_digests() for example in sav_jax.read_examples(file)]
        assert digests == [here[0].image_digests(), here[2].image_digests()]

    for line, problem in (
        ('{"question": "?", "image": "none.png"}', r'1: field "image" names .none.png., which does not exist'),
        ('{"question": "?", "image": "https://x.org/a.png"}', "must be the path of a local file, or gs://bucket/name"),
        ('{"question": "?", "video": "a.mp4"}', "a video must lie on a local disk"),
    ):
        buckets.put("bucket", "a.mp4", b"")
        buckets.put("bucket", "bad.jsonl", line.encode())
        with pytest.raises(UserError, match=problem):
            sav_jax.read_examples("gs://bucket/bad.jsonl")
    with pytest.raises(UserError, match=r"gs://bucket/none.jsonl: no such file or folder"):
        sav_jax.read_examples("gs://bucket/none.jsonl")
    buckets.put("bucket", "photos/day/a.png", b"no picture")
    with pytest.raises(UserError, match=r"gs://bucket/photos/day/a.png cannot be read: not a picture"):
        there[0].load_images()


def test_training_data_and_projections_in_a_bucket(buckets: Buckets, tmp_path: Path) -> None:
    picture(20, 24).save(tmp_path / "a.png")
    buckets.put("bucket", "images/a.png", (tmp_path / "a.png").read_bytes())
    said = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."}]
    pair = {"image": "images/a.png", "text": "this"}
    for name, rows in (
        ("chats", [{"image": "images/a.png", "conversations": said}]),
        ("documents", [{"segments": [pair, pair]}]),
        ("bad", [{"segments": [pair, {**pair, "image": "b.png"}]}]),
    ):
        buckets.put("bucket", f"{name}.json", json.dumps(rows).encode())
    [chat] = read_chats("gs://bucket/chats.json")
    [document] = read_documents("gs://bucket/documents.json")
    [elsewhere] = read_chats("gs://bucket/chats.json", "gs://bucket/images/..")
    for example in (chat.media, elsewhere.media, *document):
        assert example.images == (location("gs://bucket/images/a.png"),)
        assert example.load_images()[0].size == (24, 20)
    with pytest.raises(
        UserError, match=r"bad.json:1: field .segments., item 1: .* names 'b.png', which does not exist"
    ):
        read_documents("gs://bucket/bad.json")

    config = FusionConfig(8, "linear")
    aim = Aim(Layout(), config, initial_params(config, 0, "random", 1.0), "fingerprint", "name")
    aim.save("gs://bucket/run/projection")
    assert load_aim("gs://bucket/run").digest == aim.digest
    with pytest.raises(UserError, match=r"gs://bucket/none/aim.json: missing"):
        load_aim("gs://bucket/none")
