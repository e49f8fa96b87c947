"""Head vectors on disk: a content-keyed cache (`HeadStore`) and the array that ``sav-jax extract`` writes.

Both go through TensorStore, so a path is a local folder or ``gs://bucket/folder`` and many hosts may write at once.

Axes: N examples, L layers, H heads, D head width. Everything is float32, little-endian.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sav_jax._files import check_output_folder
from sav_jax._storage import (
    AnyPath,
    BucketPath,
    Location,
    context,
    kvstore_spec,
    location,
    open_kvstore,
    storage_errors,
)
from sav_jax.errors import UserError

if TYPE_CHECKING:
    import tensorstore as ts

# A stored value: magic, layout version, the three axes L, H, D, a CRC-32 of key, axes and payload; then the payload.
_HEADER = struct.Struct("<4sIIIII")
_MAGIC = b"SAVH"
_VERSION = 1
_DTYPE = np.dtype("<f4")

_HEAD_ARRAY = {"format": "sav_jax head array", "version": 1}

_READS_IN_FLIGHT = 256
_CHUNK_BYTES = 16 * 2**20


def default_cache_dir() -> str:
    """Where features are cached unless told otherwise.

    Returns:
      ``$SAV_JAX_CACHE`` (may be a ``gs://`` path), else ``$XDG_CACHE_HOME/sav_jax``, else ``~/.cache/sav_jax``.
    """
    return os.environ.get("SAV_JAX_CACHE") or local_cache_dir()


def local_cache_dir() -> str:
    """Where on the local disk: ``$XDG_CACHE_HOME/sav_jax``, else ``~/.cache/sav_jax``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path in the variable is invalid and is to be ignored.
    return str(Path(base if os.path.isabs(base) else Path.home() / ".cache") / "sav_jax")


@dataclass(frozen=True)
class HeadStore:
    """A content-keyed cache of the head vectors of single examples.

    One object per example, written whole or not at all: whatever kills a writer, every key that is present has its
    complete value, and a second run computes only the rest. An existing key is never overwritten, so when hosts race
    for one, the first value stays and every reader sees that one. Keys name content (a hash of model, prompt and
    images); nothing expires.

    A value whose checksum does not match (a failing disk, a file edited by hand) is an error of `read`, which names the
    file to delete; it is not quietly computed again.

    Example:
      >>> import numpy as np
      >>> import sav_jax
      >>> store = sav_jax.HeadStore.open("cache")
      >>> heads = np.zeros((2, 12, 8, 24), np.float32)
      >>> store.write(["a" * 64, "b" * 64], heads)
      >>> store.missing(["a" * 64, "c" * 64])  # places in the list
      [1]
      >>> store.read(["b" * 64]).shape
      (1, 12, 8, 24)
    """

    path: str
    _store: ts.KvStore

    @classmethod
    def open(cls, path: AnyPath) -> HeadStore:
        """Open the store at ``path``, creating the folder if there is none.

        Args:
          path: a local folder or ``gs://bucket/folder``.

        Raises:
          UserError: ``path`` cannot be used: a file, not permitted, or an unknown kind of URL.
        """
        _make_folder(path)
        return cls(str(path), open_kvstore(path))

    def missing(self, keys: Sequence[str]) -> list[int]:
        """Indices into ``keys`` of those that are not stored, in order.

        One listing of the store, whatever the number of keys. Values are not looked into.
        """
        import tensorstore as ts

        if not keys:
            return []
        names = [_object_name(key) for key in keys]
        span = ts.KvStore.KeyRange(inclusive_min=min(names), exclusive_max=max(names) + "\0")
        with storage_errors(self.path):
            stored = {name.decode() for name in self._store.list(span).result()}
        return [index for index, name in enumerate(names) if name not in stored]

    def write(self, keys: Sequence[str], heads: np.ndarray) -> None:
        """Store one value per key, in parallel; return once all are durable.

        A key that is already stored keeps its value.

        Args:
          keys: n keys (hexadecimal digests).
          heads: float32 [n, L, H, D].

        Raises:
          ValueError: ``heads`` is not float32 [n, L, H, D], or a key is not a plain name.
          UserError: the storage refuses (disk full, no permission).
        """
        heads = np.asarray(heads)
        if heads.ndim != 4 or len(heads) != len(keys) or heads.dtype != np.float32:
            raise ValueError(f"expected float32 heads of shape [{len(keys)}, L, H, D], got {heads.dtype} {heads.shape}")
        if not keys:
            return
        objects = {_object_name(key): _encode(key, value) for key, value in zip(keys, heads, strict=True)}
        with storage_errors(self.path):
            # The generation of an object that does not exist: writing on condition of it creates and never replaces.
            absent = self._store.read("absent").result().stamp.generation
            for write in [self._store.write(name, data, if_equal=absent) for name, data in objects.items()]:
                write.result()

    def read(self, keys: Sequence[str]) -> np.ndarray:
        """Read the values of ``keys``.

        Args:
          keys: at least one key.

        Returns:
          float32 [n, L, H, D], in the order of ``keys``.

        Raises:
          ValueError: no keys were given: the shape of nothing is unknown.
          UserError: a key is missing, its value is damaged, or the values differ in shape.
        """
        if not keys:
            raise ValueError("expected at least one key")
        values = self._values(keys)
        first = next(values)
        heads = np.empty((len(keys), *first.shape), np.float32)
        heads[0] = first
        self._fill(heads, range(1, len(keys)), keys[1:], values, keys[0])
        return heads

    def read_into(self, heads: np.ndarray, rows: Sequence[int], keys: Sequence[str]) -> None:
        """Read the values of ``keys`` into rows of an array, without a second array of their size.

        Args:
          heads: float32 [N, L, H, D], written to.
          rows: n indices into it.
          keys: n keys.

        Raises:
          UserError: a key is missing, its value is damaged, or of another shape than the array's.
        """
        self._fill(heads, rows, keys, self._values(keys), "the array")

    def _fill(
        self, heads: np.ndarray, rows: Sequence[int], keys: Sequence[str], values: Iterator[np.ndarray], whose: str
    ) -> None:
        for row, key, value in zip(rows, keys, values, strict=True):
            if value.shape != heads.shape[1:]:
                shapes = f"{list(value.shape)}, but those of {whose} have {list(heads.shape[1:])}"
                raise UserError(f"{self._locate(key)}: features of shape {shapes}")
            heads[row] = value

    def _values(self, keys: Sequence[str]) -> Iterator[np.ndarray]:
        for key, data in self._read_ahead(keys):
            if data is None:
                raise UserError(f"{self.path}: no features stored for {key}")
            value = _decode(key, data)
            if value is None:
                raise UserError(f"{self._locate(key)}: damaged (wrong length or checksum); delete it and run again")
            yield value

    def _read_ahead(self, keys: Sequence[str]) -> Iterator[tuple[str, bytes | None]]:
        """Yield (key, stored bytes or None) in order, with a bounded number of reads under way."""
        for start in range(0, len(keys), _READS_IN_FLIGHT):
            window = keys[start : start + _READS_IN_FLIGHT]
            names = [_object_name(key) for key in window]
            with storage_errors(self.path):
                results = [read.result() for read in [self._store.read(name) for name in names]]
            for key, result in zip(window, results, strict=True):
                yield key, result.value if result.state == "value" else None

    def _locate(self, key: str) -> str:
        return f"{self.path.rstrip('/')}/{_object_name(key)}"


def write_head_array(
    path: AnyPath, heads: np.ndarray, rows: Sequence[Mapping[str, Any]], meta: Mapping[str, Any] | None = None
) -> None:
    """Write the head vectors of a data set as one Zarr v3 array, which any Zarr reader opens.

    ``path/heads`` is the array, ``path/rows.jsonl`` says what each of its examples is, and ``path/meta.json`` makes it
    valid. A local ``path`` appears only when it is complete: it is made beside itself and renamed, in place of an
    earlier head array if there is one. In a bucket, ``meta.json`` is written last. The same input gives the same bytes.

    Args:
      path: a local folder or ``gs://bucket/folder``.
      heads: float32 [N, L, H, D].
      rows: N mappings, such as ``{"id", "label", "key"}``.
      meta: further entries for ``meta.json``, such as the model's name.

    Raises:
      ValueError: ``heads`` is not float32 [N, L, H, D].
      UserError: ``path`` holds something else, or cannot be written.
    """
    heads = np.asarray(heads)
    if heads.ndim != 4 or len(heads) != len(rows) or heads.dtype != np.float32:
        raise ValueError(f"expected float32 heads of shape [{len(rows)}, L, H, D], got {heads.dtype} {heads.shape}")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    facts = json.dumps({**(meta or {}), **_HEAD_ARRAY, "shape": heads.shape}, ensure_ascii=False, indent=2) + "\n"
    check_head_array_path(path)
    where = location(path)
    if isinstance(where, BucketPath):
        _write_parts(where, heads, lines, facts)
        return

    where = where.expanduser()
    target = where.resolve() if where.name in ("", "..") else where.parent.resolve() / where.name
    _make_folder(target.parent)
    staging = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        _write_parts(staging, heads, lines, facts)
        with storage_errors(path):
            if target.exists():
                # A folder cannot be renamed onto a full one, so the earlier one steps aside.
                earlier = target.rename(staging.with_suffix(".old"))
                staging.rename(target)
                shutil.rmtree(earlier)
            else:
                staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_head_array_path(path: AnyPath) -> None:
    """Refuse, before any features are computed, a ``path`` that `write_head_array` would refuse.

    Raises:
      UserError: ``path`` holds something other than a head array, or cannot be written.
    """
    target = location(path)
    target = target.expanduser() if isinstance(target, Path) else target
    with storage_errors(path):
        if target.exists() and not _is_replaceable(target):
            raise UserError(f"{path}: exists and is not a head array; choose another folder")
    check_output_folder(target)


def read_head_array(path: AnyPath) -> tuple[np.ndarray, list[dict[str, Any]], dict[str, Any]]:
    """Read what `write_head_array` wrote.

    Returns:
      heads float32 [N, L, H, D], its N rows, and the contents of ``meta.json``.

    Raises:
      UserError: ``path`` is not a complete head array, or a part of it is missing or damaged.
    """
    import tensorstore as ts

    where = location(path)
    if isinstance(where, Path) and not where.is_dir():
        raise UserError(f"{path}: no such folder")
    store = open_kvstore(path)
    with storage_errors(path):
        meta_read, rows_read = (store.read(name) for name in ("meta.json", "rows.jsonl"))
        meta_bytes, rows_bytes = meta_read.result().value, rows_read.result().value
    try:
        meta = json.loads(meta_bytes)
        rows = [json.loads(line) for line in rows_bytes.splitlines()]
        whole = _is_head_array(meta) and meta["shape"][0] == len(rows)
    except (ValueError, LookupError, TypeError):
        whole = False
    if not whole:
        raise UserError(f"{path}: not a complete head array (as `sav-jax extract` writes)")
    # By default a chunk that is not there would read as zeros.
    spec = {"driver": "zarr3", "kvstore": kvstore_spec(path, "heads/"), "fill_missing_data_reads": False}
    with storage_errors(path):
        return ts.open(spec, open=True, read=True, context=context()).result().read().result(), rows, meta


def _write_parts(path: Location, heads: np.ndarray, rows: str, meta: str) -> None:
    """Write the three parts of a head array, what makes it valid last."""
    import tensorstore as ts

    bytes_per_example = max(1, heads[:1].nbytes)
    chunk = (max(1, min(len(heads), _CHUNK_BYTES // bytes_per_example)), *heads.shape[1:])
    spec = {
        "driver": "zarr3",
        "kvstore": kvstore_spec(path, "heads/"),
        "metadata": {
            "shape": heads.shape,
            "data_type": "float32",
            "dimension_names": ["example", "layer", "head", "width"],
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        },
        # By default a chunk of zeros would not be written, and could not be told from one that was lost.
        "store_data_equal_to_fill_value": True,
    }
    store = open_kvstore(path)
    with storage_errors(path):
        store.write("meta.json", None).result()
        ts.open(spec, create=True, delete_existing=True, context=context()).result().write(heads).result()
        store.write("rows.jsonl", rows).result()
        store.write("meta.json", meta).result()


def _is_head_array(meta: Any) -> bool:
    return isinstance(meta, dict) and {**meta, **_HEAD_ARRAY} == meta


def _is_replaceable(target: Location) -> bool:
    """Whether nothing but an earlier head array would be lost: ``target`` is one, or an empty folder, or in a bucket
    what a killed writer has left.
    """
    try:
        if isinstance(target, BucketPath) and {part.name for part in target.iterdir()} <= {"heads", "rows.jsonl"}:
            return not target.is_file()
        return not any(target.iterdir()) or _is_head_array(json.loads((target / "meta.json").read_bytes()))
    except (OSError, ValueError):
        return False


def _make_folder(path: AnyPath) -> None:
    """Make a local folder, or say at once, not after an hour of computing, why nothing can be written there."""
    where = location(path)
    if isinstance(where, Path):
        check_output_folder(where.expanduser())
        with storage_errors(path):
            where.expanduser().mkdir(parents=True, exist_ok=True)


def _object_name(key: str) -> str:
    """Where a key is stored: spread over 256 folders, since some file systems are slow with many files in one."""
    if not re.fullmatch(r"[0-9a-f]{8,}", key):
        raise ValueError(f"expected a key of at least 8 hexadecimal digits, got {key!r}")
    return f"{key[:2]}/{key}"


def _checksum(key: str, axes: Sequence[int], payload: bytes) -> int:
    # The key is included, so that a value that ends up under another's name is noticed too.
    return zlib.crc32(payload, zlib.crc32(f"{key} {tuple(axes)}".encode()))


def _encode(key: str, value: np.ndarray) -> bytes:
    """One example's heads [L, H, D] as bytes; the same key and value always give the same ones."""
    payload = value.astype(_DTYPE).tobytes()
    return _HEADER.pack(_MAGIC, _VERSION, *value.shape, _checksum(key, value.shape, payload)) + payload


def _decode(key: str, data: bytes) -> np.ndarray | None:
    """The heads [L, H, D] of `_encode`, or None if ``data`` is not exactly what was written for ``key``."""
    if len(data) < _HEADER.size:
        return None
    magic, version, *axes, checksum = _HEADER.unpack_from(data)
    payload = data[_HEADER.size :]
    expected = (_MAGIC, _VERSION, _DTYPE.itemsize * math.prod(axes), _checksum(key, axes, payload))
    if (magic, version, len(payload), checksum) != expected:
        return None
    return np.frombuffer(payload, _DTYPE).reshape(axes)
