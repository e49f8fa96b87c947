"""The command line on a directory of every family: nothing to say but where it is."""

from __future__ import annotations

import json
from pathlib import Path

import checkpoints_qwen1 as qwen1
import numpy as np
import pytest
from checkpoints import picture
from families import FAMILIES

from sav_jax import load_classifier
from sav_jax.cli import main
from sav_jax.headstore import read_head_array

# Layers, heads and head_dim. Decoders are 40 and 72 wide: head_dim is theirs by the heads (10 x 4, 6 x 12), or not
# (10 x 6, 6 x 16), and there are fewer key/value heads than heads in all but the first Qwen-VL.
SHAPES = {
    "llava": (4, 10, 4),
    "llava_next": (4, 10, 4),
    "llava_next-mistral": (4, 10, 6),
    "llava_onevision": (4, 10, 4),
    "qwen2_vl": (4, 6, 12),
    "qwen2_5_vl": (4, 6, 12),
    "qwen3_vl": (4, 6, 16),
    "qwen": (3, 8, 32),
}


def test_every_family_is_there() -> None:
    assert SHAPES.keys() == {*FAMILIES, "qwen"}


@pytest.mark.parametrize("name", SHAPES)
def test_fit_predict_extract(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SAV_JAX_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "model"
    if name == "qwen":
        qwen1.build(model, qwen1.CONFIGS["released"], chat=True)
    else:
        FAMILIES[name](model)
    for label, shift in {"bright": 170, "dark": 0}.items():
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(4):
            image = picture(30, 34, i).point(lambda value, shift=shift: value // 3 + shift)
            image.save(tmp_path / "photos" / label / f"{i}.png")
    photos, question = str(tmp_path / "photos"), ("--question", "Is it day or night?")
    layers, heads, _ = SHAPES[name]
    # So many that one of the last layer is among them: nothing compiles anew for predicting.
    fit = ("fit", "--model", str(model), "--train", photos, *question, "--output", str(tmp_path / "clf"))
    assert main([*fit, "--num-heads", str(layers * heads // 2)]) == 0
    classifier = load_classifier(tmp_path / "clf")
    assert classifier.scores.shape == (layers, heads)

    output = tmp_path / "predictions.jsonl"
    assert main(["predict", "--classifier", str(tmp_path / "clf"), "--data", photos, "--output", str(output)]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"{label}/{i}.png" for label in ("bright", "dark") for i in range(4)]
    assert all(row["prediction"] == row["label"] for row in rows)

    extract = ("extract", "--model", str(model), "--data", photos, *question, "--output", str(tmp_path / "heads"))
    assert main([*extract]) == 0
    stored = read_head_array(tmp_path / "heads")[0]
    assert stored.shape == (8, *SHAPES[name])
    assert np.isfinite(stored).all()
    assert "accuracy 1.0000 (8 of 8 right)" in capsys.readouterr().out
