"""Checkpoints whose small files are damaged or odd: one line that says what is wrong, from the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import Reference, picture

from sav_jax.cli import main


def _edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    for path, value in changes.items():
        *folders, name = path.split("__")
        place = content
        for folder in folders:
            place = place[folder]
        place[name] = value
    file.write_text(json.dumps(content))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "template": (lambda d: (d / "chat_template.jinja").write_text("{% for x in"), "chat template"),
    "empty template": (
        lambda d: (d / "chat_template.jinja").write_text("\n"),
        "chat_template.jinja: the chat template is empty",
    ),
    "image token that never comes": (
        lambda d: _edit(d / "config.json", image_token_id=7),
        "prompt has 0 image tokens for 1 images: the chat template leaves images out, or writes something else than "
        "'(' (token 7, which config.json names for images)",
    ),
    "template that refuses": (
        lambda d: (d / "chat_template.jinja").write_text("{{ raise_exception('no') }}"),
        "the chat template refuses the prompt: no",
    ),
    "generation config": (lambda d: (d / "generation_config.json").write_text("[1]"), "not a JSON object"),
    "stop token": (
        lambda d: (d / "generation_config.json").write_text('{"eos_token_id": "x"}'),
        "eos_token_id 'x' is neither a token id nor a list of them",
    ),
    "no text": (lambda d: _edit(d / "config.json", text_config=None), "text_config is not an object"),
    "heads": (lambda d: _edit(d / "config.json", text_config__num_key_value_heads=4), "heads cannot share"),
    "window": (lambda d: _edit(d / "config.json", vision_config__window_size=0), "window_size 0"),
    "size": (
        lambda d: _edit(d / "preprocessor_config.json", size={"height": 20, "width": 20}),
        "must have shortest_edge and longest_edge",
    ),
}


@pytest.fixture(scope="module")
def qwen(make_reference: Callable[..., Reference]) -> Reference:
    return make_reference("qwen2_5_vl")


@pytest.mark.parametrize("damage", DAMAGE)
def test_one_line(damage: str, qwen: Reference, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(qwen.directory, tmp_path / "model")
    change, expected = DAMAGE[damage]
    change(tmp_path / "model")
    picture(30, 30).save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text('{"image": "a.png", "question": "What?"}\n')
    command = ["extract", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "rows.jsonl"), "--no-cache"]
    assert main([*command, "--output", str(tmp_path / "heads")]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert expected in error
    assert not (tmp_path / "heads").exists()
