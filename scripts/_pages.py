"""Pages of documentation: their fenced blocks, and what Python examples print."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
      file: the page, relative to the checkout.
      line: of its first line.
      language: behind the fence.
      text: what is in it.
      end: where it ends in the page.
      output: of a Python block, what the block of "text" directly below it says that it prints; None without one.
    """

    file: str
    line: int
    language: str
    text: str
    end: int
    output: str | None


def blocks(page: str, file: str) -> list[Block]:
    """All fenced blocks of a page."""
    found = []
    for match in _FENCED.finditer(page):
        below = re.match(r"\n\n```text\n(.*?)^```$", page[match.end() :], flags=re.MULTILINE | re.DOTALL)
        line = page.count("\n", 0, match.start(2)) + 1
        output = below[1] if below and match[1] == "python" else None
        found.append(Block(file, line, match[1], match[2], match.end(), output))
    return found


def file_name(path: Path) -> str:
    """A page's name in messages."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


@contextlib.contextmanager
def heard() -> Iterator[io.StringIO]:
    """What is printed meanwhile, on stdout and stderr."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        yield said


def run(block: Block, names: dict[str, Any]) -> tuple[str, list[str]]:
    """Runs a Python block.

    Args:
      block: the block.
      names: its globals, which it adds to.

    Returns:
      What it prints on stdout; and where a comment behind a ``print`` does not begin with what that prints.
    """
    lines = block.text.splitlines()
    wrong = []
    said = io.StringIO()

    def print_(*values: Any, **options: Any) -> None:
        number = sys._getframe(1).f_lineno
        promised = re.search(r"print\(.*\)  # (.*)", lines[number - 1])
        text = " ".join(map(str, values))
        if promised and not promised[1].startswith(text):
            wrong.append(f"{block.file}:{block.line + number - 1}: prints {text!r}, not {promised[1]!r}")
        print(*values, **options)

    names["print"] = print_
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
        exec(compile(block.text, f"{block.file}:{block.line}", "exec"), names)
    return said.getvalue(), wrong


def alike(text: str, other: str) -> bool:
    """Whether two outputs are the same but for numbers that rounding may change.

    Other processors and compilers round otherwise, so that a head or an answer on an edge may fall to the other side:
    of 300 answers, six may differ (0.02); counts likewise, by a fiftieth.
    """
    if _NUMBER.sub("#", " ".join(text.split())) != _NUMBER.sub("#", " ".join(other.split())):
        return False
    pairs = zip(_NUMBER.findall(text), _NUMBER.findall(other), strict=True)
    return all(abs(float(a) - float(b)) <= max(0.02, abs(float(a)) / 50) for a, b in pairs)
