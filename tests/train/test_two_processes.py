"""Training, and methods that train, in two processes of four devices each: the losses and answers of one process, files
written once, resumable by one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from buckets import Buckets
from checkpoints import Reference
from debug_runs import ANSWERS, documents, write_conversations
from debug_runs import losses as logged
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

import sav_jax
from sav_jax import sharding
from sav_jax.aim import load_aim
from sav_jax.cli import main
from sav_jax.train.aim import AIM_PRESETS, train_aim

DIES_AT = 4  # behind the checkpoint of the same number of steps
MESH = "data=4,model=2"
AIM_RECIPE = dataclasses.replace(AIM_PRESETS["debug"], shots=(2,), steps=2)  # as in test_train_aim.py: a single program
EVALUATION = "--methods aim,aim-likelihood,lora,lora-likelihood --shots 2 --limit 8 --demonstrations 2 --lora-rank 2 "
EVALUATION += f"--lora-rates 1e-2 --lora-steps 1 --max-new-tokens 1 --no-cache --mesh {MESH}"

PROGRAM = f"""
import dataclasses
import pathlib
import sys
from sav_jax.cli import main

tests, address, index, dying_run, whole_run, aim_run, evaluated, results, *given = sys.argv[1:]
joined = ["--coordinator", address, "--num-processes", "2", "--process-id", index]
assert main(["train", "lora", *given, *joined, "--output", whole_run]) == 0

import jax
assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 8, 4)
from sav_jax.train.data import ChatData
from sav_jax.errors import UserError
from sav_jax._processes import by_the_first

import sav_jax
from sav_jax.sharding import mesh_of
from sav_jax.train.aim import AIM_PRESETS, train_aim
sys.path.insert(0, tests)
from debug_runs import documents

model = given[given.index("--model") + 1]
lmm = sav_jax.load(model, mesh=mesh_of(jax.devices(), {MESH!r}))
recipe = dataclasses.replace(AIM_PRESETS["debug"], shots=(2,), steps=2)
train_aim(lmm, documents(), recipe, pathlib.Path(aim_run), progress=False)
evaluation = ["eval", "--model", model, "--train", evaluated, "--aim", aim_run, *{EVALUATION!r}.split()]
assert main([*evaluation, "--output-path", results]) == 0

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


TESTS = str(Path(__file__).parent.parent)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def losses(directory: Path) -> list[float]:
    rows = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 7)), "every step once"
    return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def runs(
    reference: Reference, bucket_server: Buckets, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """A folder with runs of two processes, ``two`` whole and ``dead`` half done, and the options of all; ``aim`` with a
    projection; and in the bucket "runs" an evaluation with it.
    """
    folder = tmp_path_factory.mktemp("processes")
    bucket_server.objects["runs"] = {}
    rows = [{"question": f"What is number {i}?", "label": ANSWERS[i % 2]} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--preset", "debug", "--model", str(reference.directory), "--data", str(write_conversations(folder))]
    given += ["--mesh", MESH]  # as in test_debug_presets.py: the same step
    address = f"localhost:{free_port()}"
    # Compiled quickly: a program runs a few times, and rounding is bounded far more widely than what this changes.
    flags = f"{os.environ['XLA_FLAGS']} --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "4", "XLA_FLAGS": flags}
    folders = [str(folder / name) for name in ("dead", "two", "aim", "rows.jsonl")]
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, TESTS, address, str(i), *folders, "gs://runs/results", *given],
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
    assert bucket_server.writes.count("runs/results/results.json") == 1
    written = f"written to {folder / 'two'}: model, adapter\n"
    # Only one says what was written; both know what the first refuses.
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


def test_a_projection_of_two_processes(runs: tuple[Path, list[str]], lmm: sav_jax.LMM, tmp_path: Path) -> None:
    """Against one device."""
    folder, _ = runs
    alone = train_aim(lmm, documents(), AIM_RECIPE, tmp_path / "aim", progress=False)
    np.testing.assert_allclose(logged(folder / "aim"), logged(tmp_path / "aim"), rtol=2e-4)
    together = load_aim(folder / "aim")
    assert set(together.params) == set(alone.params)
    for path, value in alone.params.items():  # as above: two steps of at most the rate
        assert np.abs(together.params[path] - value).max() <= 2 * 2 * AIM_RECIPE.learning_rate
        assert np.median(np.abs(together.params[path] - value)) < 1e-4


def test_methods_that_train_answer_as_in_one_process(
    runs: tuple[Path, list[str]], bucket_server: Buckets, model: str, tmp_path: Path
) -> None:
    folder, _ = runs
    command = ["eval", "--model", model, "--train", str(folder / "rows.jsonl"), "--aim", str(folder / "aim")]
    assert main([*command, *EVALUATION.split(), "--output-path", str(tmp_path)]) == 0
    stored = bucket_server.contents("runs", "results")
    assert set(stored) == {"results.json", "samples_files.jsonl"}
    together, alone = (
        [json.loads(line) for line in text.splitlines()]
        for text in (stored["samples_files.jsonl"], (tmp_path / "samples_files.jsonl").read_bytes())
    )
    assert len(alone) == len(together) == 4 * 8
    for one, two in zip(alone, together, strict=True):
        probabilities = [row.pop("probabilities", {}) for row in (one, two)]
        assert one == two
        # Of log-likelihoods of order ten, to some 2^-20.
        assert probabilities[0] == pytest.approx(probabilities[1], abs=1e-4)


def test_one_process_resumes_what_two_began(runs: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    folder, given = runs
    kept = [int(path.name) for path in (folder / "dead" / "checkpoints").iterdir()]
    assert max(kept) == DIES_AT
    before = (folder / "dead" / "log.jsonl").read_text()
    assert main(["train", "lora", *given, "--output", str(folder / "dead")]) == 0
    assert f"resuming from step {DIES_AT} of 6\n" in capsys.readouterr().err
    assert (folder / "dead" / "log.jsonl").read_text().startswith(before)
    np.testing.assert_allclose(losses(folder / "dead"), losses(folder / "two"), rtol=2e-4)


def test_rows_of_this_process_are_all_of_them() -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    assert sharding.own_rows(mesh, 8) == slice(0, 8) == sharding.own_rows(None, 8)
    rows = np.arange(8.0, dtype=np.float32)
    placed = sharding.put_own_rows({"x": rows}, mesh)["x"]
    assert placed.sharding == NamedSharding(mesh, PartitionSpec("data"))
    np.testing.assert_array_equal(placed, rows)
