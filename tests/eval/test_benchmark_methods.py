"""``scripts/benchmark_methods.py`` at small size, and the promise that it measures: queries are never copied whole."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from heads_made import ON_HEADS, drawn, features_of
from scripts_loaded import SCRIPTS, loaded

from sav_jax.eval.methods import METHODS

SCRIPT = SCRIPTS / "benchmark_methods.py"
SIZE = {"examples": 240, "layers": 2, "heads": 3, "width": 8, "classes": 3, "shots": 5, "num_heads": 2}


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with loaded("benchmark_methods") as module:
        yield module


@pytest.mark.parametrize(("shots", "names"), [(5, ON_HEADS), (80, ["hec", "knn"])])
def test_methods_are_measured(script: ModuleType, tmp_path: Path, shots: int, names: Sequence[str]) -> None:
    """With queries of their own, and with all examples as support and as queries."""
    assert sorted(script.head_methods()) == sorted(ON_HEADS)
    arguments = script.Arguments(**{**SIZE, "shots": shots}, features=tmp_path / "heads.npy")
    script.make(arguments, arguments.features)
    assert np.load(arguments.features).shape == (240, 2, 3, 8)
    for name in names:
        told: dict[str, Any] = script.measure(arguments, name)
        assert told["fit"] > 0, name
        assert told["predict"] > 0, name
        assert told["peak"] > 2**20, name
        assert 0 <= told["accuracy"] <= 1, name


def test_the_table(tmp_path: Path) -> None:
    size = [part for name, value in SIZE.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *size, "--methods", "ridge"], capture_output=True, text=True, check=True
    )
    head, *_, row = result.stdout.splitlines()
    assert head == "features: 0.00 GiB"
    assert row.startswith("| ridge | ")
    assert len(row.split("|")) == 7


@pytest.mark.parametrize("name", ON_HEADS)
def test_queries_are_never_copied_whole(name: str) -> None:
    """What is allocated on the way stays below half of the features; blocks and layers are far below."""
    heads, of_row, texts = drawn(3, 5, 640, shape=(32, 2, 64))
    features = features_of(heads, of_row, 15, texts)
    METHODS[name].run(features)  # imports and compiles
    tracemalloc.start()
    METHODS[name].run(features)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < heads.nbytes / 2
