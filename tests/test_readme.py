"""What the README shows is what happens."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every ``sav-jax`` command line, without its comment."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [line.partition(" #")[0].strip() for line in lines if line.startswith("sav-jax ")]


def test_the_python_example_runs_and_prints_the_shape_it_says(tmp_path: Path) -> None:
    (program,) = blocks("python")
    said = re.search(r"print\(heads\.shape\)  # (\(.*\))", program)
    assert said is not None
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[0] == said[1]


@pytest.mark.parametrize("command", commands())
def test_the_commands_are_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from sav_jax import _commands, cli

    asked: list[object] = []
    monkeypatch.setattr(_commands, "run", asked.append)
    assert cli.main(shlex.split(command)[1:]) == 0
    assert type(asked[0]).__name__.lower() == command.split()[1]


def test_every_file_it_mentions_exists() -> None:
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", README)
    paths = re.findall(r"`(?:bash )?((?:scripts|tests|sav_jax)/[\w./-]*)`", README)
    assert links
    for path in [*links, *paths]:
        assert (ROOT / path).exists(), path


def test_no_number_is_left_open() -> None:
    assert "<!-- NUMBER" not in README
