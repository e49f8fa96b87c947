"""Writing results, on a local disk or in a bucket: whoever is interrupted leaves either a whole file or none."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping

from sav_jax._storage import AnyPath, BucketPath, Location, check_bucket, location
from sav_jax.errors import UserError


def check_output_folder(path: AnyPath, marker: str | None = None) -> Location:
    """Refuse, before any work is done, a folder that cannot be written later.

    Args:
      path: the folder.
      marker: a file that an earlier output of this kind holds; a folder that is not empty must have it.

    Raises:
      UserError: if the path is a file, lies below a file or in a folder without write permission, or holds other
        things.
    """
    folder = location(path)
    with _reported(folder):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: is a file; the output is a folder")
        if marker is not None and folder.is_dir() and any(folder.iterdir()) and not (folder / marker).exists():
            raise UserError(f"{folder}: holds other things (no {marker}); choose another folder for the output")
        _check_writable(folder, folder)
    return folder


def check_output_file(path: AnyPath) -> Location:
    """Refuse, before any work is done, a file that cannot be written later.

    Raises:
      UserError: if the path is a folder, or lies below a file or in a folder without write permission.
    """
    file = location(path)
    with _reported(file):
        if file.is_dir():
            raise UserError(f"{file}: is a folder; the output is a file")
        _check_writable(file, file.parent)
    return file


def _check_writable(path: Location, folder: Location) -> None:
    if isinstance(folder, BucketPath):
        check_bucket(folder)
        return
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise UserError(f"{path}: cannot be written: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{path}: cannot be written: no permission for {existing}")


def write_file(path: AnyPath, content: bytes) -> None:
    """Write a file, and the folders above it, replacing an old file in one step.

    Raises:
      UserError: if the system refuses.
    """
    path = location(path)
    with _reported(path):
        if isinstance(path, BucketPath):
            path.write_bytes(content)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_folder(path: AnyPath, files: Mapping[str, bytes]) -> None:
    """Write the files of a folder. A new folder appears complete; in an old one, and in a bucket, the files are written
    one by one, in their order: what says that the others are complete comes last.

    Args:
      path: the folder.
      files: names, which may have folders in them ("images/1.png"), and contents.

    Raises:
      UserError: if the system refuses.
    """
    path = location(path)
    with _reported(path):
        if isinstance(path, BucketPath) or path.exists():
            for name, content in files.items():
                write_file(path / name, content)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        temporary.mkdir()
        try:
            for name, content in files.items():
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                (temporary / name).write_bytes(content)
            os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _reported(path: Location) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def to_stdout(text: str) -> None:
    """Write, and let nothing wait in a buffer.

    Raises:
      UserError: the disk behind it is full.
      BrokenPipeError: nobody reads it any more.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        # What is still in the buffer must not be tried again when the process ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise UserError(f"standard output: {error.strerror}") from error
