#!/usr/bin/env python
"""Runs every command and every Python example of the documentation, at small sizes, on data made as its rows say.

    python scripts/check_docs.py                      # all of it, in a temporary folder
    python scripts/check_docs.py README.md docs/aim.md

A command is run as it is printed but for what ``_docs_commands.py`` puts in its place (sizes; the bundled model for a
large checkpoint). What cannot be run is listed there with the reason, and held against the option parser that it is
meant for. A command that is neither run nor listed is an error, as is one that fails, an option that no command has, a
Python example that prints something else than its comment says, and a link that leads nowhere.
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("", "tests")]

# A user's settings but for these: no accelerator, no hub, no pictures on a screen, options not broken into lines.
os.environ.update(JAX_PLATFORMS="cpu", HF_HUB_OFFLINE="1", MPLBACKEND="agg", COLUMNS="1000", TERM="dumb")
# Nearly every program runs once: compiled without optimising (scripts/test.sh).
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0")

from scripts import _docs_commands as tables  # noqa: E402
from scripts._pages import ROOT, Block, alike, blocks, file_name, heard, run  # noqa: E402

SHELL, PYTHON = ("bash", "sh"), ("python",)


@dataclass(frozen=True)
class Command:
    """One command of a shell block, in words; variables are filled in."""

    file: str
    line: int
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        return shlex.join(self.words)


@dataclass
class Report:
    """What was done, and what is wrong."""

    ran: int = 0
    listed: int = 0
    wrong: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    alone: set[tuple[str, ...]] = field(default_factory=set)

    def add(self, where: str, what: str) -> None:
        self.wrong.append(f"{where}: {what}")
        print(f"WRONG  {where}: {what}", file=sys.stderr)


def documents() -> list[Path]:
    """The files, in the order in which a reader meets them: what one has made, the next may use."""
    first = [ROOT / name for name in ("README.md", "docs/training.md")]
    rest = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("sav_jax/models/*/README.md")])
    return [*first, *(path for path in rest if path not in first), ROOT / "CONTRIBUTING.md"]


def of_page(path: Path) -> list[Block]:
    """Its blocks."""
    return blocks(path.read_text(encoding="utf-8"), file_name(path))


def rows_of(name: str) -> str:
    """The example rows of a page."""
    return next(block.text for block in of_page(ROOT / name) if block.language == "json")


def shell(text: str, file: str = "", line: int = 0) -> Block:
    """A block of commands."""
    return Block(file, line, "bash", text, 0, None)


def commands(block: Block) -> Iterator[Command]:
    """The commands of a shell block. Variables that it sets are filled in; comments are left out."""
    variables: dict[str, str] = {}
    line = block.line
    for text in re.split(r"(?<!\\)\n", block.text):
        lexer = shlex.shlex(text.replace("\\\n", " "), posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word not in ("&&", "||", "|", ";"):
                words.append(re.sub(r"\$(\w+)", lambda m: variables.get(m[1], m[0]), word))
                continue
            if words[:1] == ["export"]:
                words = words[1:]
            while words and (match := re.fullmatch(r"([A-Za-z_]\w*)=(.*)", words[0])):
                variables[match[1]] = match[2]
                words = words[1:]
            if words:
                yield Command(block.file, line, tuple(words))
            words = []
        line += text.count("\n") + 1


def spans(text: str) -> list[str]:
    """What stands between backticks outside of fenced blocks, on one line each."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def call(words: Sequence[str]) -> tuple[int, str]:
    """Exit status and output of a command of this project, run in the current folder, and in this process."""
    from sav_jax import cli

    with heard() as said:
        try:
            if words[0] == "sav-jax":
                status = cli.main(list(words[1:]))
            else:
                with mock.patch.object(sys, "argv", [str(ROOT / words[1]), *words[2:]]):
                    runpy.run_path(str(ROOT / words[1]), run_name="__main__")
                status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except Exception:
            status = 1
            traceback.print_exc(file=said)
    return status, said.getvalue()


def call_alone(words: Sequence[str]) -> tuple[int, str]:
    """The same in a process of its own, in which XLA optimises."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    if words[0] == "sav-jax":
        words = [sys.executable, "-m", *words]
        words[2] = "sav_jax"
    elif words[0] in ("bash", "python"):
        words = [sys.executable if words[0] == "python" else "bash", str(ROOT / words[1]), *words[2:]]
    done = subprocess.run(
        words,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def options_of(words: Sequence[str]) -> set[str]:
    """The options that a command of this project has.

    Args:
      words: ``sav-jax`` and a command, or ``python`` or ``bash`` and a script, which is read and not run.

    Returns:
      Nothing if there is no such command.
    """
    key = tuple(words)
    if key not in _OPTIONS:
        if words[0] == "sav-jax":
            status, said = call([*words, "--help"])
            _OPTIONS[key] = set(re.findall(r"--[a-z][\w-]*", said)) if status == 0 else set()
        elif words[0] == "bash":
            _OPTIONS[key] = _of_shell(words[1])
        else:
            _OPTIONS[key] = {"--help", *_declared((ROOT / words[1]).read_text(encoding="utf-8"))}
    return _OPTIONS[key]


_OPTIONS: dict[tuple[str, ...], set[str]] = {}


def _declared(source: str) -> Iterator[str]:
    """Options of a script: what it gives argparse, and the fields of its ``Arguments``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            given = [of.value for of in node.args if isinstance(of, ast.Constant) and isinstance(of.value, str)]
            yield from (word for word in given if re.fullmatch(r"--[a-z][\w-]*", word))
        elif isinstance(node, ast.ClassDef) and node.name == "Arguments":
            for of in node.body:
                if isinstance(of, ast.AnnAssign) and isinstance(of.target, ast.Name):
                    yield f"--{of.target.id.replace('_', '-')}"


def _of_shell(script: str) -> set[str]:
    """Options of a shell script: those that stand in it, and those of the command that gets its words."""
    found = {"--help", *re.findall(r"(?<![\w-])--[a-z][\w-]*", (ROOT / script).read_text(encoding="utf-8"))}
    handed = tables.HANDED.get(script, "")
    return found | (options_of(handed.split()) if handed else set())


def plain(words: Sequence[str]) -> list[str]:
    """The command without what stands before a program's name: ``srun``, ``taskset -c 0``, ``.venv/bin/``."""
    words = list(words)
    while words:
        if words[0] == "srun":
            words = words[1:]
        elif words[0] == "taskset":
            words = words[3:]
        else:
            break
    if words:
        words[0] = words[0].removeprefix(".venv/bin/")
        if words[0] == "python3":
            words[0] = "python"
    return words


def named(words: Sequence[str]) -> list[str]:
    """Program and command of a command line of this project: ``sav-jax train lora``, ``python scripts/x.py``."""
    if words[0] in ("python", "bash"):
        return list(words[:2])
    parts = 3 if words[1:2] == ["train"] else 2
    return [word for word in words[:parts] if re.fullmatch(r"[a-z][a-z-]*", word)]


def misfit(words: Sequence[str]) -> str:
    """What an option parser, or the checkout, has against a command that is not run; empty if nothing."""
    words = plain(words)
    if words[0] == "gcloud":  # a command line in a word
        inner = next((word for word in words if "sav-jax " in word), "")
        found = [misfit(command.words) for command in commands(shell(inner)) if "sav-jax" in command.text]
        return "; ".join(filter(None, found))
    if "pip" in words[:4] and "install" in words:
        extras = re.findall(r"\[(\w+)\]", " ".join(word for word in words if not word.startswith("jax[")))
        known = re.findall(r"^(\w+) =\n    ", (ROOT / "setup.cfg").read_text(encoding="utf-8"), flags=re.MULTILINE)
        return "; ".join(f"there is no extra {extra!r}" for extra in extras if extra not in known)
    script = words[1] if words[0] in ("bash", "python") and len(words) > 1 else words[0]
    if words[0] == "python" and script == "-c":
        compile(words[2], "python -c", "exec")
        return ""
    if script.endswith((".sh", ".py")) and not (ROOT / script).is_file():
        return f"there is no {script}"
    if script.endswith(".py"):
        words = ["python", script, *words[words.index(script) + 1 :]]
    elif script.endswith(".sh"):
        words = ["bash", script, *words[words.index(script) + 1 :]]
    elif words[0] != "sav-jax":
        return ""
    options = {word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)}
    if not (takes := options_of(named(words))):
        return f"there is no {shlex.join(named(words))}"
    if missing := sorted(options - takes):
        return f"{shlex.join(named(words))} has no {', '.join(missing)}"
    return ""


def understood(words: Sequence[str]) -> str:
    """As :func:`misfit`; of ``sav-jax``, whose parser runs in an instant, values and names, too."""
    words = plain(words)
    if words[0] != "sav-jax" or "..." in words:
        return misfit(words)
    from sav_jax import _commands
    from sav_jax.errors import UserError
    from sav_jax.eval.methods import METHODS
    from sav_jax.eval.tasks import find_tasks

    with mock.patch.object(_commands, "run") as run:
        status, said = call(words)
    if status:
        return said.strip()
    (options,) = run.call_args.args
    if words[1] == "eval":
        try:
            find_tasks(options.tasks)
        except UserError as error:
            return str(error)
        return ", ".join(f"there is no method {name!r}" for name in options.methods.split(",") if name not in METHODS)
    return ""


def small(words: Sequence[str]) -> list[str]:
    """The command at small sizes: other words and options, by ``_docs_commands.py``; the first of several tasks."""
    words = [tables.INSTEAD.get(word, word) for word in plain(words)]
    if "--tasks" in words:
        at = words.index("--tasks") + 1
        words[at] = words[at].partition(",")[0]
    for name, options in tables.SIZES.items():
        if " ".join(words).startswith(name):
            for option, value in options.items():
                if option and option in words:
                    at = words.index(option)
                    end = next((i for i in range(at + 1, len(words)) if words[i].startswith("--")), len(words))
                    words[at + 1 : end] = []
                    words[at + 1 : at + 1] = value.split()
                else:
                    words += [*filter(None, [option]), *value.format(here=Path.cwd()).split()]
            break
    return words


def check_command(command: Command, report: Report) -> None:
    """Runs it, or looks whether it is listed."""
    where = f"{command.file}:{command.line}"
    for pattern, _ in tables.NOT_RUN:
        if re.search(pattern, command.text):
            report.listed += 1
            report.used.add(pattern)
            if found := understood(command.words):
                report.add(where, f"{command.text}: {found}")
            return
    words = plain(command.words)
    ours = words[0] == "sav-jax" or (words[0] in ("python", "bash") and words[1].endswith((".py", ".sh")))
    if not ours and words[0] not in tables.OTHERS:
        report.add(where, f"{command.text}: neither run nor listed in scripts/_docs_commands.py")
        return
    if found := understood(words):
        report.add(where, f"{command.text}: {found}")
        return
    words = small(words)
    alone = not ours or re.search(tables.ALONE, shlex.join(words)) is not None
    if alone and tuple(words) in report.alone:  # nothing has changed since
        report.ran += 1
        return
    start = time.perf_counter()
    status, said = (call_alone if alone else call)(words)
    report.ran += 1
    if alone and status == 0:
        report.alone.add(tuple(words))
    print(f"{time.perf_counter() - start:6.1f} s  {where}  {shlex.join(words)}", flush=True)
    if status:
        report.add(where, f"{shlex.join(words)}: exit status {status}\n{said[-3000:]}")


def check_python(block: Block, names: dict[str, Any], report: Report) -> None:
    """Runs it; what it prints must be what the page says."""
    where = f"{block.file}:{block.line}"
    start = time.perf_counter()
    try:
        said, wrong = run(block, names)
    except Exception:
        report.add(where, traceback.format_exc(limit=-3))
        return
    report.ran += 1
    print(f"{time.perf_counter() - start:6.1f} s  {where}  (python)", flush=True)
    for line in wrong:
        report.add(where, line)
    if block.output is not None and not alike(block.output, said):
        report.add(where, f"prints\n{said}not what stands below it")


def check_text(path: Path, report: Report, every: set[str]) -> None:
    """Commands and options named in the text; links and paths."""
    text = path.read_text(encoding="utf-8")
    name = str(path.relative_to(ROOT))
    for span in spans(text):
        try:
            words = plain(shlex.split(span))
        except ValueError:  # a lonely quote: no command
            continue
        if not words:
            continue
        if words[0] == "sav-jax" or (words[0] in ("python", "bash") and len(words) > 1 and "/" in words[1]):
            if found := misfit(words):
                report.add(name, f"`{span}`: {found}")
        elif unknown := [w for w in re.findall(r"(?<![\w-])--[a-z][\w-]*", span) if w not in every]:
            report.add(name, f"`{span}`: no command has {', '.join(unknown)}")
        for part in re.findall(r"(?<![\w/.-])(?:scripts|tests|sav_jax|docs)/[\w./-]*[\w/](?![\w<*])", span):
            if not (ROOT / part).exists() and not (ROOT / f"{part}.py").exists():
                report.add(name, f"`{span}`: there is no {part}")
    for target in re.findall(r"(?:\]\(|src=\")(?!https?:)([^)\s\"]+)", text):
        file, _, anchor = target.partition("#")
        to = path.parent / file if file else path
        if not to.exists():
            report.add(name, f"a link leads to {target}, which is not there")
        elif anchor and anchor not in anchors(to.read_text(encoding="utf-8")):
            report.add(name, f"a link leads to {target}, and there is no such heading")


def anchors(text: str) -> set[str]:
    """Names of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def every_option() -> set[str]:
    """The options of all commands and scripts of this project, and of the other programs that the text names."""
    found = set(tables.OF_OTHERS)
    names = ["fit", "predict", "extract", "eval", "tasks", "compare", "report", "plan", "ask"]
    for words in [*(["sav-jax", n] for n in names), *(["sav-jax", "train", n] for n in ("lora", "sq-llava", "aim"))]:
        found |= options_of(words)
    for path in (ROOT / "scripts").glob("*.py"):
        found |= options_of(["python", f"scripts/{path.name}"])
    for path in (ROOT / "scripts").glob("*.sh"):
        found |= set(re.findall(r"--[a-z][\w-]*", path.read_text(encoding="utf-8")))
    return found


def check(paths: Sequence[Path], folder: Path) -> Report:
    """Everything, in a folder of its own.

    Args:
      paths: the files.
      folder: empty.
    """
    report = Report()
    os.environ.update(SAV_JAX_CACHE=str(folder / "cache"), SAV_JAX_DATA=str(folder / "data"))
    work = folder / "work"
    work.mkdir()
    with contextlib.chdir(work), contextlib.ExitStack() as stack:
        tables.make_files(work, [rows_of(name) for name in ("README.md", "docs/videos.md")])
        every = every_option()
        for path in paths:
            if "gs://bucket/" in path.read_text(encoding="utf-8"):
                stack.enter_context(tables.buckets(work))
            names: dict[str, Any] = {"__name__": "__main__"}
            with heard():
                exec(tables.GIVEN.get(file_name(path), ""), names)
            check_text(path, report, every)
            for block in of_page(path):
                if block.language in PYTHON:
                    check_python(block, names, report)
                elif block.language in SHELL:
                    for command in commands(block):
                        check_command(command, report)
                elif not block.language and re.match(r"(sav-jax|python|bash|\.venv/bin/\w+) ", block.text):
                    report.add(f"{block.file}:{block.line}", "a block of commands that does not say that it is one")
        if "README.md" in {path.name for path in paths if path.parent == ROOT}:
            check_command(quickstart(), report)
    if set(paths) == set(documents()):
        for pattern, _ in tables.NOT_RUN:
            if pattern not in report.used:
                report.add("scripts/_docs_commands.py", f"nothing in the documentation is {pattern!r} any more")
    return report


def quickstart() -> Command:
    """What ``scripts/quickstart.sh`` runs after setting up."""
    name = "scripts/quickstart.sh"
    text = (ROOT / name).read_text(encoding="utf-8")
    found = re.search(r'^exec "\$venv_python" -m sav_jax (.*?) "\$@"$', text, flags=re.MULTILINE | re.DOTALL)
    assert found is not None, name
    line = text.count("\n", 0, found.start()) + 1
    (command,) = commands(shell("root=.\nsav-jax " + found[1], name, line - 1))
    return command


def main(names: Sequence[str]) -> int:
    """Checks the files named, or all."""
    paths = [Path(name).resolve() for name in names] or documents()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="sav_jax_docs_") as folder:
        report = check(paths, Path(folder))
    print(
        f"documentation: {report.ran} commands and examples run, {report.listed} that cannot be run here understood, "
        f"{len(report.wrong)} wrong, {time.perf_counter() - start:.0f} s"
    )
    for line in report.wrong:
        print(f"WRONG  {line}")
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
