"""The command line on rows and folders of videos."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import Reference, picture
from videos import write_video

from sav_jax.cli import main
from sav_jax.headstore import read_head_array

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Folders of bright and of dark videos, five of each, that fade a little."""
    for label in ("bright", "dark"):
        folder = tmp_path / "clips" / label
        folder.mkdir(parents=True)
        for i in range(5):
            still = np.asarray(picture(26, 34, seed=i)) // 3
            base = still + np.uint8(130 if label == "bright" else 0)
            write_video(folder / f"{i}.mov", [base + np.uint8(4 * k) for k in range(9)])
    return tmp_path / "clips"


def write_rows(path: Path, numbers: range) -> Path:
    rows = [
        {"video": f"clips/{label}/{i}.mov", "question": "Is it day or night?", "label": label}
        for i in numbers
        for label in ("bright", "dark")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.fixture
def fitted(model: str, clips: Path) -> Path:
    train = write_rows(clips.parent / "train.jsonl", range(3))
    assert run("fit", "--model", model, "--train", train, "--output", "clf", "--num-heads", 5, "--frames", 3) == 0
    return Path("clf")


def test_fit_and_predict(fitted: Path, clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads((fitted / "classifier.json").read_text())["metadata"]["frames"] == 3
    data = write_rows(clips.parent / "test.jsonl", range(3, 5))
    assert run("predict", "--classifier", fitted, "--data", data, "--output", "p.jsonl") == 0
    predictions = [json.loads(line) for line in Path("p.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in predictions] == [row["label"] for row in predictions]
    # A folder of the same videos, the number of frames being said again.
    words = ("--classifier", fitted, "--data", clips, "--output", "q.jsonl")
    assert run("predict", *words, "--frames", 3) == 0
    of_folder = {row["id"]: row["votes"] for row in map(json.loads, Path("q.jsonl").read_text().splitlines())}
    assert len(of_folder) == 10
    for row, name in zip(predictions, ("bright/3", "dark/3", "bright/4", "dark/4"), strict=True):
        assert of_folder[f"{name}.mov"] == row["votes"]
    capsys.readouterr()
    assert run("predict", *words, "--frames", 4) == 2
    assert capsys.readouterr().err == "error: --frames is 4; clf was made with 3 frames of each video\n"


def test_a_classifier_of_pictures_says_nothing_of_frames(model: str, tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        picture(30, 30, seed=ord(label)).save(tmp_path / "photos" / label / "1.png")
    words = ("--train", tmp_path / "photos", "--question", "What?", "--output", "clf", "--num-heads", 5)
    assert run("fit", "--model", model, *words, "--frames", 3) == 0
    assert json.loads(Path("clf/classifier.json").read_text())["metadata"]["frames"] is None


def test_extract(model: str, clips: Path) -> None:
    data = write_rows(clips.parent / "rows.jsonl", range(1))
    heads = {}
    for frames in (None, 9, 2):
        words = () if frames is None else ("--frames", frames)
        assert run("extract", "--model", model, "--data", data, "--output", f"heads{frames}", *words) == 0
        heads[frames] = read_head_array(f"heads{frames}")[0]
    # Of nine frames, sixteen are nine.
    np.testing.assert_array_equal(heads[None], heads[9])
    assert np.abs(heads[9] - heads[2]).max() > 0.01


def test_eval(model: str, clips: Path) -> None:
    train, test = (write_rows(clips.parent / f"{i}.jsonl", range(i, i + 2)) for i in (0, 2))
    words = ("--train", train, "--test", test, "--methods", "chance,sav", "--shots", 2, "--num-heads", 5)
    hashes = set()
    for frames in (2, 3):
        assert run("eval", "--model", model, *words, "--frames", frames, "--output-path", f"r{frames}") == 0
        results = json.loads(Path(f"r{frames}/results.json").read_text())
        hashes.add(results["task_hashes"]["files"])
    assert len(hashes) == 2, "results with other frames must not be compared as equal tasks"


@pytest.mark.parametrize("content", [b"", b"rubbish", None])
def test_a_damaged_video_is_one_line_and_leaves_nothing(
    model: str, clips: Path, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write_rows(clips.parent / "train.jsonl", range(3))
    broken = clips / "dark" / "1.mov"
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2] if content is None else content)
    assert run("fit", "--model", model, "--train", train, "--output", "clf", "--num-heads", 5) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f'error: {train}:4: field "video": {broken} cannot be read: ')
    assert not Path("clf").exists()


def test_a_model_without_videos_is_refused(
    make_reference: Callable[..., Reference], clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(clips.parent / "rows.jsonl", range(1))
    assert run("extract", "--model", make_reference("llava").directory, "--data", data, "--output", "heads") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {data}:1: this model reads no videos ")
    assert not Path("heads").exists()


@pytest.mark.parametrize("frames", [0, -3])
def test_some_frame_must_be_shown(model: str, clips: Path, frames: int, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model", model, "--data", clips, "--question", "What?", "--output", "heads")
    assert run("extract", *words, "--frames", frames) == 2
    assert capsys.readouterr().err == f"error: --frames must be at least 1, not {frames}\n"
