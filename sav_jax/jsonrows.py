"""JSON Lines files and JSON lists, row by row, each with where it stands."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sav_jax._storage import Location
from sav_jax.errors import UserError


def json_rows(path: Location) -> Iterator[tuple[str, Any]]:
    """Yield (where it stands, parsed value or the UserError of that line) of a JSON Lines file or a JSON list.

    Where is ``file:line``, counted from 1. Items of a list that share a line are told apart by their number in the
    list, counted from 0, and their ``"id"`` if they have one: ``data.json:1, row 3, id "x"``.

    Raises:
      UserError: if the file cannot be read, or a JSON list is malformed: its other items cannot then be told apart.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file or folder") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if text.lstrip().startswith("["):
        yield from _json_list(path, text)
        return
    # Only "\n" ends a line: str.splitlines would also cut at characters that JSON strings may hold (U+2028 and others).
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            try:
                value = json.loads(content)
                yield f"{path}:{line}", _half_character(f"{path}:{line}", content, value) or value
            except (json.JSONDecodeError, RecursionError) as error:
                yield (
                    f"{path}:{line}",
                    UserError(f"{path}:{line}: {_json_problem(error)} (one JSON object per line is expected)"),
                )


def _json_list(path: Location, text: str) -> Iterator[tuple[str, Any]]:
    """Decode the list's items one by one, to know the line on which each begins."""
    decoder = json.JSONDecoder()
    position = _skip_space(text, text.index("[") + 1)
    before, number = 0, 0
    line, counted = text.count("\n", 0, position) + 1, position
    if text[position : position + 1] != "]":
        while True:
            start = position
            try:
                value, end = decoder.raw_decode(text, start)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{error.lineno}: {_json_problem(error)}") from None
            except RecursionError as error:
                raise UserError(f"{path}:{line}: {_json_problem(error)}") from None
            position = _skip_space(text, end)
            mark = text[position : position + 1]
            ahead = _skip_space(text, position + 1) if mark == "," else position
            below = line + text.count("\n", counted, ahead)
            alone = before < line and (mark != "," or line < below)
            source = f"{path}:{line}" if alone else f"{path}:{line}, row {number}{_id_of(value)}"
            yield source, _half_character(source, text[start:end], value) or value
            if mark != ",":
                break
            before, line, counted, position, number = line, below, ahead, ahead, number + 1
        if mark != "]":
            line += text.count("\n", counted, position)
            raise UserError(f'{path}:{line}: malformed JSON: "," or "]" is missing after an item of the list')
    rest = _skip_space(text, position + 1)
    if rest != len(text):
        line = text.count("\n", 0, rest) + 1
        raise UserError(f"{path}:{line}: malformed JSON: something follows the end of the list")


def _half_character(source: str, content: str, value: Any) -> UserError | None:
    """The error of a row with half of a surrogate pair, which JSON can say ("\\ud800") and no UTF-8 text can hold."""
    if "\\u" not in content:
        return None
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        return UserError(f"{source}: {half} is half of a character; its other half is missing")
    return None


def _id_of(value: Any) -> str:
    name = value.get("id") if isinstance(value, dict) else None
    return f", id {json.dumps(name, ensure_ascii=False)[:100]}" if isinstance(name, str | int) else ""


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\r", "\n"):
        position += 1
    return position


def _json_problem(error: json.JSONDecodeError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "malformed JSON: nested too deeply"
    return f"malformed JSON: {error.msg} at column {error.colno}"


def misspelt(row: Mapping[str, Any], fields: Iterable[str]) -> tuple[str, str] | None:
    """A key of the row that is probably meant to be one of the fields, which the row lacks; and that field.

    Other keys that nobody reads are common in published files and mean nothing.
    """
    for field in fields:
        if row.get(field) is None:
            for key in row:
                alike = difflib.get_close_matches(key.lower(), [field], 1, 0.8)
                if alike and key != field and not key.startswith(f"{field}_"):  # "image_id" is another thing
                    return key, field
    return None


def json_kind(value: Any) -> str:
    """Name a JSON value's type in JSON's words."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names[type(value)]
