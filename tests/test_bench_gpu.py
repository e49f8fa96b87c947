"""The benchmark on a GPU, at tiny sizes on a CPU: what it counts, and that it says so when a section fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scripts_loaded import SCRIPTS, loaded


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "2")
    with loaded("bench_gpu") as module:
        yield module


@pytest.mark.parametrize("family", ["onevision", "qwen2vl"])
def test_both_sides_hold_the_same_model_and_read_the_same_prompts(
    bench: ModuleType, tmp_path: Path, family: str
) -> None:
    model = bench.torch_model(bench.write_skeleton(tmp_path, family, small=True), "cpu")
    lmm = bench.shared_lmm(tmp_path, model)
    prompts = bench.prepare(lmm, bench.make_examples(family, True, 2), "cpu")
    theirs = bench.torch_heads(model, prompts.inputs).float().numpy()
    ours = bench.compiled_step(lmm, prompts.batch)[0](lmm.params, prompts.batch)
    # bfloat16 on both sides: 2^-9 for each of some dozen roundings
    assert bench.relative(np.asarray(ours).reshape(theirs.shape), theirs) < 0.02
    assert theirs.std() > 0.1
    vision, text = lmm.config.vision, lmm.config.text
    length = prompts.tokens / 2
    layer = 2 * text.hidden_size * text.head_dim * (text.num_heads + text.num_kv_heads)
    layer += 3 * text.hidden_size * text.intermediate_size
    decoder = text.num_layers * (2 * layer + 2 * length * text.num_heads * text.head_dim) * prompts.tokens
    c, f, d = vision.hidden_size, vision.intermediate_size, text.hidden_size
    if family == "onevision":
        count, images = 16, prompts.rows
        tower = vision.depth * (4 * c * c + 2 * c * f) + vision.patch_size**2 * 3 * c + c * d + d * d
        depth = vision.depth
    else:
        count, images, depth = 36, 2, vision.num_layers
        tower = depth * (4 * c * c + 2 * c * f) + vision.patch_values * c + (16 * c * c + 4 * c * d) / 4
    expected = decoder + (2 * tower * count + 4 * count**2 * c * depth) * images
    assert bench.model_flops(lmm, prompts.tokens, prompts.rows, 2) == pytest.approx(expected)


def test_a_section_that_fails_is_told_and_the_others_run(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(run: Any) -> None:
        run.report("parity", "before", value=1.0)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(bench, "parity", fails)
    output = tmp_path / "gpu.json"
    assert bench.main(["--small", "--sections", "parity", "scoring", "--output", str(output)]) == 1
    assert "RuntimeError: out of memory" in capsys.readouterr().out
    rows = json.loads(output.read_text())
    (scored,) = (row for row in rows if row["section"] == "scoring")
    assert scored["heads_with_equal_score"] == "6/6"
    assert bench.main(["--small", "--sections", "scoring"]) == 0
