"""The house itself: names, links, packaging, what an import costs and what it may not touch."""

from __future__ import annotations

import ast
import configparser
import importlib.metadata
import os
import re
import resource
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import sav_jax

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sav_jax"
SOURCES = [path for folder in ("sav_jax", "scripts", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]

# What only the commands that need it may load.
HEAVY = {"jax", "flax", "optax", "orbax", "tensorstore", "transformers", "sklearn", "scipy", "matplotlib"}


def run(*command: str | Path, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=240, **options)


@pytest.mark.parametrize("name", ["models", "train", "eval"])
def test_top_level_links_are_relative_and_lead_into_the_package(name: str) -> None:
    link = ROOT / name
    assert link.is_symlink()
    assert os.readlink(link) == f"sav_jax/{name}"
    assert (link / "__init__.py").samefile(PACKAGE / name / "__init__.py")


def test_every_folder_with_code_is_a_package() -> None:
    """setuptools' ``find:`` silently leaves out a folder without ``__init__.py``."""
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert {folder for folder in folders if not (folder / "__init__.py").is_file()} == set()


def test_every_other_file_in_the_package_is_package_data() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    shipped = {
        path
        for package, patterns in setup["options.package_data"].items()
        for pattern in patterns.replace(",", "\n").split()
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in {".py", ".pyc"}}
    assert PACKAGE / "py.typed" in files
    assert files - shipped == set()


def test_version_is_the_installed_one_and_has_a_changelog_entry() -> None:
    assert importlib.metadata.version("sav-jax") == sav_jax.__version__
    assert f"## [{sav_jax.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_public_names_resolve_and_are_the_ones_type_checkers_see() -> None:
    for name in sav_jax.__all__:
        assert getattr(sav_jax, name) is not None
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed | {"__version__"} == set(sav_jax.__all__)
    assert set(dir(sav_jax)) >= {*sav_jax.__all__, "eval", "models", "train"}
    with pytest.raises(AttributeError, match="'sav_jax' has no attribute 'nothing'"):
        _ = sav_jax.nothing


@pytest.mark.parametrize("arguments", [["-c", "import sav_jax"], ["-m", "sav_jax", "--help"]], ids=["import", "help"])
def test_importing_and_asking_for_help_are_quick(arguments: list[str]) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    # -X importtime lists every module that was loaded, on stderr, at little cost.
    done = run(sys.executable, "-X", "importtime", *arguments)
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "sav_jax" in loaded
    assert loaded & HEAVY == set()
    # User time rather than time passed: a busy machine delays a process, but does not make it compute more.
    assert seconds < 1.5


def test_every_module_imports_without_torch_and_without_a_word() -> None:
    """As for a user, who has no torch: transformers may not advise them to install it."""
    program = textwrap.dedent(
        """
        import importlib, pkgutil, sys
        sys.modules["torch"] = sys.modules["torchvision"] = None
        import sav_jax
        for module in pkgutil.walk_packages(sav_jax.__path__, "sav_jax."):
            if module.name != "sav_jax.__main__":
                importlib.import_module(module.name)
        """
    )
    done = run(sys.executable, "-W", "error", "-c", program)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_imports_go_through_sav_jax_and_torch_stays_in_the_tests() -> None:
    banned = {"models", "train", "eval"}
    found = []
    for path in SOURCES:
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno}: relative import"
                names.add((node.module or "").partition(".")[0])
        compared = path.is_relative_to(ROOT / "tests") or path.name == "bench_pytorch.py"
        here = banned if compared else banned | {"torch", "torchvision"}
        found += [f"{path}: {name}" for name in names & here]
    assert found == []


SCRIPTS = [path.name for path in sorted((ROOT / "scripts").glob("*.sh"))]


@pytest.mark.parametrize("script", ["scripts/" + name for name in SCRIPTS] + [".ci/run"])
def test_shell_scripts_parse(script: str) -> None:
    done = run("bash", "-n", ROOT / script)
    assert (done.returncode, done.stderr) == (0, "")


def test_ci_runs_the_test_script_as_an_executable() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "scripts/test.sh" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout in a folder with a space in its name; beside it, ``bin``: a PATH without a Python, so far."""
    root = tmp_path / "a checkout"
    (root / "scripts").mkdir(parents=True)
    for name in ("setup.cfg", "pyproject.toml", "scripts/_setup.sh"):
        shutil.copy(ROOT / name, root / name)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "cat", "chmod", "dirname", "mkdir"):
        tool = shutil.which(name)
        assert tool is not None
        (tools / name).symlink_to(tool)
    return root


def write_program(path: Path, text: str) -> None:
    path.write_text("#!/usr/bin/env bash\n" + textwrap.dedent(text), encoding="utf-8")
    path.chmod(0o755)


def write_python(path: Path) -> None:
    """A Python whose environments hold an interpreter that notes what pip is asked for instead of doing it."""
    write_program(
        path,
        f"""
        case "$1 $2" in
        "-m venv") mkdir -p "$3/bin"; cat "$0" >"$3/bin/python"; chmod +x "$3/bin/python" ;;
        "-m pip") echo "$*" >>"$PIP_LOG" ;;
        *) exec {sys.executable} "$@" ;;
        esac
        """,
    )


def set_up(checkout: Path, *extra: str, **environment: str) -> subprocess.CompletedProcess[str]:
    tools = checkout.parent / "bin"
    command = f'set -euo pipefail; source "$1/scripts/_setup.sh"; shift; setup {" ".join(extra)}; echo "$venv_python"'
    environment = {"PATH": str(tools), "PIP_LOG": str(checkout.parent / "pip.log"), **environment}
    return run(tools / "bash", "-c", command, "setup.sh", checkout, env=environment, cwd="/")


def installed(checkout: Path) -> list[str]:
    """What pip was asked to install since the last call."""
    log = checkout.parent / "pip.log"
    lines = [line for line in log.read_text().splitlines() if " install " in line] if log.exists() else []
    log.unlink(missing_ok=True)
    return [line.rpartition("--editable ")[2] for line in lines]


def test_setting_up_installs_once_and_again_only_after_a_change(checkout: Path) -> None:
    tools = checkout.parent / "bin"
    # A version manager's stand-in comes first: it is on the PATH and does not run.
    write_program(tools / "python3.11", "echo 'not installed' >&2; exit 127")
    write_python(tools / "python3.12")

    done = set_up(checkout)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == f"{checkout}/.venv/bin/python"
    assert installed(checkout) == [str(checkout)]

    assert set_up(checkout).stdout == f"{checkout}/.venv/bin/python\n"
    assert installed(checkout) == []

    # The test extra is installed on top, and holds what using the package needs.
    assert set_up(checkout, "test").returncode == 0
    assert installed(checkout) == [f"{checkout}[test]"]
    assert set_up(checkout).returncode == set_up(checkout, "test").returncode == 0
    assert installed(checkout) == []

    with (checkout / "setup.cfg").open("a", encoding="utf-8") as file:
        file.write("\n# changed\n")
    assert set_up(checkout).returncode == 0
    assert installed(checkout) == [str(checkout)]
    assert set_up(checkout, "test").returncode == 0
    assert installed(checkout) == [f"{checkout}[test]"]


def test_setting_up_uses_uv_where_there_is_one(checkout: Path) -> None:
    tools = checkout.parent / "bin"
    write_python(tools / "python3")
    write_program(
        tools / "uv",
        """
        echo "uv $*" >>"$PIP_LOG"
        if [ "$1" = venv ]; then python3 -m venv "${!#}"; fi
        """,
    )
    done = set_up(checkout, "test")
    assert (done.returncode, done.stderr) == (0, "")
    log = (checkout.parent / "pip.log").read_text().splitlines()
    assert [line.split()[:2] for line in log] == [["uv", "venv"], ["uv", "pip"]]
    assert log[1].endswith(f"--python {checkout}/.venv/bin/python --editable {checkout}[test]")


def test_setting_up_says_what_is_wrong(checkout: Path) -> None:
    done = set_up(checkout)
    assert done.returncode == 1
    assert re.match(r"error: no Python 3\.11 or newer .* found; install one", done.stderr)
    assert not (checkout / ".venv").exists()

    done = set_up(checkout, PYTHON="/nowhere/python")
    assert done.returncode == 1
    assert done.stderr.startswith("error: PYTHON=/nowhere/python is not a working Python 3.11 or newer")

    (checkout / ".venv").mkdir()
    done = set_up(checkout, PYTHON=sys.executable)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {checkout}/.venv has no working Python 3.11 or newer; remove that folder")
    assert list((checkout / ".venv").iterdir()) == []
