"""Two processes of four devices each read prompts: the same classifier as of one process, files written once, and a
bounded wait when one of them is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from buckets import Buckets
from PIL import Image
from sklearn.datasets import load_digits

import sav_jax
from sav_jax.cli import main
from sav_jax.headstore import HeadStore

SHOWN, ASKED = 30, 8  # pictures; questions about each
BOUND = 60  # seconds in which those that are left must end


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    digits = load_digits(n_class=3)
    lines = []
    for i in range(SHOWN):
        Image.fromarray((digits.images[i] * 15).astype(np.uint8)).resize((40, 40)).save(folder / f"{i}.png")
        for k in range(ASKED):
            row = {"image": f"{i}.png", "question": f"Which digit is it{'?' * (k + 1)}", "label": str(digits.target[i])}
            lines.append(json.dumps(row))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@contextlib.contextmanager
def two(cache: str | Path, *words: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Both processes of a command; none is left behind."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4", "SAV_JAX_CACHE": str(cache)}
    command = [sys.executable, "-c", "from sav_jax.cli import main; import sys; sys.exit(main())", *words]
    command += ["--coordinator", where, "--num-processes", "2", "--process-id"]
    processes = [
        subprocess.Popen([*command, str(i)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            with contextlib.suppress(ValueError):  # it has been heard to its end
                process.communicate()


def test_killed_resumed_and_as_one_process(rows: Path, buckets: Buckets, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features and classifier of two processes in a bucket, of one on a disk."""
    fit = ["fit", "--model", "tiny", "--train", str(rows / "rows.jsonl"), "--num-heads", "5", "--batch-size", "8"]
    words = [*fit, "--output", "gs://bucket/clf", "--mesh", "data=2,fsdp=2,model=2"]

    def stored() -> dict[str, tuple[bytes, int]]:
        with buckets.lock:
            return {name: of for name, of in buckets.objects["bucket"].items() if name.startswith("cache/heads/")}

    with two("gs://bucket/cache", *words) as (first, second):
        until = time.monotonic() + 300
        while time.monotonic() < until and first.poll() is None and len(stored()) < 16:
            time.sleep(0.02)
        second.send_signal(signal.SIGKILL)
        _, said = first.communicate(timeout=BOUND)
    assert first.returncode == 2, said
    assert "error: another process has ended, or cannot be reached" in said
    assert not buckets.contents("bucket", "clf")
    kept = stored()
    assert 16 <= len(kept) < SHOWN * ASKED

    with two("gs://bucket/cache", *words) as processes:
        outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "classifier written" in outputs[0][0]
    assert "[Gloo]" not in outputs[0][0]  # results alone
    assert "[Gloo]" in outputs[0][1]
    assert "classifier written" not in outputs[1][0]  # the first speaks for all
    found = stored()
    assert kept.items() <= found.items()  # of the same generation: not even written again
    written = [name for name in buckets.writes if name.startswith("bucket/clf/") and not name.endswith(".tmp")]
    assert written == ["bucket/clf/classifier.safetensors", "bucket/clf/classifier.json"]  # once, by the first

    monkeypatch.setenv("SAV_JAX_CACHE", str(rows / "alone"))
    assert main([*fit, "--output", str(rows / "one")]) == 0
    keys = [name.rpartition("/")[2] for name in found]
    assert len(keys) == SHOWN * ASKED
    together, alone = (HeadStore.open(f"{cache}/heads").read(keys) for cache in ("gs://bucket/cache", rows / "alone"))
    # Sums in another order: some 2^-24 for each of the few dozen sums one after the other, of values up to the largest.
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5 * np.abs(alone).max())
    one, both = (sav_jax.load_classifier(where) for where in (rows / "one", "gs://bucket/clf"))
    assert one.labels == both.labels
    assert one.heads == both.heads  # scores of heads that read the text alone are rounding: all classes are as near
    assert both.predict(together) == both.predict(alone)


def test_headers_are_shared_out(tmp_path: Path) -> None:
    """Each file's is read by one of the processes. Prompts are those that a process plans by itself, and so is what is
    said of files that cannot be read: of the first example in order, by all.
    """
    program = """
import dataclasses, json, sys, jax, numpy as np
import sav_jax
from sav_jax import Example, _processes
from sav_jax.extract import plan_prompts
from sav_jax.sharding import mesh_of
_processes.start(sys.argv[1], 2, int(sys.argv[2]))
read, sizes, shapes = [], Example.image_sizes, Example.video_shapes
Example.image_sizes = lambda self: (read.append(self.id), sizes(self))[1]
Example.video_shapes = lambda self: (read.append("video") if self.videos else None, shapes(self))[1]
clip = sav_jax.Video([np.full((20, 30, 3), i, np.uint8) for i in range(5)], 2.5)
examples = [Example(f"What{'?' * (i // 8)}", (f"{i % 8}.png",), id=str(i), source=f"row {i}") for i in range(16)]
examples.append(Example("What?", (), videos=(clip,), frames=3))
names = ["none.png", "no.txt", "none.png"]
bad = [*examples[::-1], *(Example("What?", (name,), source=f"bad {i}") for i, name in enumerate(names))]
def refused(lmm, examples):
    try:
        plan_prompts(lmm, examples)
    except sav_jax.UserError as error:
        return str(error)
def said(lmm):
    read.clear()
    prompts = [[p.token_ids.tolist(), p.num_rows, float(p.visual_weight.sum())] for p in plan_prompts(lmm, examples)]
    counted = read[:]
    unlike = dataclasses.replace(lmm, fingerprint=sys.argv[2])
    this = int(sys.argv[2])
    asked = [(lmm, bad), (lmm, examples[:: 1 - 2 * this]), (lmm, examples[this:]), (unlike, bad)]
    return {"read": counted, "prompts": prompts, "errors": [refused(*of) for of in asked]}
print("said", json.dumps(said(sav_jax.load("tiny", mesh=mesh_of(jax.devices(), "data=2")))), flush=True)
if sys.argv[2] == "0":  # a model of its own needs nobody else
    print("said", json.dumps(said(sav_jax.load("tiny"))), flush=True)
"""
    for i in range(8):
        Image.new("RGB", (20 + 100 * i, 300 - 20 * i)).save(tmp_path / f"{i}.png")
    (tmp_path / "no.txt").write_text("no picture")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    command = [sys.executable, "-c", program, where]
    processes = [
        subprocess.Popen([*command, str(i)], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0]
    lines = [line.removeprefix("said ") for of in outputs for line in of.splitlines() if line.startswith("said ")]
    first, alone, second = map(json.loads, lines)
    assert first["prompts"] == second["prompts"] == alone["prompts"]
    bad = 'bad 0: field "image": none.png does not exist'
    assert first["errors"] == second["errors"]
    assert first["errors"][0] == bad
    assert alone["errors"] == [bad, None, None, bad]
    for problem, what in zip(first["errors"][1:], ("other rows", "other rows", "another model"), strict=True):
        assert problem == f"process 1 has {what} than process 0: every process must be given the same files"
    assert alone["read"] == [*map(str, range(16)), "", "video"]
    assert sorted(first["read"] + second["read"]) == sorted([*map(str, range(8)), "", "video"])
    assert min(len(first["read"]), len(second["read"])) >= 4


def test_a_picture_that_cannot_be_read_is_reported_by_all(rows: Path, tmp_path: Path) -> None:
    """Whichever process has read it."""
    lines = (rows / "rows.jsonl").read_text().splitlines()
    (tmp_path / "bad.png").write_text("no picture")
    data = tmp_path / "rows.jsonl"
    lines = [json.dumps(json.loads(line) | {"image": str(rows / json.loads(line)["image"])}) for line in lines]
    bad = json.dumps({"image": "bad.png", "question": "Which digit is it?", "label": "0"})
    data.write_text("\n".join([*lines, bad, *lines[:5], bad]) + "\n")
    words = ["extract", "--model", "tiny", "--data", str(data), "--output", str(tmp_path / "heads")]
    with two(tmp_path / "cache", *words, "--mesh", "data=8") as processes:
        outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [2, 2], outputs
    problem = f'{data}:{len(lines) + 1}: field "image": {tmp_path / "bad.png"} cannot be read'
    for _, said in outputs:
        assert f"error: {problem}" in said


@pytest.mark.parametrize(
    ("number", "status", "reason"),
    [
        (signal.SIGINT, 130, "error: process 1: interrupted"),
        (signal.SIGTERM, -signal.SIGTERM, "another process has ended, or cannot be reached"),
    ],
)
def test_stopping_one_process_stops_the_others(number: signal.Signals, status: int, reason: str) -> None:
    """Ctrl-C, and what a cluster sends to end a program: JAX would have the others wait for five minutes."""
    program = """
import sys, time, numpy as np
from jax.experimental.multihost_utils import process_allgather
from sav_jax import _processes
_processes.start(sys.argv[1], 2, int(sys.argv[2]))
process_allgather(np.ones(3))
with _processes.failing_together():
    if sys.argv[2] == "1":
        print("ready", flush=True)
        time.sleep(60)
    process_allgather(np.ones(3))
"""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = f"localhost:{free.getsockname()[1]}"
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", program, where, str(i)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for i in range(2)
    )
    try:
        assert second.stdout is not None
        assert second.stdout.readline() == "ready\n"
        second.send_signal(number)
        said = first.communicate(timeout=BOUND)[1]
        assert first.returncode == 2, said
        assert reason in said
        assert second.wait(BOUND) == status
    finally:
        for process in (first, second):
            process.kill()
            with contextlib.suppress(ValueError):
                process.communicate()


def test_losing_the_first_process(tmp_path: Path) -> None:
    """It keeps what all know of each other: JAX ends the others by an abort, which here is a line and a status, too,
    whether they wait for a collective, for nothing, or not at all.
    """
    waits = ["process_allgather(np.ones(3))", "time.sleep(60)", "[sum(range(1000)) for _ in iter(int, 1)]"]
    program = """
import sys, time, jax, numpy as np
from jax.experimental.multihost_utils import process_allgather
from sav_jax import _processes
_processes.start(sys.argv[1], 2, int(sys.argv[2]))
process_allgather(np.ones(3))
with _processes.failing_together():
    print("ready", flush=True)
    {} if sys.argv[2] == "1" else time.sleep(60)
"""
    for wait in waits:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            where = f"localhost:{free.getsockname()[1]}"
        first, second = (
            subprocess.Popen(
                [sys.executable, "-c", program.format(wait), where, str(i)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(2)
        )
        try:
            assert second.stdout is not None
            assert second.stdout.readline() == "ready\n"
            first.send_signal(signal.SIGKILL)
            said = second.communicate(timeout=BOUND)[1].splitlines()[-1]
            assert second.returncode == 2, said
            assert "another process has ended, or cannot be reached" in said
            assert said.endswith("what is stored is kept: run all of them again")
        finally:
            for process in (first, second):
                process.kill()
                with contextlib.suppress(ValueError):
                    process.communicate()
