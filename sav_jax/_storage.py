"""Files on a local disk and in a bucket of Google Cloud Storage (``gs://bucket/name``), by the same names.

Buckets are reached through TensorStore, which needs no further package, finds Google's usual credentials
(https://google.github.io/tensorstore/kvstore/gcs) and stores an object whole or not at all. A folder of a bucket is all
objects whose names begin alike: it needs not be made, and is not there when nothing is in it.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import functools
import io
import os
import posixpath
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from sav_jax.errors import UserError

if TYPE_CHECKING:
    import tensorstore as ts

_APPENDED = r" \[(os_error_code|tensorstore_spec|source locations|http_response_(code|body))=.*"
_RETRIES = 8  # of a request that an overloaded service refuses, each after twice the time: two minutes in all


@dataclass(frozen=True)
class BucketPath:
    """A file or folder in a bucket, with those methods of :class:`pathlib.Path` that are needed; they raise the same.

    Attributes:
      bucket: its name.
      key: the object's name, or the folder's without a slash at its end; "" is the whole bucket.
    """

    bucket: str
    key: str = ""

    def __str__(self) -> str:
        return f"gs://{self.bucket}/{self.key}".rstrip("/")

    def __truediv__(self, other: str) -> BucketPath:
        key = posixpath.normpath(f"/{self.key}/{other}").strip("/")  # "a//b" and "a/../b" are names of other objects
        return BucketPath(self.bucket, key)

    def __lt__(self, other: BucketPath) -> bool:
        # As paths on a disk are sorted.
        return (self.bucket, self.key.split("/")) < (other.bucket, other.key.split("/"))

    @property
    def name(self) -> str:
        return posixpath.basename(self.key)

    @property
    def suffix(self) -> str:
        return posixpath.splitext(self.name)[1]

    @property
    def parent(self) -> BucketPath:
        return BucketPath(self.bucket, posixpath.dirname(self.key))

    def relative_to(self, folder: BucketPath) -> PurePosixPath:
        return PurePosixPath(self.key).relative_to(folder.key)

    def read_bytes(self) -> bytes:
        with self._errors():
            found = _objects(self.bucket).read(self.key).result() if self.key else None
        if found is None or found.state != "value":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return bytes(found.value)

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.open(encoding=encoding).read()

    def open(self, *, encoding: str = "utf-8") -> io.TextIOWrapper:
        """Its text, all of it fetched."""
        return io.TextIOWrapper(io.BytesIO(self.read_bytes()), encoding=encoding)

    def write_bytes(self, content: bytes) -> None:
        with self._errors():
            _objects(self.bucket).write(self.key, content).result()

    def unlink(self, missing_ok: bool = False) -> None:
        if not missing_ok and not self.is_file():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        with self._errors():
            _objects(self.bucket).write(self.key, None).result()

    def is_file(self) -> bool:
        if not self.key:
            return False
        with self._errors():
            # Its description, not its content.
            return _objects(self.bucket).read(self.key, byte_range=slice(0, 0)).result().state == "value"

    def is_dir(self) -> bool:
        return bool(self.names())

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def names(self) -> list[str]:
        """Of all objects in the folder, at any depth, sorted: "a/b.png"."""
        start = f"{self.key}/" if self.key else ""
        # What begins alike: up to the name with the character that follows "/".
        span = {"inclusive_min": start, "exclusive_max": f"{self.key}0"} if self.key else {}
        with self._errors():
            found = _objects(self.bucket).list(_key_range(**span)).result()
        # An object that is called like a folder, which some tools make, is none of its files.
        names = (key.decode().removeprefix(start) for key in found)
        return sorted((name for name in names if name[-1:] not in ("", "/")), key=lambda name: name.split("/"))

    def iterdir(self) -> Iterator[BucketPath]:
        for name in dict.fromkeys(name.partition("/")[0] for name in self.names()):
            yield self / name

    def glob(self, pattern: str) -> Iterator[BucketPath]:
        """Of the files in the folder itself."""
        for name in self.names():
            if "/" not in name and fnmatch.fnmatchcase(name, pattern):
                yield self / name

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, RuntimeError) as error:
            raise OSError(errno.EIO, reason(error), str(self)) from error


Location = Path | BucketPath
AnyPath = str | os.PathLike[str] | BucketPath


def is_url(path: AnyPath) -> bool:
    # pathlib folds the slashes of Path("gs://bucket"); whoever passes one means the same.
    return re.match(r"[a-z][a-z0-9]+:/", str(path)) is not None


def location(path: AnyPath) -> Location:
    """A path on the local disk, or in a bucket.

    Raises:
      UserError: a URL of another kind.
    """
    if isinstance(path, BucketPath) or not is_url(path):
        return path if isinstance(path, BucketPath) else Path(path)
    match = re.fullmatch(r"gs://?([^/]+)(?:/(.*))?", str(path))
    if match is None:
        raise UserError(f"{path}: not a path that is known here; use a local one or gs://bucket/name")
    return BucketPath(match[1]) / (match[2] or "")


def local(path: AnyPath, what: str) -> Path:
    """A path of what can only be on a local disk.

    Args:
      path: what was given.
      what: names it in the error.

    Raises:
      UserError: it is a URL.
    """
    if is_url(path):
        shown = re.sub(r"^gs:/+", "gs://", str(path))
        raise UserError(f"{shown}: {what} must lie on a local disk (a bucket may be mounted: gcsfuse)")
    return Path(str(path))


def lies_in(path: Location, folder: Location) -> bool:
    """Whether a path is that folder (or file), or is somewhere in it."""
    if isinstance(path, Path) and isinstance(folder, Path):
        return folder.resolve() in (path.resolve(), *path.resolve().parents)
    return f"{path}/".startswith(f"{folder}/")


def file_finder() -> Callable[[Location], bool]:
    """A function that says whether a file is there, in a bucket by one listing of its folder, not by a request each."""
    listed = functools.cache(lambda folder: frozenset(folder.names()))

    def found(path: Location) -> bool:
        return path.name in listed(path.parent) if isinstance(path, BucketPath) else path.is_file()

    return found


def check_bucket(folder: BucketPath) -> None:
    """Find out whether anything can be stored in a folder: an empty object is, and is taken away again.

    Raises:
      OSError: nothing can.
    """
    trial = folder / f".{secrets.token_hex(4)}.tmp"
    trial.write_bytes(b"")
    with contextlib.suppress(OSError):  # whoever may only add does so
        trial.unlink(missing_ok=True)


# TensorStore


def kvstore_spec(path: AnyPath, folder: str = "") -> dict[str, Any]:
    """TensorStore's description of ``path/folder``: a local folder (made absolute) or the objects of a bucket.

    Args:
      path: a folder.
      folder: "" or a name below it with a slash at its end.
    """
    where = location(path)
    if isinstance(where, Path):
        return {"driver": "file", "path": f"{where.expanduser().resolve()}/{folder}"}  # which may not hold ".."
    return {"driver": "gcs", "bucket": where.bucket, "path": f"{where.key}/{folder}" if where.key else folder}


def open_kvstore(path: AnyPath) -> ts.KvStore:
    """The objects of a folder.

    Raises:
      UserError: it cannot be used.
    """
    import tensorstore

    spec = kvstore_spec(path)
    with storage_errors(path):
        return tensorstore.KvStore.open(spec, context=context()).result()


@functools.cache
def context() -> ts.Context:
    """What all that is opened shares: how often a request is tried."""
    import tensorstore

    return tensorstore.Context({"gcs_request_retries": {"max_retries": _RETRIES}})


@contextlib.contextmanager
def storage_errors(path: AnyPath) -> Iterator[None]:
    """What TensorStore or the file system refuses is the user's to mend: one line naming the path."""
    try:
        yield
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(f"{path}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """What an error of TensorStore or the file system says, in one line."""
    if isinstance(error, OSError) and error.strerror and isinstance(error.filename, str) and is_url(error.filename):
        return error.strerror
    # TensorStore appends its own spec, source locations and the whole answer of a server in brackets.
    text = re.sub(_APPENDED, "", str(error), flags=re.DOTALL)
    said = re.search(r'"message":\s*"([^"\\]+)', str(error))
    return " ".join(f"{text}: {said[1]}".split() if said else text.split())


@functools.cache
def _objects(bucket: str) -> ts.KvStore:
    import tensorstore

    return tensorstore.KvStore.open({"driver": "gcs", "bucket": bucket}, context=context()).result()


def _key_range(**span: str) -> ts.KvStore.KeyRange:
    import tensorstore

    return tensorstore.KvStore.KeyRange(**span)
