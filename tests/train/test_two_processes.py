"""Training in two processes of four devices each: the losses of one process, files written once, resumable by one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from checkpoints import Reference
from debug_runs import write_conversations
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from sav_jax import sharding
from sav_jax.cli import main

DIES_AT = 4  # behind the checkpoint of the same number of steps

PROGRAM = f"""
import sys
from sav_jax.cli import main

address, index, dying_run, whole_run, *given = sys.argv[1:]
joined = ["--coordinator", address, "--num-processes", "2", "--process-id", index]
assert main(["train", "lora", *given, *joined, "--output", whole_run]) == 0

import jax
assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 8, 4)
from sav_jax.train.data import ChatData
from sav_jax.errors import UserError
from sav_jax._processes import by_the_first

get = ChatData.__getitem__

def dying(self, step):
    if step == {DIES_AT}:
        raise MemoryError("as if killed")
    return get(self, step)

ChatData.__getitem__ = dying
try:
    main(["train", "lora", *given, "--output", dying_run])
except MemoryError:
    print("died")

def refuse():
    raise UserError("no, says process 0")

try:
    by_the_first(refuse)
except UserError as error:
    print(error)

def unreadable(self, step):
    if step == 2 and index == "1":
        raise UserError("one.png: cannot be read")
    return get(self, step)

ChatData.__getitem__ = unreadable
sys.exit(main(["train", "lora", *given, "--output", dying_run + "2"]))
"""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def losses(directory: Path) -> list[float]:
    rows = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 7)), "every step once"
    return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def runs(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with runs of two processes, ``two`` whole and ``dead`` half done, and the options of all."""
    folder = tmp_path_factory.mktemp("processes")
    given = ["--preset", "debug", "--model", str(reference.directory), "--data", str(write_conversations(folder))]
    given += ["--mesh", "data=4,model=2"]  # as in test_debug_presets.py: the same step
    address = f"localhost:{free_port()}"
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "4"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, address, str(i), str(folder / "dead"), str(folder / "two"), *given],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        said_by = [one.communicate(timeout=400) for one in both]
    finally:
        for one in both:
            one.kill()
    for one, said, (_, errors) in zip(both, ("process 1: ", ""), said_by, strict=True):
        assert one.returncode == 2, [text[-3000:] for _, text in said_by]
        # The second could not go on, and the first does not wait for it.
        assert f"error: {said}one.png: cannot be read\n" in errors
    written = f"written to {folder / 'two'}: model, adapter\n"
    # Only one says what was written; both know what the first refuses. (Gloo's own lines stand between.)
    for said in ("died\n", "no, says process 0\n"):
        assert [out.count(said) for out, _ in said_by] == [1, 1]
    assert [out.count(written) for out, _ in said_by] == [1, 0]
    return folder, given


def test_two_processes_learn_what_one_does(runs: tuple[Path, list[str]]) -> None:
    folder, given = runs
    assert main(["train", "lora", *given, "--output", str(folder / "one")]) == 0
    # As between meshes (test_tuning): sums in another order, and six steps of Adam.
    np.testing.assert_allclose(losses(folder / "two"), losses(folder / "one"), rtol=2e-4)
    written = [sorted(path.name for path in (folder / name).rglob("*.safetensors")) for name in ("one", "two")]
    assert written[0] == written[1] == ["adapter_model.safetensors", "model.safetensors"]
    one, two = (load_file(folder / name / "adapter/adapter_model.safetensors") for name in ("one", "two"))
    assert set(one) == set(two)
    for key, value in one.items():
        # Where a gradient is rounding alone its sign may differ: Adam then moves a number the other way, by at most the
        # rate of 1e-2 in each of six steps.
        assert np.abs(two[key] - value).max() <= 2 * 6 * 1e-2
        assert np.median(np.abs(two[key] - value)) < 1e-4
    assert len(list((folder / "two" / "tensorboard").iterdir())) == 1
    assert not [path for path in (folder / "two").rglob("*") if path.name.startswith(".")]


def test_one_process_resumes_what_two_began(runs: tuple[Path, list[str]]) -> None:
    folder, given = runs
    kept = [int(path.name) for path in (folder / "dead" / "checkpoints").iterdir()]
    assert max(kept) == DIES_AT
    before = (folder / "dead" / "log.jsonl").read_text()
    assert main(["train", "lora", *given, "--output", str(folder / "dead")]) == 0
    assert (folder / "dead" / "log.jsonl").read_text().startswith(before)
    np.testing.assert_allclose(losses(folder / "dead"), losses(folder / "two"), rtol=2e-4)


def test_rows_of_this_process_are_all_of_them() -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    assert sharding.own_rows(mesh, 8) == slice(0, 8) == sharding.own_rows(None, 8)
    rows = np.arange(8.0, dtype=np.float32)
    placed = sharding.put_own_rows({"x": rows}, mesh)["x"]
    assert placed.sharding == NamedSharding(mesh, PartitionSpec("data"))
    np.testing.assert_array_equal(placed, rows)
