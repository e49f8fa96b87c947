"""Folders of pictures, on a local disk or in a bucket, or of videos: one sub-folder per class, or all in one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sav_jax._storage import BucketPath, Location, local
from sav_jax.errors import UserError
from sav_jax.video import VIDEO_SUFFIXES

IMAGE_SUFFIXES = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Files of a class folder with one of these endings (in any case) are its pictures; all others are ignored."""

_MEDIA = f"pictures ({', '.join(IMAGE_SUFFIXES)}) or videos ({', '.join(VIDEO_SUFFIXES)})"


def media_of_folder(root: Location, require_labels: bool) -> list[tuple[Any, str | None]]:
    """Paths of pictures, or of videos, and their classes, None where there are no class folders.

    Args:
      root: the folder.
      require_labels: there must be class folders.

    Raises:
      OSError: it cannot be read.
      UserError: it holds nothing, both kinds, or files beside class folders.
    """
    classes, files = _entries(root)
    loose = [file for file in files if _is_media(file)]
    if classes and loose:
        raise UserError(
            f"{root}: holds {_media_name(loose)} ({loose[0].name}, ...) beside class folders ({classes[0].name}, ...)"
        )
    if not classes and not loose:
        raise UserError(f"{root}: holds neither class folders nor {_MEDIA}")
    if not classes and require_labels:
        raise UserError(
            f"{root}: holds no class folders; one sub-folder per class is expected, its name being the label"
        )
    found: list[tuple[Any, str | None]] = [(path, None) for path in loose]
    found += [(path, folder.name) for folder in classes for path in _media_in(folder)]
    videos = [path for path, _ in found if is_video(path)]
    pictures = [path for path, _ in found if not is_video(path)]
    if videos and pictures:
        raise UserError(f"{root}: holds pictures ({pictures[0]}, ...) and videos ({videos[0]}, ...); use one kind only")
    if videos:
        local(videos[0], "a video")
    return found


def _entries(root: Location) -> tuple[list[Any], list[Any]]:
    """Folders and files in a folder, sorted, without hidden ones."""
    if isinstance(root, BucketPath):
        parts = [name.partition("/") for name in root.names() if not name.startswith(".")]
        folders = dict.fromkeys(name for name, below, _ in parts if below)
        return [root / name for name in folders], [root / name for name, below, _ in parts if not below]
    entries = sorted(entry for entry in root.iterdir() if not entry.name.startswith("."))
    return [entry for entry in entries if entry.is_dir()], [entry for entry in entries if not entry.is_dir()]


def _media_in(folder: Location) -> list[Any]:
    found: list[Any] = []
    if isinstance(folder, BucketPath):
        found = [folder / name for name in folder.names() if not any(part[:1] == "." for part in name.split("/"))]
    else:
        for parent, folders, files in os.walk(folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found += [Path(parent, name) for name in files if not name.startswith(".")]
    found = sorted(path for path in found if _is_media(path))
    if not found:
        raise UserError(f"{folder}: class folder without {_MEDIA}")
    return found


def _is_media(path: Location) -> bool:
    named = path.suffix.lower() in IMAGE_SUFFIXES or is_video(path)
    return named and (isinstance(path, BucketPath) or path.is_file())  # what a bucket lists are files


def is_video(path: Location) -> bool:
    """By its name."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def _media_name(paths: list[Any]) -> str:
    return "videos" if all(map(is_video, paths)) else "pictures"
