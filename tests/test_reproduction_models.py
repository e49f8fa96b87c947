"""The study of models that are not bundled, and of tasks that are not its own: names, folders, keys, and a run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from benchmark_files import jsonl, picture
from checkpoints_llava import build_llava
from scripts_loaded import imported

import sav_jax
from sav_jax.errors import UserError
from sav_jax.lmm import BUNDLED

study = imported("reproduction.study")
subjects = imported("reproduction.subjects")
entry = imported("reproduction.__main__")
beyond = imported("reproduction.beyond")
savs = imported("reproduction.savs")
rivals = imported("reproduction.rivals")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of four layers of ten heads, in a folder whose name no path should have."""
    folder = tmp_path_factory.mktemp("checkpoints") / "a model, of mine"
    build_llava(folder)
    return folder.rename(folder.with_name("a model of mine"))


def copy_of_tiny(folder: Path) -> Path:
    shutil.copytree(BUNDLED["tiny"], folder)
    return folder


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that were asked for: they are not run, their answers are drawn by lot, and LoRA finds no memory. Heads,
    towers and arithmetic are those of the model, of a few queries.
    """
    asked: list[list[str]] = []

    def run(program: list[str], *, stdout: Any, **_: Any) -> Any:
        words = program[program.index("sav_jax") + 1 :]
        asked.append(words)
        if "lora" in words[words.index("--methods") + 1]:
            stdout.write(b"out of memory\n")
            return subprocess.CompletedProcess(program, 2)
        Path(words[words.index("--output-path") + 1]).mkdir()
        return subprocess.CompletedProcess(program, 0)

    def by_lot(_: Path, method: str, tasks: Sequence[str]) -> dict[str, Any]:
        rng = np.random.default_rng(len(method))
        names = tuple(tuple(map(str, range(30))) for _ in range(2))
        return {task: study.Answers(tuple(rng.integers(2, size=(2, 30)).astype(float)), names) for task in tasks}

    monkeypatch.setattr(study, "subprocess", SimpleNamespace(run=run, STDOUT=subprocess.STDOUT))
    monkeypatch.setattr(study.Study, "limit", 8)
    monkeypatch.setattr(savs, "unreadable", lambda *_: "")
    for part in (rivals, savs, beyond):
        monkeypatch.setattr(part, "methods_of", by_lot)
    return asked


def test_a_checkpoint_of_one_s_own_gets_a_page(
    checkpoint: Path, commands: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    docs = {file: file.read_bytes() for file in (study.ROOT / "README.md", study.ROOT / "docs" / "reproduction.md")}
    wanted = entry.Arguments(
        quick=True,
        output=tmp_path / "out",
        parts="savs,beyond",
        models=str(checkpoint),
        tasks="drawn-safety,hateful-memes",
        data_dir=tmp_path / "data",
    )
    for file, number in (("train", 44), ("test_seen", 8)):  # of either class enough for 20 shots, not for 50
        memes = [{"id": i, "img": f"{file}{i}.png", "label": i % 2, "text": f"its {i}"} for i in range(number)]
        jsonl(tmp_path / "data" / "hateful-memes" / f"{file}.jsonl", memes)
        for row in memes:
            picture(tmp_path / "data" / "hateful-memes" / str(row["img"]))
    entry.main(wanted)
    text = (tmp_path / "out" / "reproduction.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if "| `a-model-of-mine` | " in line]
    verdicts = {cells[0].removeprefix("| ").split(" (arXiv")[0].split(" (beyond")[0]: cells[-1] for cells in rows}
    assert len(verdicts) == len(rows) > 25
    assert [claim for claim, verdict in verdicts.items() if verdict.startswith("not testable")] == [
        "Heads chosen on a similar task beat random ones.",
        "Heads chosen on a similar task serve as well as the task's own: no more than 2 points below.",
        "SAVs beat LoRA on the same examples.",
        "SAVs beat LoRA on the same examples of tasks that come in pairs.",
        "Heads chosen on a similar task lose less than LoRA tuned on it.",
    ]
    assert "out of memory" in capsys.readouterr().err
    assert {words[words.index("--model") + 1] for words in commands} == {str(checkpoint)}
    assert {words[words.index("--tasks") + 1] for words in commands} == {"drawn-safety,hateful-memes", "drawn-safety"}
    assert {words[words.index("--data-dir") + 1] for words in commands} == {str(tmp_path / "data")}
    settings = {cells[0].split(" (arXiv")[0]: cells[2] for cells in rows}
    for claim, setting in (
        ("More examples help: 20 of a class beat 5.", "mean of 2 tasks, 20 heads"),
        ("More examples help: 50 of a class beat 20.", "drawn-safety, 20 heads"),
        ("SAVs beat the vision tower alone where the question matters.", "hateful-memes; 20 shots"),
        ("SAVs beat the vision tower alone where all questions are the same.", "drawn-safety; 20 shots"),
    ):
        assert settings[f"| {claim}"].startswith(setting)
    for depth in (2, 3):
        assert f"The heads of the first {depth} of 4 layers suffice: no more than 1 point below all." in verdicts
    assert f"`a-model-of-mine` is {checkpoint}, of 4 layers of 10 heads" in text
    assert "ask `drawn-safety`, `hateful-memes`." in text
    for said_of_ours in ("never went", "training had", "so small a model", "twelve layers", "Not shown on"):
        assert said_of_ours not in text
    assert {file: file.read_bytes() for file in docs} == docs

    # Moved, it is the same model: nothing is measured again.
    assert len(commands) == 7
    moved = shutil.copytree(checkpoint, tmp_path / "elsewhere" / checkpoint.name)
    entry.main(dataclasses.replace(wanted, models=str(moved), page_only=True))
    again = (tmp_path / "out" / "reproduction.md").read_text()
    assert again.replace(str(moved), str(checkpoint)) == text
    assert len(commands) == 7


def test_names_are_safe_and_differ(tmp_path: Path) -> None:
    names, others = subjects.find_models(f"tiny, {copy_of_tiny(tmp_path / 'a b' / 'tiny')}")
    print_of = sav_jax.lmm.checkpoint_fingerprint(BUNDLED["tiny"])
    assert names == ("tiny", f"tiny-{print_of[:8]}")
    assert (others[0].path, others[0].fingerprint) == (str(tmp_path / "a b" / "tiny"), print_of)
    for text, name in (("a/../b", "a-..-b"), ("..", "model"), ("ä|`b`", "b"), ("", "model"), ("x" * 300, "x" * 100)):
        assert subjects.safe_name(text) == name
    again = copy_of_tiny(tmp_path / "again")
    with pytest.raises(UserError, match="--models names again twice"):
        subjects.find_models(f"{again},tiny-qwen,{again}/.")
    with pytest.raises(UserError, match="--models names tiny twice"):
        subjects.find_models("tiny,tiny")
    assert subjects.folder_name(("tiny",), False, (), True) == "reproduction-quick"
    assert subjects.folder_name(("a", "b"), True, ("tfds:x",), False) == "reproduction-of-a+b-on-tfds-x"
    assert len(subjects.folder_name(("a",), True, [f"task-{i}" for i in range(40)], False)) == subjects.LONGEST


def test_what_is_kept_depends_on_the_weights(tmp_path: Path) -> None:
    """Of the bundled models as it always did: nobody measures for hours again."""
    usual = study.Study(tmp_path)
    texts = [json.dumps([{"limit": 1}, False, [0, 1, 2]]), "sav-jax eval"]
    weights = {
        name: hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        for name, folder in BUNDLED.items()
    }
    for text in texts:
        key = hashlib.sha256(json.dumps([text, sav_jax.__version__, weights]).encode()).hexdigest()
        assert usual._key("heads/tiny", text) == key
    found = [study.Checkpoint("mine", "/mine", fingerprint) for fingerprint in ("one", "two")]
    others = [dataclasses.replace(usual, models=("tiny", "mine"), others=(of,)) for of in found]
    assert len({of._key("heads/mine", texts[0]) for of in others}) == 2
    assert {of._key("heads/tiny", texts[0]) for of in others} == {usual._key("heads/tiny", texts[0])}
    files = [dataclasses.replace(usual, data_dir=Path(folder)) for folder in ("/a", "/b")]
    assert len({of._key("heads/tiny", texts[0]) for of in (usual, *files)}) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": "tiny,huge"}, "no such model: huge is neither a directory, a hub id"),
        ({"models": " ,"}, "--models names no model; bundled are: tiny, tiny-qwen"),
        ({"models": "{here}/empty"}, "empty: no config.json in it"),
        ({"models": "{here}/clip"}, "clip: config.json: model_type 'clip' is not known"),
        ({"models": "{here}/few"}, "few has 8 attention heads; the study chooses 20"),
        ({"models": "{here}/bare"}, "bare: no .* file in it"),
        ({"tasks": "digits,no-such"}, "no task is called 'no-such'; 'sav-jax eval --tasks list' prints all"),
        ({"tasks": "digits,gqa"}, "--tasks: the answers to gqa are written freely"),
        ({"tasks": ","}, "--tasks names no task"),
        ({"tasks": "digits,hateful-memes", "data_dir": "{here}"}, "task hateful-memes: .*/hateful-memes lacks"),
        ({"data_dir": "{here}"}, "--data-dir is of --tasks"),
        ({"page_only": True}, "out: nothing was measured there; run it without --page-only"),
        ({"parts": "savs,more"}, "no part is called 'more'"),
        ({"tasks": "digits", "output": str(study.ROOT / "results" / "reproduction")}, "is for the bundled models"),
    ],
)
def test_bad_names_are_one_line_before_anything_runs(
    options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study.Study, "command", lambda *_, **__: pytest.fail("something was measured"))
    config = json.loads((BUNDLED["tiny"] / "config.json").read_text())
    few = config | {"text_config": config["text_config"] | {"num_hidden_layers": 1}}
    for name, content in (("clip", {"model_type": "clip"}), ("few", few), ("bare", config)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    (tmp_path / "empty").mkdir()
    given = {"output": str(tmp_path / "out")} | {
        name: str(value).replace("{here}", str(tmp_path)) for name, value in options.items()
    }
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
    monkeypatch.setattr(sys, "argv", ["reproduce", "--quick", *words])
    arguments = {name: Path(value) if name in ("output", "data_dir") else value for name, value in given.items()}
    with pytest.raises(UserError, match=message) as caught:
        entry.main(entry.Arguments(quick=True, **arguments))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_bad_name_ends_with_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["reproduce", "--models", "huge"])
    monkeypatch.delitem(sys.modules, "scripts.reproduction.__main__")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("scripts.reproduction", run_name="__main__", alter_sys=True)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: no such model: huge")
