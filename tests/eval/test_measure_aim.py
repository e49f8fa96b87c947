"""``scripts/measure_aim.py``: the tasks it draws, and the command on an untrained projection."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy.stats import sem, t
from scripts_loaded import loaded

import sav_jax
from sav_jax.aim import Aim, Layout
from sav_jax.models.fusion import FusionConfig, initial_params


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with loaded("measure_aim") as module:
        yield module


def test_tasks_have_enough_of_every_label_and_share_no_picture(script: ModuleType) -> None:
    for number, (meant, kinds) in enumerate(script.TASKS["digits"]):
        data = script.make_task(meant, kinds, 30, number).load(Path())
        counts = Counter(item.label for item in data.pool)
        assert min(counts.values()) >= script.SHOTS
        assert {item.label for item in data.queries} <= set(counts)
        pixels = [np.asarray(item.example.images[0]).tobytes() for item in (*data.pool, *data.queries)]
        assert len(set(pixels)) == len(pixels)
        assert {item.example.question for item in data.queries} == {script.QUESTION}


def test_intervals_are_over_tasks_and_queries(script: ModuleType) -> None:
    sure = [np.ones((3, 10)), np.zeros((3, 20))]
    assert script.interval(sure) == "50.0 [50.0, 50.0]"
    rng = np.random.default_rng(0)
    low, high = (float(x) for x in script.interval([rng.random((2, 400)) < 0.5 * np.ones((2, 400))])[6:-1].split(","))
    # Means of two draws with probability one half: standard error 100 * sqrt(1 / 8 / 400) = 1.8 points.
    assert 5 < high - low < 9


def test_intervals_over_seeds_are_of_the_seeds_means(script: ModuleType) -> None:
    rng = np.random.default_rng(1)
    parts = [rng.random((3, 20)), rng.random((3, 30))]
    means = np.stack([part.mean(axis=1) for part in parts]).mean(axis=0)
    low, high = (float(x) for x in script.over_seeds(parts).split(" to "))
    # Rounded to 0.1 of a percentage point.
    np.testing.assert_allclose([low, high], 100 * np.array(t.interval(0.95, 2, means.mean(), sem(means))), atol=0.051)
    assert script.over_seeds([part[:1] for part in parts]) == ""


def test_the_command(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lmm = sav_jax.load("tiny")
    config = FusionConfig(lmm.config.text.hidden_size)
    Aim(Layout(), config, initial_params(config, 0, "identity", 0.1), lmm.fingerprint, "tiny").save(tmp_path / "aim")
    monkeypatch.setattr(script, "TASKS", {"digits": script.TASKS["digits"][:1]})
    script.main(script.Arguments(tmp_path / "aim", tmp_path / "out", seeds=(0, 1), demonstrations=(2,), queries=12))
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    cost = {row[2]: row[5:] for row in rows if row[:2] == ["digits", "2"]}
    assert set(cost) == {"icl", "aim", "aim - icl", "aim - zero-shot"}
    assert float(cost["aim"][0]) < float(cost["icl"][0])
    assert float(cost["aim"][1]) < float(cost["icl"][1])
    assert float(cost["aim"][2]) > 0
