"""Profiles of extraction: what is counted, and that decoding runs beside the device."""

from __future__ import annotations

import ast
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import picture

import sav_jax
from sav_jax import extract
from sav_jax.cli import main
from sav_jax.examples import Example
from sav_jax.extract import extract_heads


def examples_of(count: int) -> list[Example]:
    return [Example("What?", (picture(30, 30, seed=i),), id=str(i)) for i in range(count)]


# In a process of its own: JAX's profiler crashes one in which libtpu has been loaded, as tests of plans do.
_PROFILED = """
import dataclasses, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from checkpoints import picture
import sav_jax
from sav_jax import extract
from sav_jax._profiling import profiled
from sav_jax.examples import Example

lmm = sav_jax.load(sys.argv[1])
examples = [Example("What?", (picture(30, 30, seed=i),), id=str(i)) for i in range(12)]
extract.extract_heads(lmm, examples, batch_size=4, progress=False)  # compiled
extract._DECODERS = 1
original = type(lmm.processor).pixels

def slow(*arguments):
    time.sleep(0.1)
    return original(*arguments)

type(lmm.processor).pixels = slow
with profiled(sys.argv[2]) as profile:
    extract.extract_heads(lmm, examples, batch_size=4, progress=False)
print(dataclasses.asdict(profile))
"""


def test_a_profile_says_what_the_device_waited_for(model: str, tmp_path: Path) -> None:
    words = [sys.executable, "-c", _PROFILED, model, str(tmp_path / "trace"), str(Path(__file__).parent)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    profile = ast.literal_eval(done.stdout)
    assert (profile["batches"], profile["examples"]) == (3, 12)
    assert profile["tokens"] > 12 * 30
    assert profile["total"] >= 1.2, "twelve pictures, one after the other"
    assert 0 < profile["busy"] < profile["total"] - 0.5
    assert profile["waiting"] > 0.5
    assert "12 prompts in 3 batches" in done.stderr
    assert "device idle" in done.stderr
    assert list((tmp_path / "trace").rglob("*.xplane.pb")), "a trace"


def test_without_a_profile_nothing_is_measured(lmm: sav_jax.LMM, capsys: pytest.CaptureFixture[str]) -> None:
    extract_heads(lmm, examples_of(2), batch_size=2, progress=False)
    assert "profile" not in capsys.readouterr().err


def test_pictures_are_decoded_beside_each_other(lmm: sav_jax.LMM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four threads meet in four pictures of one batch: one after the other, they would wait in vain."""
    monkeypatch.setattr(extract, "_DECODERS", 4)
    expected = extract_heads(lmm, examples_of(4), batch_size=4, progress=False)
    meeting = threading.Barrier(4, timeout=20)
    original = type(lmm.processor).pixels

    def together(*arguments: Any) -> Any:
        meeting.wait()
        return original(*arguments)

    monkeypatch.setattr(type(lmm.processor), "pixels", together)
    np.testing.assert_array_equal(extract_heads(lmm, examples_of(4), batch_size=4, progress=False), expected)


def test_the_folder_of_a_profile_must_be_one(
    model: str, tmp_path: Path, elsewhere: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "What?"}\n')
    words = ["extract", "--model", model, "--data", str(rows), "--output", "heads", "--profile"]
    assert main([*words, str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.strip() == f"error: --profile {tmp_path}/file: File exists"
