#!/usr/bin/env python
"""Writes the API reference, docs/api/*.md, from the docstrings of everything public.

    python scripts/api_reference.py            # writes
    python scripts/api_reference.py --check    # exits with 1 if what is there is not what would be written

A name is public if neither it nor its module begins with an underscore, and it has a docstring in the module that
defines it. Sources are read, not imported: what a field of a dataclass means stands behind it as a string, which is in
no object that an import gives.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sav_jax"
OUTPUT = ROOT / "docs" / "api"

ROOMS = {
    "sav_jax": "What `import sav_jax` gives, and the modules of the core behind it.",
    "models": "Arrays in, arrays out: modules, checkpoint layouts, processors.",
    "eval": "Tasks, methods, results, comparisons, reports.",
    "train": "Optax programs that learn something small.",
    "world": "The drawn scenes that the bundled models learned from.",
}
_HEAD = "<!-- Made by scripts/api_reference.py; edit the docstrings instead. -->\n"

Definition = ast.FunctionDef | ast.ClassDef
_WIDTH = 100


def modules(room: str) -> Iterator[tuple[str, ast.Module]]:
    """Public modules of a room, by dotted name; the room's own first."""
    folder = PACKAGE if room == "sav_jax" else PACKAGE / room
    pattern = "*.py" if room == "sav_jax" else "**/*.py"
    for path in sorted(folder.glob(pattern), key=lambda path: (path.parent, path.name != "__init__.py", path.name)):
        parts = [*path.relative_to(ROOT).with_suffix("").parts]
        if parts[-1] == "__init__":
            parts.pop()
        if not any(part.startswith("_") or part == "cli" for part in parts):
            yield ".".join(parts), ast.parse(path.read_text(encoding="utf-8"))


def exported() -> dict[str, str]:
    """What ``import sav_jax`` gives: name -> the module that defines it."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def public(body: Sequence[ast.stmt]) -> list[Definition]:
    """Functions and classes with a docstring, in the order of the source."""
    found = [node for node in body if isinstance(node, Definition) and not node.name.startswith("_")]
    return [node for node in found if ast.get_docstring(node) and not _hidden(node)]


def _hidden(node: Definition) -> bool:
    """Overloads, and setters beside their property."""
    return any("overload" in ast.unparse(of) or ".setter" in ast.unparse(of) for of in node.decorator_list)


def told(body: Sequence[ast.stmt]) -> list[tuple[str, str]]:
    """Names with an annotation or a value, and the string that stands behind each."""
    found = []
    for node, after in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        name = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
        if name.startswith("_") or not name.isidentifier():
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
            found.append((_declared(node, name), " ".join(inspect.cleandoc(after.value.value).split())))
    return found


def _declared(node: ast.Assign | ast.AnnAssign, name: str) -> str:
    """``name: type = value``, without a value that is long."""
    text = name if isinstance(node, ast.Assign) else f"{name}: {_type(node.annotation)}"
    value = "" if node.value is None else ast.unparse(node.value)
    return f"{text} = {value}" if value and len(value) <= 40 and "field(" not in value else text


def _type(node: ast.expr) -> str:
    """An annotation; of ``Annotated[...]`` the type alone."""
    text = ast.unparse(node)
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Annotated" and isinstance(node.slice, ast.Tuple):
        return ast.unparse(node.slice.elts[0])
    return text


def signature(node: Definition, name: str) -> str:
    """How it is called: as the source has it, one argument a line if it is long."""
    if isinstance(node, ast.ClassDef):
        fields = [of for of in node.body if isinstance(of, ast.AnnAssign) and isinstance(of.target, ast.Name)]
        dataclass = any("dataclass" in ast.unparse(of) or "struct." in ast.unparse(of) for of in node.decorator_list)
        if not (dataclass or any("Module" in ast.unparse(base) for base in node.bases)) or not fields:
            bases = f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else ""
            return f"class {name}{bases}"
        names = {ast.unparse(of.target): of for of in fields}
        parts = [_declared(of, at) for at, of in names.items() if not at.startswith("_")]
        return _call(f"class {name}", parts, "")
    if any(ast.unparse(of).endswith("property") for of in node.decorator_list):
        return f"{name}{f': {ast.unparse(node.returns)}' if node.returns else ''}"
    given = node.args
    plain = [*given.posonlyargs, *given.args]
    defaults: list[ast.expr | None] = [None] * (len(plain) - len(given.defaults)) + list(given.defaults)
    parts = [_argument(of, default) for of, default in zip(plain, defaults, strict=True)]
    if given.vararg:
        parts.append(f"*{_argument(given.vararg, None)}")
    elif given.kwonlyargs:
        parts.append("*")
    parts += [_argument(of, default) for of, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    if given.kwarg:
        parts.append(f"**{_argument(given.kwarg, None)}")
    parts = [part for part in parts if part not in ("self", "cls")]
    return _call(name, parts, f" -> {ast.unparse(node.returns)}" if node.returns else "")


def _argument(node: ast.arg, default: ast.expr | None) -> str:
    text = node.arg if node.annotation is None else f"{node.arg}: {_type(node.annotation)}"
    if default is None:
        return text
    return f"{text} = {ast.unparse(default)}" if node.annotation else f"{text}={ast.unparse(default)}"


def _call(name: str, parts: Sequence[str], returns: str) -> str:
    line = f"{name}({', '.join(parts)}){returns}"
    return line if len(line) <= _WIDTH else f"{name}(\n    " + ",\n    ".join(parts) + f",\n){returns}"


def docstring(node: ast.AST) -> str:
    """Its text: headings in bold, examples as code, links to names as code; paragraphs otherwise as they are."""
    text = ast.get_docstring(node) or ""  # type: ignore[arg-type]
    text = re.sub(r":\w+:`~?([^`]+)`", r"``\1``", text)
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    lines: list[str] = []
    heading, example = "", False
    for line in text.splitlines():
        stripped = line.strip()
        if example and not stripped:
            lines.append("```")
            example = False
        if stripped.startswith(">>>") and not example:
            lines += ["", "```python"] if lines and lines[-1] else ["```python"]
            example = True
        if example:
            lines.append(line.removeprefix("    ") if heading else line)
        elif re.fullmatch(r"(Args|Attributes|Returns|Raises|Yields|Examples?):", line):
            heading = line
            lines += [f"**{line[:-1]}**", ""]
        elif heading and line.startswith(" "):
            indent = len(line) - len(line.lstrip())
            entry = re.match(r"([\w*, ]+): (.*)", stripped)
            if heading in ("Args:", "Attributes:", "Raises:") and indent <= 4 and entry:
                lines.append(f"- `{entry[1]}`: {entry[2]}")
            else:
                lines.append(f"  {stripped}" if lines and lines[-1].startswith(("- ", "  ")) else stripped)
        else:
            heading = ""
            lines.append(line)
    if example:
        lines.append("```")
    return "\n".join(lines)


def entry(node: Definition, name: str, level: str) -> list[str]:
    """The section of a function or class, with its public methods."""
    lines = [f"{level} `{name}`", "", "```python", signature(node, name), "```", "", docstring(node), ""]
    if isinstance(node, ast.ClassDef):
        lines += _fields(node.body)
        for method in public(node.body):
            lines += entry(method, f"{name}.{method.name}", level + "#")
    return lines


def _fields(body: Sequence[ast.stmt]) -> list[str]:
    found = [f"- `{declared}`: {text}" for declared, text in told(body)]
    return [*found, ""] if found else []


def page(room: str) -> str:
    """One page of the reference."""
    of_modules = dict(modules(room))
    title = "sav_jax" if room == "sav_jax" else f"sav_jax.{room}"
    lines = [_HEAD, f"# `{title}`", "", ROOMS[room], ""]
    done: set[str] = set()
    if room == "sav_jax":
        lines += ["## What `import sav_jax` gives", ""]
        for name, home in sorted(exported().items()):
            (node,) = (of for of in public(of_modules[home].body) if of.name == name)
            lines += entry(node, f"sav_jax.{name}", "###")
            done.add(f"{home}.{name}")
    for module, tree in of_modules.items():
        names = [node for node in public(tree.body) if f"{module}.{node.name}" not in done]
        fields = _fields(tree.body)
        if module == "sav_jax" or not (names or fields):
            continue
        lines += [f"## `{module}`", "", docstring(tree), "", *fields]
        for node in names:
            lines += entry(node, node.name, "###")
    text = "\n".join(lines)
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text.rstrip() + "\n"


def pages() -> dict[Path, str]:
    """All pages: file -> text."""
    index = [
        _HEAD,
        "# API reference",
        "",
        "From the docstrings of everything public; examples are run by the tests.",
        "",
    ]
    index += [
        f"- [`{'sav_jax' if room == 'sav_jax' else f'sav_jax.{room}'}`]({room}.md): {ROOMS[room]}" for room in ROOMS
    ]
    return {OUTPUT / "README.md": "\n".join(index) + "\n", **{OUTPUT / f"{room}.md": page(room) for room in ROOMS}}


def main(words: Sequence[str]) -> int:
    """Writes, or compares with ``--check``."""
    if list(words) not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    made = pages()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    stale = [path for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    stale += [path for path in OUTPUT.glob("*.md") if path not in made]
    if words:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not what its docstrings say: run python scripts/api_reference.py")
        return 1 if stale else 0
    for path in stale:
        if path in made:
            path.write_text(made[path], encoding="utf-8")
        else:
            path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
