"""Hugging Face safetensors <-> parameter trees, by one strict table used in both directions.

Every key of the checkpoint is consumed exactly once or named as ignored, every parameter is filled, every shape is
checked, and all problems come in one error before a byte of weights is read. Only safetensors; nothing is unpickled and
no remote code is run.
"""

from __future__ import annotations

import contextlib
import json
import math
import operator
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from einops import rearrange
from flax import traverse_util

from sav_jax.errors import UserError
from sav_jax.models.aligned import aligned_empty
from sav_jax.models.reading_weights import Part, Reader, StoredTensor, pages_fit

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Some files hold buffers that are no parameters (position ids): their headers must be readable.
BUFFER_DTYPES: dict[str, np.dtype[Any]] = {
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
INDEX_FILE = "model.safetensors.index.json"
TOWER_FILE = "vision_tower.safetensors"
"""A file of weights that is read beside the others, whether an index names it or not."""
_TOGETHER_BYTES = 4 * 2**30  # of host memory: slices of a parameter for the devices of a process


@dataclass(frozen=True)
class Entry:
    """One parameter and where it lives.

    Attributes:
        target: parameter path, ``/`` between names.
        source: checkpoint key; ``{layer}`` runs over the stacked layers.
        pattern: einops pattern from the stored to the wanted layout of one layer; read backwards when saving.
        sizes: axis sizes the pattern needs.
        layers: how many layers are stacked on axis 0 of the parameter; None for a parameter of its own.
        first: the number of the first of these layers in the checkpoint.
        copy: an optional second name of a parameter another entry fills (tied embeddings); if stored it must be equal.
    """

    target: str
    source: str
    pattern: str
    sizes: Mapping[str, int] = field(default_factory=dict)
    layers: int | None = None
    first: int = 0
    copy: bool = False

    def stored_keys(self) -> list[str]:
        """Checkpoint keys, one per layer."""
        if self.layers is None:
            return [self.source]
        return [self.source.format(layer=i) for i in range(self.first, self.first + self.layers)]

    def stored_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of one stored tensor for a parameter of (stacked) ``shape``."""
        shape = tuple(shape) if self.layers is None else tuple(shape)[1:]
        return _rearranged_shape(self._reversed(), shape, self.sizes)

    def to_param(self, tensor: np.ndarray) -> np.ndarray:
        """One stored tensor -> the parameter (of one layer)."""
        return rearrange(tensor, self.pattern, **self.sizes)

    def to_stored(self, param: np.ndarray) -> np.ndarray:
        """The parameter (of one layer) -> one stored tensor."""
        return rearrange(param, self._reversed(), **self.sizes)

    def _reversed(self) -> str:
        left, right = self.pattern.split("->")
        return f"{right.strip()} -> {left.strip()}"


@dataclass(frozen=True)
class Table:
    """All entries of a model, and what else its checkpoints may contain.

    Attributes:
        entries: canonical names, which are also the names written.
        renames: ``(pattern, replacement)`` pairs applied in order to a stored key to make it canonical (other releases'
            names).
        ignored: patterns (``re.fullmatch`` on the canonical key) of keys that are left out, each with its reason beside
            it.
        parts: ``(pattern, advice)``: when a checkpoint has none of the wanted keys that match (whole), the advice is
            the error, not the list of keys.
        module_names: ``(pattern, replacement)`` pairs from a canonical name to that of the module in transformers,
            which adapters are stored by (``models/peft.py``).
    """

    entries: tuple[Entry, ...]
    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    parts: tuple[tuple[str, str], ...] = ()
    module_names: tuple[tuple[str, str], ...] = ()

    def module_name(self, key: str) -> str:
        for pattern, replacement in self.module_names:
            key = re.sub(pattern, replacement, key)
        return key

    def canonical(self, key: str) -> str:
        for pattern, replacement in self.renames:
            key = re.sub(pattern, replacement, key)
        return key


def layers_from(prefix: str, depth: int) -> str:
    """A pattern for the keys of the layers from ``depth`` on (at most 999)."""
    return prefix + r"\.(" + "|".join(str(i) for i in range(depth, 1000)) + r")\..*"


class CheckpointError(UserError):
    """A checkpoint that does not fit its model: the lists of all keys at fault."""

    def __init__(
        self, where: Path, missing: list[str], unknown: list[str], misshapen: list[str], duplicated: list[str]
    ):
        self.missing, self.unknown, self.misshapen, self.duplicated = missing, unknown, misshapen, duplicated
        problems = {"missing": missing, "unknown": unknown, "wrong shape": misshapen, "duplicated": duplicated}
        parts = [f"{len(keys)} {what}: {', '.join(keys)}" for what, keys in problems.items() if keys]
        super().__init__(f"{where}: weights do not fit config.json: {'; '.join(parts)}")


def read_headers(directory: Path) -> Iterator[StoredTensor]:
    """Headers of every tensor of a checkpoint directory, in file order.

    Raises:
        UserError: no weights, a file named by the index is missing, or a file is truncated or not safetensors; names
            the file.
    """
    for file in weight_files(directory):
        yield from file_headers(file)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in name order (see :func:`read_headers`)."""
    index = directory / INDEX_FILE
    tower = [file for file in (directory / TOWER_FILE,) if file.exists()]
    if index.exists():
        try:
            names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{index}: not a safetensors index ({error})") from None
        files = [directory / name for name in names]
        for file in files:
            if not file.exists():
                raise UserError(f"{file}: missing, but named by {INDEX_FILE}")
    else:
        single = directory / "model.safetensors"
        files = [single] if single.exists() else sorted(set(directory.glob("*.safetensors")) - set(tower))
    if not files:
        raise UserError(f"{directory}: no *.safetensors file in it (only safetensors are read, never pickled weights)")
    return files + [file for file in tower if file not in files]


@contextlib.contextmanager
def unchanged(files: Sequence[Path]) -> Iterator[None]:
    """Open while files are read, so that headers, tensors and digests are those of the same files.

    Raises:
        UserError: one of them has been replaced, written to or removed meanwhile; names it.
    """
    before = [_state(file) for file in files]

    def check() -> None:
        for file, state in zip(files, before, strict=True):
            if _state(file) != state:
                raise UserError(f"{file}: was changed while it was read") from None

    try:
        yield
    except (UserError, OSError, ValueError):  # of a file that is half there, perhaps
        check()
        raise
    check()


def _state(file: Path) -> tuple[int, int, int] | None:
    """What tells a file from itself as it was; None if there is none."""
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def file_headers(file: Path) -> Iterator[StoredTensor]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else math.inf
        if 8 + length > size:
            raise UserError(f"{file}: truncated or not a safetensors file ({size} bytes)")
        try:
            header = json.loads(stream.read(int(length)))
        except ValueError:
            raise UserError(f"{file}: not a safetensors file (unreadable header)") from None
    begin = 8 + int(length)
    if not isinstance(header, dict):
        raise UserError(f"{file}: not a safetensors file (its header is no object)")
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        try:
            name, shape, (start, stop) = (
                entry["dtype"],
                tuple(map(operator.index, entry["shape"])),
                entry["data_offsets"],
            )
            dtype = {**DTYPES, **BUFFER_DTYPES}.get(name)
            fits = dtype is None or (start >= 0 and stop - start == math.prod(shape) * dtype.itemsize)
        except (TypeError, KeyError, ValueError):
            raise UserError(f"{file}: damaged header: {key} lacks dtype, shape or data_offsets") from None
        if not fits:
            raise UserError(f"{file}: damaged header: {key}, {name} {list(shape)}, cannot be bytes {start} to {stop}")
        if begin + stop > size:
            raise UserError(f"{file}: truncated: {key} ends at byte {begin + stop}, the file has {size}")
        if dtype is None:
            raise _wrong_dtype(file, key, name)
        yield StoredTensor(file, key, dtype, shape, begin + start)


def _wrong_dtype(file: Path, key: str, dtype: str) -> UserError:
    return UserError(f"{file}: {key} is stored as {dtype}, which is not one of {', '.join(DTYPES)}")


def load_params(
    directory: Path,
    table: Table,
    abstract: Mapping[str, Any],
    dtype: Any,
    sharding: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None = None,
    left_out: Callable[[str], bool] | None = None,
) -> dict[str, Any]:
    """Read a checkpoint into a parameter tree.

    Args:
        directory: a folder of safetensors, single or sharded with an index.
        table: the model's table.
        abstract: the wanted tree (``jax.eval_shape`` of ``init``).
        dtype: every parameter is cast to it.
        sharding: parameter path and shape -> where it goes; each process reads only its slices, once for all its
            devices. None: one default device.
        left_out: parameter path -> whether it is checked, but not read.

    Raises:
        CheckpointError: keys missing, unknown, misshapen or duplicated; all of them.
        UserError: unreadable files.
    """
    wanted = traverse_util.flatten_dict(abstract, sep="/")
    tensors = _match(directory, table, wanted)
    flat = {}
    copies = [entry for entry in table.entries if entry.copy]
    entries = [entry for entry in table.entries if not entry.copy and not (left_out and left_out(entry.target))]
    for entry in copies:
        _check_copy(entry, table, tensors)
    stored = sum(tensors[key].nbytes for entry in entries for key in entry.stored_keys())
    # An accelerator's parameters pass through host memory and leave it.
    numbers = [_held_here(wanted[entry.target].shape, entry.target, sharding) for entry in entries]
    held = sum(numbers) * np.dtype(dtype).itemsize if jax.default_backend() == "cpu" else 0
    with Reader(forget=not pages_fit(stored, held)) as reader:
        for entry in entries:
            sources = [tensors[key] for key in entry.stored_keys()]
            shape = wanted[entry.target].shape
            if sharding is None:
                (whole,) = _read(reader, entry, sources, dtype, [tuple(slice(0, n) for n in shape)])
                flat[entry.target] = jax.device_put(whole, may_alias=True)
            else:
                flat[entry.target] = _sharded(reader, entry, sources, dtype, shape, sharding(entry.target, shape))
    return traverse_util.unflatten_dict(flat, sep="/")


def _held_here(
    shape: tuple[int, ...], target: str, sharding: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None
) -> int:
    """How many numbers of a parameter the devices of this process hold."""
    if sharding is None:
        return math.prod(shape)
    where = sharding(target, shape)
    return math.prod(where.shard_shape(shape)) * len(where.addressable_devices)


def _read(
    reader: Reader, entry: Entry, sources: Sequence[StoredTensor], dtype: Any, slices: Sequence[tuple[slice, ...]]
) -> list[np.ndarray]:
    """Slices of a parameter, each tensor read once for all of them."""
    arrays = [aligned_empty(tuple(at.stop - at.start for at in index), dtype) for index in slices]
    parts = []
    for layer, source in enumerate(sources):
        takes = []
        for index, array in zip(slices, arrays, strict=True):
            if entry.layers is None:
                takes.append((index, array))
            elif index[0].start <= layer < index[0].stop:
                takes.append((index[1:], array[layer - index[0].start, ...]))
        if takes:
            mapped = source.read()
            parts.append(Part(source, mapped, np.asarray(entry.to_param(mapped)), tuple(takes)))
    reader.read(parts)
    return arrays


def _sharded(
    reader: Reader,
    entry: Entry,
    sources: Sequence[StoredTensor],
    dtype: Any,
    shape: tuple[int, ...],
    sharding: jax.sharding.Sharding,
) -> jax.Array:
    """A parameter on its devices, of which this process reads what its own ones hold."""
    holders: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(at.indices(n)[:2] for at, n in zip(index or (), shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    size = max(1, math.prod(sharding.shard_shape(shape)) * np.dtype(dtype).itemsize)
    together = max(1, _TOGETHER_BYTES // size)  # slices that share one reading
    shards = []
    for first in range(0, len(holders), together):
        some = list(holders)[first : first + together]
        slices = [tuple(slice(*bound) for bound in bounds) for bounds in some]
        for bounds, array in zip(some, _read(reader, entry, sources, dtype, slices), strict=True):
            shards += [jax.device_put(array, device, may_alias=True) for device in holders[bounds]]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _match(directory: Path, table: Table, wanted: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """Canonical key -> stored tensor, after every check."""
    tensors: dict[str, StoredTensor] = {}
    duplicated = []
    for tensor in read_headers(directory):
        key = table.canonical(tensor.key)
        if key in tensors:
            duplicated.append(f"{tensor.key} = {tensors[key].key}")
        tensors[key] = tensor
    expected: dict[str, tuple[int, ...]] = {}
    optional = set()
    for entry in table.entries:
        shape = entry.stored_shape(wanted[entry.target].shape)
        for key in entry.stored_keys():
            expected[key] = shape
            if entry.copy:
                optional.add(key)
    unfilled = set(wanted) - {entry.target for entry in table.entries}
    if unfilled:
        raise AssertionError(f"the checkpoint table fills no {sorted(unfilled)}")
    missing = [key for key in expected if key not in tensors and key not in optional]
    for pattern, advice in table.parts:
        part = [key for key in expected if re.fullmatch(pattern, key)]
        if part and not any(key in tensors for key in part):
            raise UserError(f"{directory}: {advice}")
    misshapen = [
        f"{tensors[key].key} is {list(tensors[key].shape)}, not {list(shape)}"
        for key, shape in expected.items()
        if key in tensors and tensors[key].shape != shape
    ]
    ignored = re.compile("|".join(f"(?:{pattern})" for pattern in table.ignored) or r"(?!)")
    unknown = [tensor.key for key, tensor in tensors.items() if key not in expected and not ignored.fullmatch(key)]
    if missing or unknown or misshapen or duplicated:
        raise CheckpointError(directory, missing, unknown, misshapen, duplicated)
    buffers = {dtype: name for name, dtype in BUFFER_DTYPES.items()}
    for key in expected:
        if key in tensors and (dtype := tensors[key].dtype) in buffers:
            raise _wrong_dtype(tensors[key].file, tensors[key].key, buffers[dtype])
    return tensors


def _check_copy(entry: Entry, table: Table, tensors: Mapping[str, StoredTensor]) -> None:
    (original,) = (e for e in table.entries if e.target == entry.target and not e.copy)
    for key, other in zip(entry.stored_keys(), original.stored_keys(), strict=True):
        if key in tensors and not np.array_equal(tensors[key].read(), tensors[other].read()):
            raise UserError(
                f"{tensors[key].file}: {tensors[key].key} differs from {tensors[other].key}, but config.json ties them"
            )


def save_checkpoint(
    directory: str | Path,
    config: Mapping[str, Any],
    params: Mapping[str, Any],
    dtype: Any = "float32",
    table: Table | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write ``config.json`` and safetensors (sharded with an index when large) in the Hugging Face layout.

    Args:
        directory: made if missing; other files in it (tokenizer, processor) are left alone, old weights are replaced.
        config: the ``config.json`` to write.
        params: the parameter tree.
        dtype: the stored dtype ("float32", "bfloat16", "float16").
        table: the model's table; by default that of ``config``'s family.
        max_shard_bytes: a file grows no larger, unless one tensor is.
    """
    from safetensors.numpy import save_file

    if table is None:
        from sav_jax.models.registry import architecture

        table = architecture(config).table
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    flat = traverse_util.flatten_dict(params, sep="/")
    shards = _assign_shards(table, flat, np.dtype(dtype).itemsize, max_shard_bytes)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        # One shard in memory at a time; written beside and renamed, so that a killed save leaves no half file under a
        # weight file's name.
        partial = directory / f"{name}.partial"
        tensors = {key: _stored(entry, flat[entry.target], layer, dtype) for key, entry, layer in shard}
        save_file(tensors, partial, metadata={"format": "pt"})
        partial.chmod(0o644)  # the library makes it private to its user
        partial.replace(directory / name)
    old = {*directory.glob("model*.safetensors"), directory / INDEX_FILE, directory / TOWER_FILE}
    for file in old - {directory / name for name in names}:
        file.unlink(missing_ok=True)
    if len(shards) > 1:
        total = sum(math.prod(value.shape) for value in flat.values()) * np.dtype(dtype).itemsize
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key, _, _ in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    (directory / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")


def _assign_shards(
    table: Table, flat: Mapping[str, Any], itemsize: int, max_shard_bytes: int
) -> list[list[tuple[str, Entry, int]]]:
    """Which (key, entry, layer) goes into which file."""
    shards: list[list[tuple[str, Entry, int]]] = [[]]
    size = 0
    for entry in table.entries:
        if entry.copy:
            continue
        nbytes = math.prod(entry.stored_shape(flat[entry.target].shape)) * itemsize
        for layer, key in enumerate(entry.stored_keys()):
            if size + nbytes > max_shard_bytes and shards[-1]:
                shards.append([])
                size = 0
            shards[-1].append((key, entry, layer))
            size += nbytes
    return shards


def _stored(entry: Entry, param: Any, layer: int, dtype: Any) -> np.ndarray:
    value = np.asarray(param if entry.layers is None else param[layer])
    # Unlike ascontiguousarray, this leaves a scalar a scalar.
    return np.asarray(entry.to_stored(value), order="C").astype(dtype)


def _rearranged_shape(pattern: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Shape of ``rearrange(x, pattern, **sizes)`` for an ``x`` of ``shape``, without the array."""
    return rearrange(np.broadcast_to(np.int8(0), shape), pattern, **sizes).shape
