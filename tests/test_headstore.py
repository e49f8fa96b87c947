"""The feature cache under races, kills and damage, and the array that ``sav-jax extract`` writes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from sav_jax import headstore
from sav_jax._storage import kvstore_spec
from sav_jax.errors import UserError
from sav_jax.headstore import (
    HeadStore,
    check_head_array_path,
    default_cache_dir,
    read_head_array,
    write_head_array,
)

SHAPE = (3, 4, 5)

# What the writer processes below run: value i is a function of i alone, as features are of their content.
WRITER = textwrap.dedent(
    """
    import hashlib, sys, time
    import numpy as np
    from sav_jax.headstore import HeadStore

    path, count, seconds_per_batch = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    keys = [hashlib.sha256(b"%d" % i).hexdigest() for i in range(count)]
    store = HeadStore.open(path)
    missing = store.missing(keys)
    print(len(missing), flush=True)
    for start in range(0, len(missing), 8):
        batch = missing[start : start + 8]
        heads = [np.random.default_rng(i).standard_normal((3, 4, 5), np.float32) for i in batch]
        store.write([keys[i] for i in batch], np.stack(heads))
        time.sleep(seconds_per_batch)
    """
)


def keys_of(count: int) -> list[str]:
    return [hashlib.sha256(b"%d" % i).hexdigest() for i in range(count)]


def values_of(count: int) -> np.ndarray:
    return np.stack([np.random.default_rng(i).standard_normal(SHAPE, np.float32) for i in range(count)])


def start_writer(path: Path, count: int, seconds_per_batch: float = 0.0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), str(count), str(seconds_per_batch)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def finish(writer: subprocess.Popen[str]) -> int:
    """Wait for a writer that should succeed; returns how many keys it found missing."""
    output, _ = writer.communicate(timeout=60)
    assert writer.returncode == 0
    return int(output)


def objects(path: Path) -> dict[str, bytes]:
    """The stored objects (TensorStore's lock files, which a killed writer may leave, are not objects)."""
    files = (file for file in path.rglob("*") if file.is_file() and not file.name.endswith(".__lock"))
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def test_what_is_written_is_read_in_any_order(tmp_path: Path) -> None:
    keys, heads = keys_of(20), values_of(20)
    store = HeadStore.open(tmp_path / "a" / "cache")
    assert store.missing(keys) == list(range(20))

    store.write(keys[5:12], heads[5:12])
    assert store.missing(keys) == [*range(5), *range(12, 20)]
    assert store.missing(keys[6:8]) == []

    store.write(keys, heads)
    order = [7, 0, 19, 7]
    read = HeadStore.open(str(tmp_path / "a" / "cache")).read([keys[i] for i in order])
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, heads[order])


def test_more_keys_than_reads_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headstore, "_READS_IN_FLIGHT", 3)
    store = HeadStore.open(tmp_path)
    store.write(keys_of(8), values_of(8))
    np.testing.assert_array_equal(store.read(keys_of(8)), values_of(8))


def test_empty_requests(tmp_path: Path) -> None:
    store = HeadStore.open(tmp_path)
    assert store.missing([]) == []
    store.write([], np.zeros((0, *SHAPE), np.float32))
    assert objects(tmp_path) == {}
    with pytest.raises(ValueError, match="at least one key"):
        store.read([])


def test_values_that_are_not_numbers_survive(tmp_path: Path) -> None:
    heads = np.full((1, *SHAPE), -0.0, np.float32)
    heads[0, 0, 0, :3] = np.nan, np.inf, -np.inf
    store = HeadStore.open(tmp_path)
    store.write(keys_of(1), heads)
    assert store.read(keys_of(1)).tobytes() == heads.tobytes()


def test_the_first_value_of_a_key_stays(tmp_path: Path) -> None:
    keys, heads = keys_of(3), values_of(3)
    store = HeadStore.open(tmp_path)
    store.write(keys[:2], heads[:2])
    store.write(keys, heads + np.float32(1))
    np.testing.assert_array_equal(store.read(keys), [heads[0], heads[1], heads[2] + np.float32(1)])


def test_two_processes_write_the_same_keys_at_once(tmp_path: Path) -> None:
    writers = [start_writer(tmp_path / "both", 200) for _ in range(2)]
    for writer in writers:
        finish(writer)
    finish(start_writer(tmp_path / "one", 200))

    assert len(objects(tmp_path / "both")) == 200
    assert objects(tmp_path / "both") == objects(tmp_path / "one")
    np.testing.assert_array_equal(HeadStore.open(tmp_path / "both").read(keys_of(200)), values_of(200))


@pytest.mark.parametrize("stored_when_killed", [1, 30])
def test_a_killed_writer_leaves_whole_values_and_the_next_one_writes_only_the_rest(
    tmp_path: Path, stored_when_killed: int
) -> None:
    cache = tmp_path / "cache"
    writer = start_writer(cache, 400, seconds_per_batch=0.01)
    deadline = time.monotonic() + 60
    while len(objects(cache)) < stored_when_killed:
        assert writer.poll() is None, "the writer ended before it could be killed"
        assert time.monotonic() < deadline
    os.kill(writer.pid, signal.SIGKILL)
    writer.communicate()
    assert writer.returncode == -signal.SIGKILL

    keys, heads = keys_of(400), values_of(400)
    store = HeadStore.open(cache)
    missing = store.missing(keys)
    present = sorted(set(range(400)) - set(missing))
    assert 0 < len(present) < 400
    np.testing.assert_array_equal(store.read([keys[i] for i in present]), heads[present])

    assert finish(start_writer(cache, 400)) == len(missing)
    finish(start_writer(tmp_path / "never killed", 400))
    assert objects(cache) == objects(tmp_path / "never killed")


@pytest.mark.parametrize("damage", ["flip", "cut", "extend", "empty", "swap"])
def test_a_damaged_value_is_an_error_that_names_its_file(tmp_path: Path, damage: str) -> None:
    keys = keys_of(2)
    store = HeadStore.open(tmp_path)
    store.write(keys, values_of(2))
    file = tmp_path / keys[0][:2] / keys[0]
    data = file.read_bytes()
    file.write_bytes(
        {
            "flip": data[:40] + bytes([data[40] ^ 1]) + data[41:],
            "cut": data[:-4],
            "extend": data + b"\0\0\0\0",
            "empty": b"",
            "swap": (tmp_path / keys[1][:2] / keys[1]).read_bytes(),
        }[damage]
    )
    np.testing.assert_array_equal(store.read(keys[1:]), values_of(2)[1:])
    with pytest.raises(UserError) as caught:
        store.read(keys)
    assert str(caught.value) == f"{file}: damaged (wrong length or checksum); delete it and run again"


def test_a_missing_key_and_mixed_shapes_are_errors(tmp_path: Path) -> None:
    keys = keys_of(3)
    store = HeadStore.open(tmp_path)
    store.write(keys[:1], values_of(1))
    store.write(keys[1:2], np.zeros((1, 3, 4, 6), np.float32))
    with pytest.raises(UserError, match=f"{tmp_path}: no features stored for {keys[2]}"):
        store.read([keys[0], keys[2]])
    with pytest.raises(UserError, match=rf"{keys[1]}: features of shape \[3, 4, 6\], but those of {keys[0]} have \[3"):
        store.read(keys[:2])


@pytest.mark.parametrize(
    ("keys", "heads"),
    [
        (keys_of(2), values_of(1)),
        (keys_of(1), values_of(1)[0]),
        (keys_of(1), values_of(1).astype(np.float64)),
        (["../escape"], values_of(1)),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(
    tmp_path: Path, keys: list[str], heads: np.ndarray
) -> None:
    with pytest.raises(ValueError, match="expected"):
        HeadStore.open(tmp_path).write(keys, heads)
    assert objects(tmp_path) == {}


def test_unusable_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match=f"{file}: is a file"):
        HeadStore.open(file)
    with pytest.raises(UserError, match=f"{file}/below: cannot be written: {file} is a file"):
        HeadStore.open(file / "below")
    with pytest.raises(UserError, match="ftp://host/x: not a path that is known here"):
        HeadStore.open("ftp://host/x")
    with pytest.raises(UserError, match="gs://: not a path"):
        HeadStore.open("gs://")

    # Root may write anywhere, so permission is withdrawn where it is asked for.
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match=f"{tmp_path}/new: cannot be written: no permission for {tmp_path}"):
        HeadStore.open(tmp_path / "new")
    monkeypatch.undo()

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=f"{tmp_path}/new: .*No space left on device"):
        HeadStore.open(tmp_path / "new")


def test_what_the_storage_refuses_is_one_line_naming_the_path(tmp_path: Path) -> None:
    store = HeadStore.open(tmp_path)
    (tmp_path / keys_of(1)[0][:2]).touch()
    with pytest.raises(UserError) as caught:
        store.write(keys_of(1), values_of(1))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: ")
    assert "Not a directory" in message
    assert "\n" not in message
    assert "os_error_code" not in message


@pytest.mark.parametrize(
    ("path", "spec"),
    [
        ("gs://bucket/a/b", {"driver": "gcs", "bucket": "bucket", "path": "a/b/"}),
        ("gs://bucket/a/b/", {"driver": "gcs", "bucket": "bucket", "path": "a/b/"}),
        ("gs://bucket", {"driver": "gcs", "bucket": "bucket", "path": ""}),
        (Path("gs://bucket/a"), {"driver": "gcs", "bucket": "bucket", "path": "a/"}),
        ("/a/b", {"driver": "file", "path": "/a/b/"}),
        (Path("/a/b"), {"driver": "file", "path": "/a/b/"}),
        ("/a/c/../b", {"driver": "file", "path": "/a/b/"}),
    ],
)
def test_paths_become_tensorstore_specs(path: str | Path, spec: dict[str, str]) -> None:
    import tensorstore as ts

    assert kvstore_spec(path) == spec
    assert kvstore_spec(path, "heads/") == {**spec, "path": spec["path"] + "heads/"}
    # TensorStore knows the driver and accepts the names (and leaves an empty path out).
    assert {"path": "", **ts.KvStore.Spec(spec).to_json()} == spec


def test_the_default_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SAV_JAX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache_dir() == str(tmp_path / ".cache" / "sav_jax")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_cache_dir() == str(tmp_path / ".cache" / "sav_jax")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_dir() == "/somewhere/sav_jax"
    monkeypatch.setenv("SAV_JAX_CACHE", "gs://bucket/cache")
    assert default_cache_dir() == "gs://bucket/cache"


def rows_of(count: int) -> list[dict[str, object]]:
    return [{"id": str(i), "label": "größer" if i % 2 else None, "key": key} for i, key in enumerate(keys_of(count))]


def test_a_head_array_is_read_back_and_its_bytes_depend_on_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = values_of(11)
    heads[4:6] = 0  # a whole chunk of zeros is stored like any other
    monkeypatch.setattr(headstore, "_CHUNK_BYTES", 2 * heads[0].nbytes)
    write_head_array(tmp_path / "new" / "a", heads, rows_of(11), {"model": "tiny"})
    read, rows, meta = read_head_array(tmp_path / "new" / "a")
    np.testing.assert_array_equal(read, heads)
    assert read.dtype == np.float32
    assert rows == rows_of(11)
    assert meta == {"format": "sav_jax head array", "version": 1, "shape": [11, 3, 4, 5], "model": "tiny"}
    assert sum(1 for name in objects(tmp_path / "new" / "a") if name.startswith("heads/c/")) == 6

    write_head_array(f"{tmp_path}/new/../b", heads.copy(), rows_of(11), {"model": "tiny"})
    assert objects(tmp_path / "b") == objects(tmp_path / "new" / "a")


@pytest.mark.usefixtures("buckets")
def test_a_head_array_replaces_an_earlier_one_and_nothing_else(tmp_path: Path) -> None:
    heads = values_of(2)
    write_head_array(tmp_path / "a", heads, rows_of(2))
    write_head_array(tmp_path / "a", heads[:1], rows_of(1))
    np.testing.assert_array_equal(read_head_array(tmp_path / "a")[0], heads[:1])
    # A small array takes no more room than its numbers and their checksum.
    assert [len(data) for name, data in objects(tmp_path / "a").items() if name.startswith("heads/c/")] == [
        heads[:1].nbytes + 4
    ]

    (tmp_path / "empty").mkdir()
    write_head_array(tmp_path / "empty", heads, rows_of(2))

    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "meta.json").write_text("{}")
    (tmp_path / "file").touch()
    before = objects(tmp_path)
    for name in ("theirs", "file"):
        with pytest.raises(UserError, match=f"{tmp_path / name}: exists and is not a head array"):
            check_head_array_path(tmp_path / name)
        with pytest.raises(UserError, match=f"{tmp_path / name}: exists and is not a head array"):
            write_head_array(tmp_path / name, heads, rows_of(2))
    for usable in (tmp_path / "a", tmp_path / "new" / "er", "gs://bucket/a"):
        check_head_array_path(usable)
    with pytest.raises(UserError, match="ftp://host/a: not a path"):
        check_head_array_path("ftp://host/a")
    assert objects(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"a", "empty", "theirs", "file"}


def test_a_head_array_that_cannot_be_finished_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_head_array(tmp_path / "a", values_of(1), [{"id": object()}])
    with pytest.raises(ValueError, match="expected float32"):
        write_head_array(tmp_path / "a", values_of(2), rows_of(1))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        write_head_array(tmp_path / "file" / "a", values_of(1), rows_of(1))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("part", ["meta.json", "rows.jsonl", "heads/zarr.json", "heads/c/0/0/0/0"])
@pytest.mark.parametrize("damage", ["remove", "cut"])
def test_an_incomplete_head_array_is_an_error(tmp_path: Path, part: str, damage: str) -> None:
    write_head_array(tmp_path / "a", values_of(2), rows_of(2))
    file = tmp_path / "a" / part
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError) as caught:
        read_head_array(tmp_path / "a")
    assert str(caught.value).startswith(f"{tmp_path / 'a'}: ")
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_head_array(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path / 'none'}: no such folder"):
        read_head_array(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "meta.json").write_text(json.dumps(["shape"]))
    with pytest.raises(UserError, match="not a complete head array"):
        read_head_array(tmp_path)


def test_values_are_read_into_rows_of_an_array(tmp_path: Path) -> None:
    store, keys, values = HeadStore.open(tmp_path), keys_of(4), values_of(4)
    store.write(keys, values)
    heads = np.zeros((6, *SHAPE), np.float32)
    store.read_into(heads, [5, 0, 2], [keys[i] for i in (3, 1, 0)])
    expected = np.zeros((6, *SHAPE), np.float32)
    expected[[5, 0, 2]] = values[[3, 1, 0]]
    np.testing.assert_array_equal(heads, expected)
    store.read_into(heads, [], [])
    with pytest.raises(UserError, match=r"features of shape \[3, 4, 5\], but those of the array have \[3, 4, 6\]"):
        store.read_into(np.zeros((1, 3, 4, 6), np.float32), [0], keys[:1])
