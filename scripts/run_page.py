#!/usr/bin/env python
"""Runs the Python blocks of a page in order and writes below each what it printed; pictures, too.

    python scripts/run_page.py docs/walkthrough.md

Blocks run in one process, in a temporary folder. A picture that the page shows from the folder of its own name
(``walkthrough/heads.png``) is taken from there, where a block has written it (``heads.png``).
"""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts._pages import blocks, file_name, run  # noqa: E402


def written(page: str, name: str, pictures: Path | None = None) -> str:
    """The page with what its blocks print now; they run in the current folder.

    Args:
      page: its text.
      name: of the page, in messages.
      pictures: where those that it shows are copied to; None for nowhere.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    parts, end = [], 0
    for block in blocks(page, name):
        if block.language != "python":
            continue
        said, wrong = run(block, names)
        if wrong:
            raise SystemExit("\n".join(wrong))
        parts.append(page[end : block.end])
        if said:
            parts.append(f"\n\n```text\n{said.rstrip()}\n```")
        end = block.end
        if block.output is not None:
            end += page[end:].index("```text\n")
            end += page[end:].index("\n```\n") + len("\n```")
    if pictures is not None:
        pictures.mkdir(exist_ok=True)
        for picture in re.findall(rf"\]\({pictures.name}/([\w.-]+)\)", page):
            shutil.copy(picture, pictures / picture)
    return "".join([*parts, page[end:]])


def main(names: Sequence[str]) -> int:
    """Runs pages."""
    for path in (Path(name).resolve() for name in names):
        if not path.is_file():
            print(f"error: {path}: no such page", file=sys.stderr)
            return 2
        page = path.read_text(encoding="utf-8")
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            made = written(page, file_name(path), path.with_suffix(""))
        path.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
