"""The debug preset of each recipe: it learns, alike on any mesh, and a killed run ends with the same bits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import debug_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import Reference
from debug_runs import PRESETS, losses, trained
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import sav_jax
from sav_jax.aim import load_aim
from sav_jax.models.fusion import initial_params
from sav_jax.models.layers import Projection
from sav_jax.train import loop

KILLED_AT = {"lora": 3, "sq-llava": 5, "aim": 4}  # of six steps, with checkpoints behind the second and the fourth

Run = tuple[Path, dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def whole(lmm: sav_jax.LMM, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Of each recipe a run on one device that nothing disturbed: its folder, and what it trained."""
    folder = tmp_path_factory.mktemp("whole")
    return {name: (folder / name, trained(name, lmm, folder / name)) for name in PRESETS}


def test_dropout_masks_do_not_depend_on_the_mesh() -> None:
    """A projection whose low-rank way is the identity puts out what dropout leaves."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    one = jnp.eye(16, dtype=jnp.float32)
    lora = {"a": one, "b": one, "dropout": jnp.float32(0.5)}
    module = Projection("BTD,DF->BTF", (16, 16))
    variables: Any = {"params": {"kernel": jnp.zeros((16, 16), jnp.float32)}, "lora": lora}

    @jax.jit
    def left(x: jax.Array) -> Any:
        return module.apply(variables, x, rngs={"dropout": jax.random.key(3)})

    x = np.random.default_rng(0).uniform(1, 2, (8, 12, 16)).astype(np.float32)
    placed = [
        jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec))) for spec in ((), ("data",), ("data", "model"))
    ]
    alone = np.asarray(left(jnp.asarray(x)))
    for y in placed:
        np.testing.assert_array_equal(np.asarray(left(y)), alone)
    # 1,536 draws at one half: four standard deviations are 0.051.
    assert abs((alone == 0).mean() - 0.5) < 0.051
    np.testing.assert_array_equal(alone[alone != 0], (2 * x)[alone != 0])


@pytest.fixture(scope="module")
def killed(whole: dict[str, Run], reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs of all recipes in a process that SIGKILL ended."""
    folder = tmp_path_factory.mktemp("killed")
    kills = [f"{name}={step}" for name, step in KILLED_AT.items()]
    done = subprocess.run(
        [sys.executable, debug_runs.__file__, str(reference.directory), str(folder), *kills],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", PRESETS)
def test_killed_from_outside_it_ends_with_the_same_bits(
    lmm: sav_jax.LMM, whole: dict[str, Run], killed: Path, name: str
) -> None:
    run = killed / name
    assert len(losses(run)) == KILLED_AT[name]
    assert not (run / "projection").exists()
    same(trained(name, lmm, run), run, whole[name])


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("killed_at", [1, 3])
def test_stopped_at_a_step_it_ends_with_the_same_bits(
    lmm: sav_jax.LMM, whole: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, killed_at: int
) -> None:
    """When the next batch is wanted; the loop alone is stopped at every step in test_loop.py."""

    def batches(data: Any, first: int) -> Iterator[Any]:
        yield from (data[step] for step in range(first, killed_at))
        raise MemoryError("as if killed")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "batches", batches)
        with pytest.raises(MemoryError):
            trained(name, lmm, tmp_path / "run")
    same(trained(name, lmm, tmp_path / "run"), tmp_path / "run", whole[name])


def same(got: dict[str, np.ndarray], directory: Path, expected: Run) -> None:
    """What was trained and logged, bit for bit; each step once."""
    assert set(got) == set(expected[1])
    for path, value in expected[1].items():
        np.testing.assert_array_equal(got[path], value)
    assert losses(directory) == losses(expected[0])
    steps = [json.loads(line)["step"] for line in (directory / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_aim_trains_the_projection_alone(lmm: sav_jax.LMM, whole: dict[str, Run]) -> None:
    aim = load_aim(whole["aim"][0])
    before = initial_params(aim.config, 0, "identity", 1.0)
    assert set(aim.params) == set(before) == {"linear_1/kernel", "linear_1/bias", "norm/scale", "norm/bias"}
    for path, value in aim.params.items():
        np.testing.assert_array_equal(value, whole["aim"][1][path])
        assert value.dtype == np.float32
        assert np.abs(value - before[path]).max() > 1e-3, "every one of its arrays has moved"
    assert aim.model == lmm.fingerprint


def test_the_vision_towers_updates_are_trained(whole: dict[str, Run]) -> None:
    """In SQ-LLaVA's released code the tower runs without gradients and its LoRA stays where it began."""
    trained = whole["sq-llava"][1]
    towers = [path for path in trained if path.startswith("lora/vision_tower") and path.endswith("/b")]
    assert len(towers) == 6
    assert all(np.abs(trained[path]).max() > 0 for path in towers)


@pytest.fixture(scope="module", params=[{"data": 2}, {"data": 4, "model": 2}], ids=["2", "8"])
def sharded(request: pytest.FixtureRequest, reference: Reference) -> sav_jax.LMM:
    axes = request.param
    devices = np.array(jax.devices()[: int(np.prod(list(axes.values())))]).reshape(*axes.values())
    return sav_jax.load(reference.directory, mesh=Mesh(devices, tuple(axes)))


@pytest.mark.parametrize("name", PRESETS)
def test_it_learns_alike_on_any_mesh(whole: dict[str, Run], sharded: sav_jax.LMM, tmp_path: Path, name: str) -> None:
    """With dropout, as the presets have it: its masks do not depend on the mesh."""
    alone = losses(whole[name][0])
    assert alone[-1] < alone[0]
    trained(name, sharded, tmp_path / "run")
    # Sums in another order: 2^-24 for each of some thousand terms in a row, of losses of order one, and what six
    # steps of Adam make of it where a gradient is near zero.
    np.testing.assert_allclose(losses(tmp_path / "run"), alone, rtol=2e-4)
