"""The training loop by itself, on a problem of two numbers: its log, kills, resumption, several settings."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sav_jax.errors import UserError
from sav_jax.train import loop
from sav_jax.train.optimizer import Group, Optimization

SETTINGS = Optimization(steps=12, batch_size=2, checkpoint_every=4, log_every=3, warmup=0.0)


class Numbers:
    """Batches of two numbers each, drawn for the step; three of four tokens are real. Every fifth has another shape."""

    def __len__(self) -> int:
        return SETTINGS.steps

    def __getitem__(self, step: int) -> np.ndarray:
        shape = (2, 2) if step % 5 == 4 else (2, 1)
        return np.random.default_rng(step).normal(size=shape).astype(np.float32)

    def names(self, step: int) -> str:
        return f"rows of {step}"

    def tokens(self, step: int) -> tuple[int, int]:
        return 300, 400


class Dying(Numbers):
    """Killed when it has to make the batch of a step."""

    def __init__(self, step: int):
        self.dies_at = step

    def __getitem__(self, step: int) -> np.ndarray:
        if step == self.dies_at:
            raise MemoryError("as if killed")
        return super().__getitem__(step)


def distance(trainable: Any, frozen: Any, batch: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Squares of what is left, with noise, as dropout is."""
    left = trainable["x"] - batch.mean(axis=1) + 0.1 * jax.random.normal(key, ())
    return jnp.sum(left**2) + frozen * jnp.sum(trainable["y"] ** 2), jnp.float32(batch.shape[0])


def problem(**facts: Any) -> loop.Problem:
    initial = {"x": np.ones(2, np.float32), "y": np.ones((), np.float32)}
    groups = {name: Group(".*", 0.1, 0.01) for name in initial}
    return loop.Problem(distance, initial, groups, jnp.float32(0.5), facts=facts)


def rows(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("loop") / "whole"
    return directory, jax.device_get(loop.train(problem(), Numbers(), SETTINGS, directory, progress=False))


@pytest.mark.parametrize("killed_at", range(1, SETTINGS.steps))
def test_killed_at_any_step_it_ends_with_the_same_bits(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, killed_at: int
) -> None:
    with pytest.raises(MemoryError):
        loop.train(problem(), Dying(killed_at), SETTINGS, tmp_path / "run", progress=False)
    with (tmp_path / "run" / "log.jsonl").open("a") as log:
        log.write('{"step": 1, "los')  # a row that the kill has torn
    trained = loop.train(problem(), Numbers(), SETTINGS, tmp_path / "run", progress=False)
    directory, expected = whole
    for name, value in expected.items():
        np.testing.assert_array_equal(trained[name], value)
    # Rows are the same but for the first one after the resumption, which may be of fewer steps, and says so.
    resumed = killed_at // 4 * 4
    for one, other in zip(rows(tmp_path / "run"), rows(directory), strict=True):
        assert one["step"] == other["step"]
        assert one["steps"] == (one["step"] - resumed if 0 < one["step"] - resumed < 3 else 3)
        if one["steps"] == 3:
            assert one["loss"] == other["loss"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # what Orbax leaves behind
def test_a_damaged_checkpoint_is_named(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(whole[0], tmp_path / "run"))
    newest = max((directory / "checkpoints").iterdir(), key=lambda path: int(path.name))
    for file in newest.rglob("manifest.ocdbt"):
        file.write_bytes(b"")
    with pytest.raises(
        UserError, match=f"checkpoints/{newest.name}: the checkpoint cannot be read .*; remove that folder"
    ):
        loop.train(problem(), Numbers(), SETTINGS, directory, progress=False)
    shutil.rmtree(newest)
    found = loop.train(problem(), Numbers(), SETTINGS, directory, progress=False)
    for name, value in whole[1].items():
        np.testing.assert_array_equal(found[name], value)


def test_the_log_counts_real_tokens_and_no_compiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, seen = loop.make_step, set()

    def slow(*options: Any) -> Callable[..., Any]:
        step = make(*options)

        def compiling(state: Any, frozen: Any, batch: Any, pace: Any) -> Any:
            if batch.shape not in seen:
                seen.add(batch.shape)
                time.sleep(1.0)
            return step(state, frozen, batch, pace)

        return compiling

    monkeypatch.setattr(loop, "make_step", slow)
    loop.train(problem(), Numbers(), SETTINGS, tmp_path / "run", progress=False)
    assert len(seen) == 2
    logged = rows(tmp_path / "run")
    assert [(row["step"], row["steps"], row["padding"]) for row in logged] == [(3 * i, 3, 0.25) for i in range(1, 5)]
    # 900 tokens in each row; with the second of compiling it could not be more than so many a second.
    assert logged[0]["tokens_per_second"] > 900
    assert logged[1]["tokens_per_second"] > 900
