"""``scripts/measure_lora.py``: its task, and the command with a few steps."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "measure_lora.py"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("measure_lora", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_labels_are_the_digits_parity(script: ModuleType) -> None:
    from sklearn.datasets import load_digits

    pool = script.parity_task().load(Path()).pool
    assert [item.label for item in pool] == ["odd" if digit % 2 else "even" for digit in load_digits().target]
    assert {item.example.question for item in pool} == {script.QUESTION}


def test_the_command(script: ModuleType, tmp_path: Path) -> None:
    script.main(
        script.Arguments(
            tmp_path, ("zero-shot-likelihood", "lora-likelihood"), shots=(4,), seeds=(0,), rates=(1e-3,), steps=(2,),
            limit=20,
        )
    )  # fmt: skip
    (results,) = tmp_path.glob("results*.json")
    found = json.loads(results.read_text())["results"]
    assert len(json.dumps(found)) > 2
    rows = [json.loads(line) for line in next(tmp_path.glob("samples_*.jsonl")).read_text().splitlines()]
    assert {row["filter"] for row in rows} == {"zero-shot-likelihood", "lora-likelihood"}
    assert len(rows) == 40
    assert {row["target"] for row in rows} == {"even", "odd"}
