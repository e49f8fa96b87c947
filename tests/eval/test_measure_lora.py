"""``scripts/measure_lora.py``: its task, and the command with a few steps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from scripts_loaded import loaded


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with loaded("measure_lora") as module:
        yield module


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
