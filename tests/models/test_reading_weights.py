"""Parts of stored tensors: any layout, slice, dtype and size of piece, and no more of the file than is wanted."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import Reference
from families import mesh_of
from flax import traverse_util
from hypothesis import given
from hypothesis import strategies as st

import sav_jax
from sav_jax import lmm as lmm_module
from sav_jax.errors import UserError
from sav_jax.lmm import BUNDLED
from sav_jax.models import reading_weights, weights
from sav_jax.models.multimodal import init_params
from sav_jax.models.reading_weights import Part, Reader, StoredTensor
from sav_jax.models.registry import architecture, read_config
from sav_jax.models.weights import file_headers, read_headers

HEADER = 24  # bytes before the tensor


def stored(file: Path, numbers: np.ndarray) -> StoredTensor:
    file.write_bytes(bytes(HEADER) + numbers.tobytes())
    return StoredTensor(file, "w", numbers.dtype, numbers.shape, HEADER)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reading")


@given(
    st.lists(st.integers(1, 9), max_size=3),
    st.randoms(use_true_random=False),
    st.sampled_from(["float32", "bfloat16"]),
    st.sampled_from(["float32", "bfloat16"]),
    st.sampled_from([1, 50, 2**20]),
    st.booleans(),
)
def test_any_part_in_pieces_of_any_size(
    folder: Path, shape: list[int], random: Any, dtype: str, wanted: str, piece: int, forget: bool
) -> None:
    numbers = (np.arange(np.prod(shape, dtype=int)).reshape(shape) / 7).astype(jnp.dtype(dtype))
    tensor = stored(folder / "w", numbers)
    mapped = tensor.read()
    axes = random.sample(range(len(shape)), len(shape))
    view = np.asarray(mapped.transpose(axes))
    takes = []
    for _ in range(random.randint(1, 3)):
        at = tuple(slice(start := random.randrange(n), random.randint(start, n)) for n in view.shape)
        takes.append((at, np.zeros(view[at].shape, jnp.dtype(wanted))))
    with pytest.MonkeyPatch.context() as patch, Reader(forget) as reader:
        patch.setattr(reading_weights, "_PIECE_BYTES", piece)
        reader.read([Part(tensor, mapped, view, tuple(takes))])
    for at, target in takes:
        np.testing.assert_array_equal(target, numbers.transpose(axes)[at].astype(jnp.dtype(wanted)))


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """(file, first byte, bytes) of everything that is read."""
    seen: list[tuple[str, int, int]] = []
    fill = reading_weights._fill

    def counted(tensor: StoredTensor, offset: int, room: np.ndarray, forget: bool) -> None:
        seen.append((tensor.key, offset, room.size))
        fill(tensor, offset, room, forget)

    monkeypatch.setattr(reading_weights, "_fill", counted)
    return seen


def test_only_what_is_wanted_is_read(folder: Path, spans: list[tuple[str, int, int]]) -> None:
    """Rows of a matrix are read alone, whichever way they are stored in the parameter, and once for all who want them;
    rows that nobody wants are not read.
    """
    numbers = np.arange(64 * 32, dtype=np.float32).reshape(64, 32)
    tensor = stored(folder / "rows", numbers)
    mapped = tensor.read()
    columns = (slice(16, 32), slice(16, 40), slice(50, 64))
    takes = tuple(((slice(0, 32), at), np.empty((32, at.stop - at.start), np.float32)) for at in columns)
    with Reader() as reader:
        reader.read([Part(tensor, mapped, mapped.T, takes)])
    row = 32 * 4
    assert sorted(spans) == [("w", HEADER + a * row, (b - a) * row) for a, b in ((16, 32), (32, 40), (50, 64))]
    for (_, at), target in takes:
        np.testing.assert_array_equal(target, numbers.T[:, at])


@pytest.mark.parametrize("axes", [{"model": 2}, {"fsdp": 4}, {"data": 2, "fsdp": 2, "model": 2}, {"data": 8}], ids=str)
@pytest.mark.parametrize("together", [2**32, 1], ids=["together", "one by one"])
def test_what_devices_want_is_read_once(
    reference: Reference,
    lmm: sav_jax.LMM,
    spans: list[tuple[str, int, int]],
    monkeypatch: pytest.MonkeyPatch,
    axes: dict[str, int],
    together: int,
) -> None:
    """On any mesh, as long as their slices fit into the host's memory together."""
    monkeypatch.setattr(weights, "_TOGETHER_BYTES", together)
    sharded = sav_jax.load(reference.directory, mesh=mesh_of(axes))
    jax.tree.map(np.testing.assert_array_equal, sharded.params, lmm.params)
    read: dict[str, list[tuple[int, int]]] = {}
    for key, offset, size in spans:
        read.setdefault(key, []).append((offset, offset + size))
    twice = [key for key, parts in read.items() if any(a[1] > b[0] for a, b in itertools.pairwise(sorted(parts)))]
    assert bool(twice) == (together == 1 and axes != {"data": 8}), twice
    # Pixels of a patch are three axes in the file and one in the parameter: turned before it is sliced.
    turned = {"vision_tower.embeddings.patch_embedding.weight"}
    assert read.keys() == {tensor.key for tensor in read_headers(reference.directory)} - turned


def _replaced(file: Path) -> None:
    shutil.copyfile(file, file.with_suffix(".new"))
    os.replace(file.with_suffix(".new"), file)


def _written_to(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.write(stream.read(8))
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))  # a system's clock may be coarser than this test is fast


@pytest.mark.parametrize("change", [_replaced, _written_to, Path.unlink, lambda file: os.truncate(file, 100)])
@pytest.mark.parametrize("moment", ["headers", "numbers", "digest"])
def test_a_checkpoint_that_changes_while_it_is_read(
    reference: Reference,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    change: Callable[[Path], None],
    moment: str,
) -> None:
    """Whatever has been read of it until then."""
    shutil.copytree(reference.directory, tmp_path / "model")
    file = sorted((tmp_path / "model").glob("*.safetensors"))[-1]
    where, name = {"headers": (weights, "_match"), "numbers": (weights, "Reader"), "digest": (lmm_module, "samples")}[
        moment
    ]
    monkeypatch.setattr(lmm_module, "_WHOLE_FILE_BYTES", 0)
    former = getattr(where, name)

    def changing(*given: Any, **named: Any) -> Any:
        monkeypatch.setattr(where, name, former)
        change(file)
        return former(*given, **named)

    monkeypatch.setattr(where, name, changing)
    with pytest.raises(UserError) as raised:
        sav_jax.load(tmp_path / "model")
    assert str(raised.value) == f"{file}: was changed while it was read"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_so_do_its_settings(reference: Reference, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    shutil.copytree(reference.directory, tmp_path / "model")
    file, former = tmp_path / "model" / name, vars(lmm_module)["load_processor"]

    def changing(*given: Any) -> Any:
        found = former(*given)
        file.write_bytes(file.read_bytes() + b" " if file.exists() else b" ")
        return found

    monkeypatch.setattr(lmm_module, "load_processor", changing)
    with pytest.raises(UserError) as raised:
        sav_jax.load(tmp_path / "model")
    assert str(raised.value) == f"{file}: was changed while it was read"


@pytest.mark.parametrize("share", [0.9, 1.1])
def test_pages_are_given_back_where_they_would_not_fit(
    reference: Reference,
    lmm: sav_jax.LMM,
    spans: list[tuple[str, int, int]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    share: float,
) -> None:
    """In memory with a little less or more room than for the files and the parameters."""
    files = sum(file.stat().st_size for file in reference.directory.glob("*.safetensors"))
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(lmm.params))
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal: 99999999 kB\nMemAvailable: {share * (files + held) / 1024:.0f} kB\n")
    monkeypatch.setattr(reading_weights, "_MEMINFO", meminfo)
    monkeypatch.setattr(reading_weights, "_PROCESS", tmp_path)  # in no container
    back = []
    advise = os.posix_fadvise

    def counted(file: int, start: int, count: int, advice: int) -> None:
        if advice == os.POSIX_FADV_DONTNEED:
            back.append((start, count))
        advise(file, start, count, advice)

    monkeypatch.setattr(os, "posix_fadvise", counted)
    loaded = sav_jax.load(reference.directory)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, lmm.params)
    assert sorted(back) == (sorted((start, count) for _, start, count in spans) if share < 1 else [])


def test_without_knowing_the_memory_pages_are_left_to_the_system(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(reading_weights, "_MEMINFO", tmp_path / "none")
    monkeypatch.setattr(reading_weights, "_PROCESS", tmp_path)
    assert reading_weights.pages_fit(2**60, 2**60)
    (tmp_path / "none").write_text("MemTotal: 5 kB\n")
    assert reading_weights.pages_fit(2**60, 2**60)


@pytest.mark.parametrize(
    ("process", "group", "files"),
    [
        ("0::/", "", ("memory.max", "memory.current", "")),
        ("0::/job/step", "job", ("memory.max", "memory.current", "")),  # a limit of a group around it
        (
            "1:cpu:/docker/7\n4:memory,misc:/docker/7\n0::/",  # as the host names it; here it is the outermost
            "memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ),
    ],
)
def test_a_container_s_limit_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, process: str, group: str, files: tuple[str, str, str]
) -> None:
    """Of both versions of control groups, if it leaves less than the machine has."""
    (tmp_path / "meminfo").write_text("MemAvailable: 1000 kB\n")
    (tmp_path / "cgroup").write_text(process + "\n")
    monkeypatch.setattr(reading_weights, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(reading_weights, "_PROCESS", tmp_path)
    monkeypatch.setattr(reading_weights, "_GROUPS", tmp_path / "groups")
    assert reading_weights.pages_fit(1_000_000, 23_999)
    folder = tmp_path / "groups" / group
    folder.mkdir(parents=True)
    limit, used, of = files
    (folder / used).write_text("500000\n")
    (folder / "memory.stat").write_text(f"anon 100000\n{of}inactive_file 300000\n{of}active_file 50000\n")
    (folder / limit).write_text("800000\n")
    assert reading_weights.pages_fit(400_000, 249_999)
    assert not reading_weights.pages_fit(400_000, 250_000)
    for unlimited in ("max", "9223372036854771712", "2000000"):
        (folder / limit).write_text(f"{unlimited}\n")
        assert reading_weights.pages_fit(1_000_000, 23_999)
        assert not reading_weights.pages_fit(1_000_000, 24_000)


def test_samples(folder: Path) -> None:
    """Bytes of a tensor, in the order asked for; a file that has become shorter is said."""
    numbers = np.arange(64, dtype=np.float32)
    tensor = stored(folder / "samples", numbers)
    places = [(tensor, 4 * first, 4 * count) for first, count in ((60, 4), (0, 1), (3, 40), (5, 0))]
    expected = [numbers[first : first + count].tobytes() for first, count in ((60, 4), (0, 1), (3, 40), (5, 0))]
    assert reading_weights.samples(places) == expected
    with tensor.file.open("r+b") as stream:
        stream.truncate(HEADER + 250)
    with pytest.raises(UserError, match="samples: truncated while it was read: w "):
        reading_weights.samples(places)


def test_parameters_lie_as_their_files_do(reference: Reference) -> None:
    """So that loading is reading. Pixels of a patch are in another order than there: three axes in the file."""
    for directory, turned in (
        (reference.directory, ["vision_tower/patch_embedding/kernel"]),
        (BUNDLED["tiny-qwen"], []),
    ):
        arch = architecture(read_config(directory))
        shapes = traverse_util.flatten_dict(
            jax.eval_shape(lambda key, module=arch.module: init_params(module, key), jax.random.key(0)), sep="/"
        )
        found = []
        for entry in arch.table.entries:
            there = np.empty(entry.stored_shape(shapes[entry.target].shape), np.float32)
            here = np.asarray(entry.to_param(there))
            if not (np.shares_memory(here, there) and here.flags.c_contiguous):
                found.append(entry.target)
        assert found == turned


def test_a_file_that_shrinks_while_it_is_read(folder: Path) -> None:
    numbers = np.arange(64 * 32, dtype=np.float32).reshape(64, 32)
    tensor = stored(folder / "short", numbers)
    mapped = tensor.read()
    with tensor.file.open("r+b") as stream:
        stream.truncate(HEADER + 100)
    with Reader() as reader, pytest.raises(UserError, match="short: truncated while it was read: w "):
        reader.read([Part(tensor, mapped, mapped.T, (((slice(0, 32), slice(0, 64)), np.empty((32, 64), np.float32)),))])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"data_offsets": [2, 26]}, None),
        ({"data_offsets": [2, 24]}, "cannot be bytes 2 to 24"),
        ({"data_offsets": [-8, 16]}, "cannot be bytes -8 to 16"),
        ({"data_offsets": [0, 48]}, "cannot be bytes 0 to 48"),
        ({"dtype": "F64"}, "w, F64 [2, 3], cannot be bytes 0 to 24"),
        ({"shape": [2, "3"]}, "w lacks dtype, shape or data_offsets"),
        ({"shape": None}, "w lacks dtype, shape or data_offsets"),
        ({"data_offsets": [0]}, "w lacks dtype, shape or data_offsets"),
        ({"data_offsets": ["a", "b"]}, "w lacks dtype, shape or data_offsets"),
        ([], "w lacks dtype, shape or data_offsets"),
        (None, "its header is no object"),
    ],
)
def test_damaged_headers_are_said_and_nothing_is_read(tmp_path: Path, entry: Any, message: str | None) -> None:
    good = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    header = [1] if entry is None else {"w": good | entry if isinstance(entry, dict) else entry}
    encoded = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(64))
    if message is None:  # a gap before the tensor is allowed
        assert [tensor.shape for tensor in file_headers(file)] == [(2, 3)]
        return
    with pytest.raises(UserError) as caught:
        list(file_headers(file))
    assert str(caught.value).startswith(f"{file}: ")
    assert message in str(caught.value)


def test_a_file_that_shrank_before_it_is_mapped(folder: Path) -> None:
    tensor = stored(folder / "shrunk", np.arange(64, dtype=np.float32).reshape(8, 8))
    tensor.file.write_bytes(bytes(HEADER + 8))
    with pytest.raises(UserError, match="shrunk: truncated while it was read: w "):
        tensor.read()
