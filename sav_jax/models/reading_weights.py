"""Parts of stored tensors into host arrays, read in the order in which they lie in their files, by several threads.

Parameters lie as their files do (``layers.Projection``), so that most pieces of a file are read to where they stay.
What is cast, sliced across its rows, or wanted by several devices goes into a buffer first, as it lies in the file, and
from there to its places: reading through a memory map would wait for the disk at every row. What the devices of a
process want of a tensor is read once for all of them. Of a slice across its rows, what lies between is read, too: rows
have some ten thousand bytes, and a system that is asked for a part of each reads ahead over the rest.

The system keeps pages of files that it has read, for whoever reads them next. Where they would not fit in memory beside
the parameters, they are given back at once, as making room for them later takes longer than the disk does.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import numpy as np

from sav_jax.errors import UserError
from sav_jax.models.aligned import aligned_empty

_PIECE_BYTES = 32 * 2**20
THREADS = min(8, 2 * (os.cpu_count() or 1))  # while one waits for the disk, another moves numbers
_MEMINFO = Path("/proc/meminfo")
_PROCESS = Path("/proc/self")
_GROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class StoredTensor:
    """Header of one tensor: nothing is read until :meth:`read`."""

    file: Path
    key: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The tensor, memory-mapped: pages are read as they are used.

        Raises:
            UserError: the file has become shorter than its header says.
        """
        try:
            return np.memmap(self.file, self.dtype, "r", self.offset, self.shape) if self.shape else self._scalar()
        except ValueError:
            raise _cut_short(self) from None

    def _scalar(self) -> np.ndarray:
        return np.fromfile(self.file, self.dtype, 1, offset=self.offset).reshape(())


@dataclass(frozen=True)
class Part:
    """What is wanted of one tensor, and where it goes.

    Attributes:
        tensor: the tensor.
        mapped: what its ``read()`` gave.
        view: ``mapped`` with its axes in any order, split or merged. (A copy will do, but was read the slow way.)
        takes: for each target (a slice of each axis of ``view`` with start and stop and without a step, an array of
            that slice's shape); what is read is cast to the target's dtype.
    """

    tensor: StoredTensor
    mapped: np.ndarray
    view: np.ndarray
    takes: tuple[tuple[tuple[slice, ...], np.ndarray], ...]


@dataclass(frozen=True)
class _Piece:
    """A part of a tensor that is read at once: views of the tensor's ``mapped``, and their targets."""

    tensor: StoredTensor
    mapped: np.ndarray
    takes: tuple[tuple[np.ndarray, np.ndarray], ...]


class Reader:
    """Threads that read, and their buffers; a context.

    Args:
        forget: whether the system gives back pages of files once they are read.
    """

    def __init__(self, forget: bool = False) -> None:
        self._forget = forget
        self._threads = ThreadPoolExecutor(THREADS)
        self._own = threading.local()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._threads.shutdown(cancel_futures=True)

    def read(self, parts: Sequence[Part]) -> None:
        """Fill the targets.

        Raises:
            UserError: a file ends before its tensor does.
        """
        # A piece of each part in turn: threads that write into the same new pages of memory at once clear them twice.
        turns = itertools.zip_longest(*map(_pieces, parts))
        pieces = [piece for turn in turns for piece in turn if piece is not None]
        if len(pieces) == 1:  # most tensors are small
            self._read(pieces[0])
        else:
            list(self._threads.map(self._read, pieces))

    def _read(self, piece: _Piece) -> None:
        start, size = _extent([wanted for wanted, _ in piece.takes])
        if not size:
            return
        if not np.may_share_memory(piece.mapped, piece.takes[0][0]):
            for wanted, target in piece.takes:
                copy(wanted, target)  # what the view has copied through the memory map
            return
        offset = piece.tensor.offset + start - piece.mapped.ctypes.data
        wanted, target = piece.takes[0]
        straight = wanted.dtype == target.dtype and wanted.flags.c_contiguous and target.flags.c_contiguous
        if straight and len(piece.takes) == 1:
            _fill(piece.tensor, offset, target.reshape(-1).view(np.uint8), self._forget)
            return
        room: np.ndarray = getattr(self._own, "room", aligned_empty((0,), np.uint8))
        if room.size < size:
            room = self._own.room = aligned_empty((size,), np.uint8)
        _fill(piece.tensor, offset, room[:size], self._forget)
        for wanted, target in piece.takes:
            lies = wanted.ctypes.data - start
            copy(np.ndarray(wanted.shape, wanted.dtype, room.data, lies, wanted.strides), target)


def _pieces(part: Part) -> Iterator[_Piece]:
    """The part in pieces of no more than so many bytes of the file, cut along the axis that is slowest there, and where
    a take begins or ends.
    """
    view = part.view
    if view.ndim == 0:
        yield _Piece(part.tensor, part.mapped, tuple((view, target) for _, target in part.takes))
        return
    slowest = max(range(view.ndim), key=lambda axis: (view.shape[axis] > 1, view.strides[axis]))
    rows = max(1, _PIECE_BYTES // max(1, view.strides[slowest]))
    wanted = [(at, to) for at, to in part.takes if to.size]
    edges = sorted({edge for at, _ in wanted for edge in (at[slowest].start, at[slowest].stop)})
    for first, last in itertools.pairwise(edges):
        takes = [(at, to) for at, to in wanted if at[slowest].start <= first and last <= at[slowest].stop]
        if not takes:  # nobody wants what lies between two takes
            continue
        for start in range(first, last, rows):
            stop = min(start + rows, last)
            here = []
            for at, target in takes:
                ours = slice(start - at[slowest].start, stop - at[slowest].start)
                from_, to = list(at), [slice(None)] * view.ndim
                from_[slowest], to[slowest] = slice(start, stop), ours
                here.append((view[tuple(from_)], target[tuple(to)]))
            yield _Piece(part.tensor, part.mapped, tuple(here))


def _extent(views: Sequence[np.ndarray]) -> tuple[int, int]:
    """Where in memory the first number of some views of one array is, and how many bytes to the end of the last."""
    starts, ends = [], []
    for view in views:
        if view.size:
            steps = sum((n - 1) * step for n, step in zip(view.shape, view.strides, strict=True))
            starts.append(view.ctypes.data)
            ends.append(view.ctypes.data + steps + view.itemsize)
    return min(starts, default=0), max(ends, default=0) - min(starts, default=0)


def _fill(tensor: StoredTensor, offset: int, room: np.ndarray, forget: bool, ahead: bool = True) -> None:
    with tensor.file.open("rb", buffering=0) as stream:
        if not ahead:
            _advise(stream.fileno(), 0, 0, "POSIX_FADV_RANDOM")
        stream.seek(offset)
        done = 0
        while done < room.size:
            count = stream.readinto(room[done:].data)
            if not count:
                raise _cut_short(tensor)
            done += count
        if forget:
            forget_pages(stream.fileno(), offset, room.size)


def samples(places: Sequence[tuple[StoredTensor, int, int]]) -> list[bytes]:
    """Few bytes here and there, by several threads and without what a system reads ahead.

    Args:
        places: of each: a tensor, the first of its bytes, and how many.

    Raises:
        UserError: a file ends before its tensor does.
    """

    def read(place: tuple[StoredTensor, int, int]) -> bytes:
        tensor, start, count = place
        room = np.empty(count, np.uint8)
        _fill(tensor, tensor.offset + start, room, forget=False, ahead=False)
        return room.tobytes()

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(read, places))


def pages_fit(stored: int, held: int) -> bool:
    """Whether free memory, of the machine and of the container, has room for the pages of files beside what is made of
    them.

    Args:
        stored: bytes of the files.
        held: bytes of host memory that the parameters will take.
    """
    free = _free_in_groups()
    with contextlib.suppress(OSError):  # not Linux: the system's own ways are best
        lines = _MEMINFO.read_text().splitlines()
        free += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return not free or stored + held < min(free)


def _free_in_groups() -> list[int]:
    """What each control group that this process is in (a container's, a job's) leaves of its limit, if it has one."""
    try:
        lines = (_PROCESS / "cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return []
    free = []
    for line in lines:  # "0::/job/step" of version 2, "4:memory:/job/step" of version 1
        _, kinds, path = line.split(":", 2)
        if not kinds:
            root, limit, used, of = _GROUPS, "memory.max", "memory.current", ""
        elif "memory" in kinds.split(","):
            root, limit, used, of = _GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            continue
        # Groups around it have limits, too. A container may see its own group as the outermost, whatever its path.
        inner = PurePosixPath(path.lstrip("/"))
        for folder in (root / group for group in (inner, *inner.parents)):
            with contextlib.suppress(OSError, ValueError):  # it has no such file, or its limit is "max"
                left = int((folder / limit).read_text()) - int((folder / used).read_text())
                numbers = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                # Pages of files count as used, but make room for others.
                free.append(left + sum(int(numbers.get(f"{of}{kind}_file", 0)) for kind in ("active", "inactive")))
    return free


def forget_pages(file: int, start: int, count: int) -> None:
    """Let the system take back the pages of a part of an open file (its descriptor)."""
    _advise(file, start, count, "POSIX_FADV_DONTNEED")


def _advise(file: int, start: int, count: int, advice: str) -> None:
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(file, start, count, getattr(os, advice))


def _cut_short(tensor: StoredTensor) -> UserError:
    return UserError(f"{tensor.file}: truncated while it was read: {tensor.key} is cut short")


def copy(source: np.ndarray, target: np.ndarray) -> None:
    """Copy, and cast, an array of any memory layout into another."""
    if source.dtype == target.dtype and source.dtype.itemsize == 2:
        # As integers, which NumPy moves itself; bfloat16 it would hand over one by one.
        source, target = source.view(np.uint16), target.view(np.uint16)
    target[...] = source.astype(target.dtype, copy=False)
