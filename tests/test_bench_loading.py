"""The benchmark of loading, at tiny sizes: what it writes loads, and its numbers are numbers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from scripts_loaded import SCRIPTS, loaded

import sav_jax


def test_a_checkpoint_is_written_once_and_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(sav_jax.__file__).parents[1]), str(SCRIPTS)]))
    with loaded("bench_loading") as bench:
        bench.main(bench.Arguments(tmp_path, small=True, runs=1, output=tmp_path / "out.json"))
    found = json.loads((tmp_path / "out.json").read_text())
    (directory,) = tmp_path.glob("sav_jax-loading-*")
    params = sav_jax.load(directory, dtype="bfloat16").params
    kernel = np.asarray(params["language_model"]["layers"]["mlp"]["up_proj"]["kernel"], np.float32)
    assert 0.015 < kernel.std() < 0.025
    for what in ("read", "read and keep", "sav_jax.load"):
        assert found[what][0]["bytes"] == pytest.approx(sum(found["files"]), rel=0.05)
        assert found[what][0]["seconds"] > 0
    assert "of the largest file" in capsys.readouterr().out
