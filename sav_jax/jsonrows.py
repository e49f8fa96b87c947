"""JSON Lines files and JSON lists, row by row, each with the line it begins on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sav_jax.errors import UserError


def json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (1-based line, parsed value or the UserError of that line) of a JSON Lines file or a JSON list.

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
                yield line, json.loads(content)
            except (json.JSONDecodeError, RecursionError) as error:
                yield line, UserError(f"{path}:{line}: {_json_problem(error)} (one JSON object per line is expected)")


def _json_list(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Decode the list's items one by one, to know the line on which each begins."""
    decoder = json.JSONDecoder()
    position = _skip_space(text, text.index("[") + 1)
    line, counted = text.count("\n", 0, position) + 1, position
    if text[position : position + 1] != "]":
        while True:
            try:
                value, end = decoder.raw_decode(text, position)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{error.lineno}: {_json_problem(error)}") from None
            except RecursionError as error:
                raise UserError(f"{path}:{line}: {_json_problem(error)}") from None
            yield line, value
            position = _skip_space(text, end)
            mark = text[position : position + 1]
            if mark != ",":
                break
            position = _skip_space(text, position + 1)
            line, counted = line + text.count("\n", counted, position), position
        if mark != "]":
            line += text.count("\n", counted, position)
            raise UserError(f'{path}:{line}: malformed JSON: "," or "]" is missing after an item of the list')
    rest = _skip_space(text, position + 1)
    if rest != len(text):
        line = text.count("\n", 0, rest) + 1
        raise UserError(f"{path}:{line}: malformed JSON: something follows the end of the list")


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\r", "\n"):
        position += 1
    return position


def _json_problem(error: json.JSONDecodeError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "malformed JSON: nested too deeply"
    return f"malformed JSON: {error.msg} at column {error.colno}"


def json_kind(value: Any) -> str:
    """Name a JSON value's type in JSON's words."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names[type(value)]
