"""Benchmarks that their authors publish as files: where those are had, where they go, whether they are whole."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sav_jax.errors import UserError


@dataclass(frozen=True)
class Release:
    """The files of a benchmark.

    Attributes:
      folder: name of their folder in the data folder.
      address: where the annotation files are had.
      files: annotation file, or a pattern of file names -> number of rows in the authors' release, None if unknown.
      pictures: which pictures are needed and where they go, in words with an address.
      optional: further files, read if they are there: name -> rows.
      anyof: one of ``files`` is enough (the benchmark has parts or forms).
    """

    folder: str
    address: str
    files: Mapping[str, int | None]
    pictures: str = ""
    optional: Mapping[str, int | None] = field(default_factory=dict)
    anyof: bool = False

    def __str__(self) -> str:
        """What is looked for, in one line."""
        said = (" or " if self.anyof else ", ").join(_counted(name, rows) for name, rows in self.files.items())
        if self.optional:
            said += "; if there also " + ", ".join(_counted(name, rows) for name, rows in self.optional.items())
        return f"{said} from {self.address}" + (f"; {self.pictures}" if self.pictures else "")

    def missing(self, folder: Path) -> list[str]:
        """Annotation files that are not there; none missing if one of them is enough and is there."""
        absent = [name for name in self.files if not any(folder.glob(name))]
        return [] if self.anyof and len(absent) < len(self.files) else absent

    def require(self, task: str, folder: Path) -> None:
        """Check that the annotation files are there.

        Raises:
          UserError: one line that says what to fetch from where and where to put it.
        """
        if absent := self.missing(folder):
            raise UserError(f"task {task}: {folder} lacks {', '.join(absent)}; put there: {self}")

    def check_count(self, folder: Path, name: str, rows: int) -> None:
        """Say on stderr when a file has not the number of rows that the authors published.

        That is no error, so that a part of a benchmark can be tried; but its results compare with nothing published.
        """
        wanted = {**self.files, **self.optional}.get(name)
        if wanted is not None and wanted != rows:
            warn(
                f"{folder / name} has {rows:,} rows where the release has {wanted:,}: results will not compare with "
                "published ones"
            )


def warn(text: str) -> None:
    """Tell the person who runs the evaluation, on stderr."""
    print(f"warning: {text}", file=sys.stderr)


def _counted(name: str, rows: int | None) -> str:
    return name if rows is None else f"{name} ({rows:,} rows)"


def find_picture(folder: Path, name: str, places: Sequence[str]) -> Path | None:
    """Find a picture by the path that an annotation file gives, which may begin with folders of its authors' machine.

    Args:
      folder: of the benchmark.
      name: the path as given.
      places: sub-folders in which pictures are expected; ``folder`` itself is always looked through.

    Returns:
      The first file that exists among the given path and ever shorter ends of it in each place; None if there is none.
    """
    given = Path(name)
    if given.is_absolute() and given.is_file():
        return given
    parts = [part for part in given.parts if part not in ("/", ".", "..")]
    for start in range(len(parts)):
        for place in (*places, ""):
            path = folder.joinpath(place, *parts[start:])
            if path.is_file():
                return path
    return None
