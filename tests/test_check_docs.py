"""The documentation's commands are understood; ``scripts/check_docs.py``, which runs them, finds what is wrong."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from scripts_loaded import loaded


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    environment, path = dict(os.environ), list(sys.path)
    with loaded("check_docs") as module:  # it is a program, and sets what a program may
        yield module
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = path


def words(script: ModuleType, text: str) -> list[str]:
    return [command.text for command in script.commands(script.shell(text))]


def test_every_command_of_the_documentation_is_understood(script: ModuleType) -> None:
    found = 0
    for page in script.documents():
        for block in script.of_page(page):
            for command in script.commands(block) if block.language in script.SHELL else ():
                assert script.understood(command.words) == "", f"{command.file}:{command.line}"
                found += 1
    assert found > 40


def test_commands_are_found_in_blocks(script: ModuleType) -> None:
    text = "a=1,2\nx --y $a \\\n    --z  # why\n\n# nothing\ncd there && B=3 .venv/bin/x | y\n"
    assert words(script, text) == ["x --y 1,2 --z", "cd there", ".venv/bin/x", "y"]
    found = list(script.commands(script.shell(text, "page.md", 10)))
    assert [command.line for command in found] == [11, 15, 15, 15]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("sav-jax fit --model tiny --train a --output b --shots 3", "--shots"),
        ("sav-jax fit --model tiny --train a", "Required options"),
        ("sav-jax eval --tasks nothing", "no task is called 'nothing'"),
        ("sav-jax eval --methods sav,magic", "no method 'magic'"),
        ("sav-jax dance", "Unrecognized options: dance"),
        ("srun .venv/bin/sav-jax extract --model m --data d --output o --mush 2", "Unrecognized options: --mush"),
        ("gcloud ssh --command 'cd x && sav-jax train lora --distributed --modle m'", "has no --modle"),
        ("python scripts/nothing.py", "there is no scripts/nothing.py"),
        ("python scripts/train_tiny.py --run-dir a --fast", "has no --fast"),
        ("python scripts/measure_lora.py --output b --speed 2", "has no --speed"),
        ("bash scripts/test.sh tests/test_cli.py && true", ""),
        ("bash scripts/test.sh --quick", "has no --quick"),
        ("bash scripts/reproduce.sh --quick --speed 2", "has no --speed"),
        ("bash scripts/train_tiny_gpu.sh out --steps-scale 2 --stop 2", "has no --stop"),
        ("bash scripts/nothing.sh", "there is no scripts/nothing.sh"),
        ("pip install 'sav-jax[magic]'", "there is no extra 'magic'"),
        ("curl https://example.org", "neither run nor listed"),
    ],
)
def test_what_is_wrong_with_a_command_is_said(script: ModuleType, command: str, message: str) -> None:
    report = script.Report()
    (first, *_) = script.commands(script.shell(command, "page.md"))
    script.check_command(first, report)
    assert message in " ".join(report.wrong)
    assert bool(message) == bool(report.wrong)
    assert report.ran == 0


def test_small_sizes_replace_what_is_printed(script: ModuleType) -> None:
    given = "sav-jax eval --model llava-hf/llava-1.5-7b-hf --tasks digits,drawn-glyphs --shots 5,20 --output-path o"
    got = shlex.join(script.small(shlex.split(given)))
    assert got.startswith("sav-jax eval --model tiny --tasks digits --shots 2 --output-path o --seeds 0 --limit 4")
    rates = script.small(["python", "scripts/measure_lora.py", "--rates", "1e-3", "3e-3", "--limit", "400"])
    assert shlex.join(rates).startswith("python scripts/measure_lora.py --rates 1e-3 --limit 4 --shots")


def test_examples_must_print_what_the_page_says(script: ModuleType) -> None:
    page = "# Page\n\n```python\nx = 2\nprint(x)  # 2: two\nprint(x + 1)  # 4\n```\n\n```text\n2\n3\n```\n"
    report = script.Report()
    (block, _) = script.blocks(page, "page.md")
    assert (block.line, block.output) == (4, "2\n3\n")
    script.check_python(block, {}, report)
    assert report.wrong == ["page.md:4: page.md:6: prints '3', not '4'"]

    (block, _) = script.blocks(page.replace("2\n3\n```", "2\nthree\n```").replace("  # 4", ""), "page.md")
    report = script.Report()
    script.check_python(block, {}, report)
    assert len(report.wrong) == 1
    assert "not what stands below it" in report.wrong[0]

    report = script.Report()
    script.check_python(script.blocks("```python\nraise ValueError(3)\n```\n", "page.md")[0], {}, report)
    assert "ValueError: 3" in report.wrong[0]


def test_outputs_may_differ_by_rounding_alone(script: ModuleType) -> None:
    assert script.alike("0.95 right of 300", "0.96  right of 298")
    assert not script.alike("0.95 right", "0.90 right")
    assert not script.alike("0.95 right", "0.95 wrong")


def test_the_text_names_what_is_there(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "ROOT", tmp_path)
    (tmp_path / "other.md").write_text("# Some heading, here\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n[a](other.md#some-heading-here) [b](other.md#none) [c](gone.md) [d](#page) `--known` `--unknown 3`\n"
        '`tests/gone.py` <img src="gone.png">\n'
    )
    report = script.Report()
    script.check_text(page, report, {"--known"})
    said = "\n".join(report.wrong)
    assert len(report.wrong) == 5
    for found in ("other.md#none", "gone.md", "gone.png", "--unknown", "tests/gone.py"):
        assert found in said
