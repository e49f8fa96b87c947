"""Parts of stored tensors: any layout, slice, dtype and size of piece, and no more of the file than is wanted."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sav_jax.errors import UserError
from sav_jax.models import reading_weights
from sav_jax.models.reading_weights import Part, Reader, StoredTensor
from sav_jax.models.weights import file_headers

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
)
def test_any_part_in_pieces_of_any_size(
    folder: Path, shape: list[int], random: Any, dtype: str, wanted: str, piece: int
) -> None:
    numbers = (np.arange(np.prod(shape, dtype=int)).reshape(shape) / 7).astype(jnp.dtype(dtype))
    tensor = stored(folder / "w", numbers)
    mapped = tensor.read()
    axes = random.sample(range(len(shape)), len(shape))
    at = tuple(slice(start := random.randrange(n), random.randint(start, n)) for n in (shape[axis] for axis in axes))
    part = np.asarray(mapped.transpose(axes)[at])
    target = np.zeros(part.shape, jnp.dtype(wanted))
    with pytest.MonkeyPatch.context() as patch, Reader() as reader:
        patch.setattr(reading_weights, "_PIECE_BYTES", piece)
        reader.read([Part(tensor, mapped, part, target)])
    np.testing.assert_array_equal(target, numbers.transpose(axes)[at].astype(jnp.dtype(wanted)))


def test_only_what_is_wanted_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a matrix are read alone, whichever way they are stored in the parameter."""
    numbers = np.arange(64 * 32, dtype=np.float32).reshape(64, 32)
    tensor = stored(folder / "rows", numbers)
    spans: list[tuple[int, int]] = []
    fill = reading_weights._fill

    def counted(tensor: StoredTensor, offset: int, room: np.ndarray) -> None:
        spans.append((offset, room.size))
        fill(tensor, offset, room)

    monkeypatch.setattr(reading_weights, "_fill", counted)
    mapped = tensor.read()
    target = np.empty((32, 16), np.float32)
    with Reader() as reader:
        reader.read([Part(tensor, mapped, mapped.T[:, 16:32], target)])
    assert spans == [(HEADER + 16 * 32 * 4, 16 * 32 * 4)]
    np.testing.assert_array_equal(target, numbers.T[:, 16:32])


def test_a_file_that_shrinks_while_it_is_read(folder: Path) -> None:
    numbers = np.arange(64 * 32, dtype=np.float32).reshape(64, 32)
    tensor = stored(folder / "short", numbers)
    mapped = tensor.read()
    with tensor.file.open("r+b") as stream:
        stream.truncate(HEADER + 100)
    with Reader() as reader, pytest.raises(UserError, match="short: truncated while it was read: w "):
        reader.read([Part(tensor, mapped, mapped.T, np.empty((32, 64), np.float32))])


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
