"""Rows of annotation files, with messages that name file, row and field."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sav_jax.errors import UserError
from sav_jax.eval.tasks.release import Release, find_picture
from sav_jax.examples import EncodedImage
from sav_jax.jsonrows import json_kind, json_rows

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One object of an annotation file.

    Attributes:
      source: file and line, or file and key.
      number: its place in the file, from 0.
      values: field -> value.
      key: its name, in a file that is one object of objects; else "".
    """

    source: str
    number: int
    values: Mapping[str, Any]
    key: str = ""

    def bad(self, field: str, problem: str) -> UserError:
        """The error that says what is wrong with a field."""
        return UserError(f'{self.source}: field "{field}" {problem}')

    def value(self, field: str) -> Any:
        """A field that must be there."""
        found = self.values.get(field)
        if found is None:
            raise self.bad(field, "is missing")
        return found

    def text(self, field: str) -> str:
        """A field that holds text, not blank."""
        found = self.value(field)
        if not isinstance(found, str):
            raise self.bad(field, f"must be a string, not {json_kind(found)}")
        if not found.strip():
            raise self.bad(field, "is empty")
        return found

    def name(self, field: str, default: str) -> str:
        """An identifier: text or a whole number."""
        found = self.values.get(field)
        if found is None:
            return default
        if isinstance(found, bool) or not isinstance(found, str | int):
            raise self.bad(field, f"must be a string or an integer, not {json_kind(found)}")
        return str(found)

    def whole(self, field: str) -> int:
        """A field that holds a whole number."""
        found = self.value(field)
        if isinstance(found, bool) or not isinstance(found, int):
            raise self.bad(field, f"must be an integer, not {json_kind(found)}")
        return found

    def one_of(self, field: str, allowed: Sequence[Any]) -> Any:
        """A field with one of some values; True is not taken for 1, nor 1 for True."""
        found = self.value(field)
        for value in allowed:
            if found == value and isinstance(found, bool) == isinstance(value, bool):
                return value
        raise self.bad(field, f"is {json.dumps(found)}, not one of {', '.join(map(json.dumps, allowed))}")

    def objects(self, field: str) -> list[Row]:
        """A field that holds a list of objects."""
        found = self.items(field)
        for value in found:
            if not isinstance(value, dict):
                raise self.bad(field, f"must be a list of objects; it holds {json_kind(value)}")
        return [Row(self.source, number, value) for number, value in enumerate(found)]

    def replies(self, field: str = "answers") -> tuple[str, ...]:
        """What people answered, as VQA keeps it: a list of objects with an "answer" each, which may be empty."""
        found = []
        for reply in self.objects(field):
            answer = reply.value("answer")
            if not isinstance(answer, str):
                raise reply.bad("answer", f"must be a string, not {json_kind(answer)}")
            found.append(answer)
        return tuple(found)

    def texts(self, field: str) -> list[str]:
        """A field that holds a list of texts."""
        found = self.items(field)
        for value in found:
            if not isinstance(value, str):
                raise self.bad(field, f"must be a list of strings; it holds {json_kind(value)}")
        return found

    def items(self, field: str) -> list[Any]:
        """A field that holds a list with something in it."""
        found = self.value(field)
        if not isinstance(found, list):
            raise self.bad(field, f"must be a list, not {json_kind(found)}")
        if not found:
            raise self.bad(field, "is an empty list")
        return found

    def picture(self, field: str, folder: Path, *places: str, name: str | None = None) -> Path:
        """A picture that a field names, which must exist (:func:`sav_jax.eval.tasks.release.find_picture`).

        ``name`` is its file's, where that is made of the field's value.
        """
        name = self.text(field) if name is None else name
        found = find_picture(folder, name, places)
        if found is None:
            where = folder.joinpath(*places[:1])
            raise self.bad(field, f"names {name!r}: there is no {Path(name).name} in {where}")
        return found

    def image(self, field: str, folder: Path, *places: str) -> Path | EncodedImage:
        """A picture that lies in the row itself, as in parquet files, or that it names."""
        found = self.value(field)
        return found if isinstance(found, EncodedImage) else self.picture(field, folder, *places)


def json_objects(path: Path) -> Iterator[Row | UserError]:
    """The objects of a JSON Lines file, of a JSON list or of a JSON object of objects, or what is wrong with one."""
    if path.suffix == ".json" and (keyed := _keyed(path)) is not None:
        rows: Iterable[tuple[str, Any, str]] = (
            (f"{path}: row {json.dumps(key)}", value, key) for key, value in keyed.items()
        )
    else:
        rows = ((source, value, "") for source, value in json_rows(path))
    for number, (source, value, key) in enumerate(rows):
        if isinstance(value, UserError):
            yield value
        else:
            yield _row(source, number, value, key)


def nested_objects(field: str) -> Callable[[Path], Iterator[Row | UserError]]:
    """A reader of the objects in a list that a JSON object holds in a field, as in VQA's files."""

    def rows(path: Path) -> Iterator[Row | UserError]:
        whole = json_whole(path)
        found = whole.get(field) if isinstance(whole, dict) else None
        if not isinstance(found, list):
            raise UserError(f'{path}: an object with a list in field "{field}" is expected')
        for number, value in enumerate(found):
            yield _row(f"{path}: {field}[{number}]", number, value)

    return rows


def json_whole(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
      UserError: if it cannot be read or is malformed.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: malformed JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise UserError(f"{path}: malformed JSON: nested too deeply") from None


def _row(source: str, number: int, value: Any, key: str = "") -> Row | UserError:
    if isinstance(value, dict):
        return Row(source, number, value, key)
    return UserError(f"{source}: a JSON object is expected, not {json_kind(value)}")


def read_items(
    release: Release,
    folder: Path,
    name: str,
    make: Callable[[Row], Iterable[T]],
    rows: Callable[[Path], Iterable[Row | UserError]] = json_objects,
) -> tuple[T, ...]:
    """Make items (or what else is wanted) of every row of an annotation file.

    Args:
      release: knows how many rows there should be.
      folder: of the benchmark.
      name: of the file in it.
      make: turns a row into items, or raises a UserError.
      rows: reads the file.

    Raises:
      UserError: the first problem, and how many more rows are bad; or that there are no rows.
    """
    items: list[T] = []
    problems: list[UserError] = []
    count = 0
    for row in rows(folder / name):
        count += 1
        try:
            if isinstance(row, UserError):
                raise row
            items += make(row)
        except UserError as problem:
            problems.append(problem)
    if problems:
        more = len(problems) - 1
        raise UserError(str(problems[0]) + (f" (and {more} more bad row{'s'[: more != 1]})" if more else ""))
    if not items:
        raise UserError(f"{folder / name}: holds no rows")
    release.check_count(folder, name, count)
    return tuple(items)


def _keyed(path: Path) -> dict[str, Any] | None:
    """The content of a file that is one JSON object of objects over one or many lines; None if it is not."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None  # json_rows says what is wrong
    if not text.lstrip().startswith("{"):
        return None
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return None  # JSON Lines
        raise UserError(f"{path}:{error.lineno}: malformed JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise UserError(f"{path}: malformed JSON: nested too deeply") from None
    if isinstance(content, dict) and not all(isinstance(value, dict) for value in content.values()):
        return None  # a single row
    return content
