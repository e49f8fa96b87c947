"""Files of ``scripts/``, which are no package, as modules."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

SCRIPTS = Path(__file__).parents[1] / "scripts"


@contextmanager
def loaded(name: str) -> Iterator[ModuleType]:
    """The module of ``scripts/NAME.py``."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[name]


def imported(name: str) -> ModuleType:
    """The module ``scripts.NAME`` of a folder of scripts that is a package."""
    root = str(SCRIPTS.parent)
    if root not in sys.path:  # behind everything else: the links for people there are no packages to import
        sys.path.append(root)
    return importlib.import_module(f"scripts.{name}")
