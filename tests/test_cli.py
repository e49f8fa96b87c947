"""The command line from end to end on a tiny random checkpoint: what it writes, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from checkpoints import Reference, picture

from sav_jax import LMM, _commands, load, load_classifier
from sav_jax.cli import main
from sav_jax.headstore import read_head_array

SIZES = {"bright": (30, 34), "dark": (28, 30)}


pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Class folders of bright and dark pictures, six each."""
    for label, size in SIZES.items():
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(6):
            pixels = np.asarray(picture(*size, seed=i)) // 3
            image = PIL.Image.fromarray(pixels + (170 if label == "bright" else 0))
            image.save(tmp_path / "photos" / label / f"{i}.jpg")
    return tmp_path / "photos"


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(photos: Path, numbers: range) -> list[dict]:
    return [
        {"image": f"photos/{label}/{i}.jpg", "question": "Is it day or night?", "label": label, "id": f"{label}-{i}"}
        for i in numbers
        for label in SIZES
    ]


@pytest.fixture
def train(photos: Path) -> Path:
    return write_rows(photos.parent / "train.jsonl", rows_of(photos, range(4)))


@pytest.fixture
def queries(photos: Path) -> Path:
    return write_rows(photos.parent / "test.jsonl", rows_of(photos, range(3, 6)))


def run(*words: object) -> int:
    return main([str(word) for word in words])


# What it does


def test_fit_and_predict_on_rows(model: str, train: Path, queries: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fit", "--model", model, "--train", train, "--num-heads", 5, "--output", "deep/clf") == 0
    printed = capsys.readouterr().out
    assert "2 classes, 8 examples: bright (4), dark (4)" in printed
    assert "5 heads chosen of 40, best first:" in printed
    assert "8 of 8 right" in printed
    assert sorted(os.listdir("deep/clf")) == ["classifier.json", "classifier.safetensors"]
    described = json.loads(Path("deep/clf/classifier.json").read_text())
    assert described["metadata"]["question"] == "Is it day or night?"
    assert described["metadata"]["model"]["name"] == model

    command = ("predict", "--model", model, "--classifier", "deep/clf", "--data", queries)
    assert run(*command, "--output", "new/predictions.jsonl") == 0
    assert "accuracy 1.0000 (6 of 6 right)" in capsys.readouterr().out
    text = Path("new/predictions.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["id"] for row in rows] == [f"{label}-{i}" for i in range(3, 6) for label in SIZES]
    for row in rows:
        assert list(row) == ["id", "prediction", "votes", "probability", "label"]
        assert row["prediction"] == row["label"]
        assert set(row["votes"]) == set(SIZES)
        assert sum(row["votes"].values()) == 5
        assert row["probability"] == pytest.approx(row["votes"][row["prediction"]] / 5)

    # The same without a cache, to stdout, by the model's name in the classifier.
    assert run("predict", "--classifier", "deep/clf", "--data", queries, "--output", "-", "--no-cache") == 0
    captured = capsys.readouterr()
    assert captured.out == text
    assert "accuracy 1.0000" in captured.err
    assert "note:" not in captured.err

    # In another dtype, on demand: it is said.
    assert run(*command, "--output", "new/half.jsonl", "--dtype", "bfloat16") == 0
    assert (
        "note: deep/clf was made from heads in float32; in bfloat16 some answers may differ" in capsys.readouterr().err
    )


def test_fit_and_predict_on_folders(model: str, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("fit", "--model", model, "--train", photos, "--question", "What time is it?", "--output", "clf")
    assert run(*command, "--num-heads", 3, "--leave-one-out", "--vote", "confidence", "--shots-per-class", 4) == 0
    classifier = load_classifier("clf")
    assert classifier.leave_one_out
    assert (classifier.vote, classifier.shots_per_class, classifier.support) == ("confidence", 4, (4, 4))
    # The question comes from the classifier.
    assert run("predict", "--classifier", "clf", "--data", photos, "--output", "predictions.jsonl") == 0
    rows = [json.loads(line) for line in Path("predictions.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"{label}/{i}.jpg" for label in SIZES for i in range(6)]
    assert "accuracy" in capsys.readouterr().out
    (photos / "flat").mkdir()
    shutil.move(photos / "dark/0.jpg", photos / "flat/0.jpg")
    assert run("predict", "--classifier", "clf", "--data", photos / "flat", "--output", "flat.jsonl") == 0
    (row,) = [json.loads(line) for line in Path("flat.jsonl").read_text().splitlines()]
    assert "label" not in row
    assert "no labels to compare with" in capsys.readouterr().out


def test_a_classifier_of_low_layers_runs_only_those(
    model: str, train: Path, queries: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("fit", "--model", model, "--train", train, "--max-layer", 2, "--num-heads", 3, "--output", "clf") == 0
    depths: list[int] = []

    def spy(model: str, num_layers: int, **options: Any) -> LMM:
        depths.append(num_layers)
        return load(model, num_layers=num_layers, **options)

    monkeypatch.setattr(_commands, "load", spy)
    assert run("predict", "--classifier", "clf", "--data", queries, "--output", "out.jsonl") == 0
    assert depths == [load_classifier("clf").num_layers]
    assert depths[0] <= 2


def test_labels_that_the_classifier_does_not_know(
    model: str, train: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("fit", "--model", model, "--train", train, "--num-heads", 3, "--output", "clf")
    rows = [row | {"label": "dusk"} for row in rows_of(photos, range(2))] + rows_of(photos, range(2, 4))
    data = write_rows(photos.parent / "strange.jsonl", rows)
    capsys.readouterr()
    assert run("predict", "--classifier", "clf", "--data", data, "--output", "out.jsonl") == 0
    captured = capsys.readouterr()
    warnings = [line for line in captured.err.splitlines() if line.startswith("warning: ")]
    assert warnings == [
        "warning: 4 rows have labels that the classifier does not know and count as wrong, "
        f"the first being 'dusk' in {data}:1"
    ]
    assert "accuracy 0.5000 (4 of 8 right)" in captured.out


def test_extract(model: str, queries: Path) -> None:
    for output in ("one", "two"):
        assert run("extract", "--model", model, "--data", queries, "--output", output) == 0
    heads, rows, meta = read_head_array("one")
    assert heads.shape == (6, 4, 10, 4)
    assert [row["label"] for row in rows] == ["bright", "dark"] * 3
    assert meta["model"]["num_layers"] == 4
    files = sorted(path.relative_to("one") for path in Path("one").rglob("*") if path.is_file())
    assert all((Path("one") / name).read_bytes() == (Path("two") / name).read_bytes() for name in files)
    assert run("extract", "--model", model, "--data", queries, "--output", "low", "--num-layers", 2) == 0
    np.testing.assert_allclose(read_head_array("low")[0], heads[:, :2], atol=1e-5)


# What it refuses


def truncate(path: Path, part: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])


def replace_line(path: Path, number: int, line: str) -> None:
    lines = path.read_text().splitlines()
    lines[number - 1] = line
    path.write_text("\n".join(lines) + "\n")


BAD_ROWS: dict[str, tuple[Callable[[Path], object], str]] = {
    "malformed": (lambda path: replace_line(path, 3, '{"image": '), "train.jsonl:3: malformed JSON"),
    "no question": (lambda path: replace_line(path, 3, '{"label": "a"}'), 'train.jsonl:3: field "question" is missing'),
    "no label": (lambda path: replace_line(path, 3, '{"question": "a"}'), 'train.jsonl:3: field "label" is missing'),
    "empty": (lambda path: path.write_text(""), "train.jsonl: holds no rows"),
    "gone": (lambda path: path.unlink(), "train.jsonl: no such file or folder"),
    "one class": (
        lambda path: path.write_text(path.read_text().replace('"dark"', '"bright"')),
        "train.jsonl: a classifier needs examples of at least two classes; every label is 'bright'",
    ),
    "image gone": (
        lambda path: (path.parent / "photos/dark/1.jpg").unlink(),
        "train.jsonl:4: field \"image\" names 'photos/dark/1.jpg', which does not exist",
    ),
    "image truncated": (lambda path: truncate(path.parent / "photos/dark/1.jpg"), 'train.jsonl:4: field "image": '),
    "image header": (
        lambda path: (path.parent / "photos/dark/1.jpg").write_text("<html>"),
        'train.jsonl:4: field "image": ',
    ),
}


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run a command that must fail: status 2, one line on stderr, nothing left in the folder. Returns the line."""
    before = sorted(Path().rglob("*"))
    capsys.readouterr()
    assert run(*words) == 2
    captured = capsys.readouterr()
    # A progress bar, drawn with carriage returns, may have begun.
    errors = [line for line in captured.err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert captured.err.endswith(errors[0] + "\n")
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert sorted(Path().rglob("*")) == before
    return errors[0]


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_rows(model: str, train: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    damage, expected = BAD_ROWS[kind]
    damage(train)
    for command in (
        ("fit", "--num-heads", 3, "--train", train, "--output", "clf"),
        ("extract", "--data", train, "--output", "heads"),
    ):
        if command[0] == "extract" and kind in ("no label", "one class"):
            continue  # labels are not needed there
        assert expected in refused(capsys, *command, "--model", model)


def test_bad_rows_in_predict(model: str, train: Path, queries: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("fit", "--model", model, "--train", train, "--num-heads", 3, "--output", "clf")
    command = ("predict", "--classifier", "clf", "--data", queries, "--output", "out/predictions.jsonl")
    truncate(queries.parent / "photos/bright/5.jpg")
    assert 'test.jsonl:5: field "image": ' in refused(capsys, *command)
    replace_line(queries, 2, "[]")
    assert "test.jsonl:2: a JSON object is expected" in refused(capsys, *command)


def test_no_such_model(train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("fit", "--train", train, "--output", "clf", "--model")
    assert "no such model: ./nowhere" in refused(capsys, *command, "./nowhere")
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(capsys, *command, tmp_path / "empty")


def test_truncated_weights(
    reference: Reference, train: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in (0.9, 0.0001):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        shutil.copytree(reference.directory, tmp_path / "model")
        truncate(tmp_path / "model/model.safetensors", part)
        message = refused(capsys, "fit", "--model", tmp_path / "model", "--train", train, "--output", "clf")
        assert "model.safetensors" in message


def test_classifier_of_another_model(
    make_reference: Callable[..., Reference],
    model: str,
    train: Path,
    queries: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = make_reference(seed=1)
    run("fit", "--model", model, "--train", train, "--num-heads", 3, "--output", "clf")
    command = ("predict", "--classifier", "clf", "--data", queries, "--output", "out.jsonl")
    message = refused(capsys, *command, "--model", other.directory)
    assert f"clf was made with {model} (fingerprint " in message
    assert f", not with {other.directory} (fingerprint " in message


def test_a_mesh_that_does_not_fit_is_not_blamed_on_the_classifier(
    model: str, train: Path, queries: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("fit", "--model", model, "--train", train, "--num-heads", 3, "--output", "clf")
    command = ("predict", "--classifier", "clf", "--data", queries, "--output", "out.jsonl", "--mesh")
    assert refused(capsys, *command, "data=2") == "error: --mesh data=2 is of 2 devices; there are 8"
    assert refused(capsys, *command, "rows=8").startswith("error: --mesh takes sizes of data, fsdp, model")


def test_damaged_classifier(model: str, train: Path, queries: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("predict", "--classifier", "clf", "--data", queries, "--output", "out.jsonl")
    assert "clf: holds no classifier" in refused(capsys, *command)
    run("fit", "--model", model, "--train", train, "--num-heads", 3, "--output", "clf")
    truncate(Path("clf/classifier.safetensors"))
    assert "classifier.safetensors: damaged" in refused(capsys, *command)


def test_impossible_options(model: str, train: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit = ("fit", "--model", model, "--train", train, "--output", "clf")
    for options, expected in {
        ("--num-heads", 41): "--num-heads is 41; there are 40 heads to choose from",
        ("--num-heads", 0): "--num-heads is 0",
        ("--max-layer", 5): "--max-layer is 5",
        ("--max-layer", 1): "--num-heads is 20; there are 10 heads",
        ("--batch-size", 0): "--batch-size must be at least 1, not 0",
        ("--shots-per-class", 0): "at least 1, not 0",
        ("--seed", -1, "--shots-per-class", 2): "seed must not be negative",
        ("--train", photos): "--question must say",
        ("--output", train): "is a file; the output is a folder",
        ("--output", train / "clf"): "is a file",
    }.items():
        assert expected in refused(capsys, *fit, *options)
    out = ("predict", "--classifier", "clf", "--data", train, "--output", ".")
    assert "is a folder; the output is a file" in refused(capsys, *out)


@pytest.mark.parametrize("words", [["fit"], ["fit", "--model", "a", "--shots", "3"], ["guess"], []])
def test_bad_command_lines(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err


def test_interrupted(
    model: str, train: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_commands, "extract_heads", interrupt)
    assert run("fit", "--model", model, "--train", train, "--output", "clf") == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert os.listdir() == []


def test_reader_of_stdout_that_leaves() -> None:
    command = f"{sys.executable} -m sav_jax eval --tasks list --methods list | true"
    finished = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert finished.stderr == ""


# Help


@pytest.mark.parametrize("command", [[], ["fit"], ["predict"], ["extract"], ["eval"], ["compare"], ["report"]])
def test_help_teaches(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--help"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert f"Example: sav-jax {' '.join(command)}" in captured.out
    if command:
        assert captured.out.count("(default: ") + captured.out.count("(required)") >= (
            4 if command[0] == "compare" else 2 if command[0] == "report" else 8
        )


def test_help_is_quick() -> None:
    check = (
        "import sys; from sav_jax.cli import main; main(['--help']); "
        "heavy = {'jax', 'transformers', 'matplotlib', 'sklearn', 'tensorstore', 'numpy'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", check], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 1.5


@pytest.mark.usefixtures("elsewhere")
def test_outputs_never_take_the_place_of_the_users_data(
    reference: Reference, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "photographs"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        picture(30, 30).save(folder / name / "0.png")
    before = sorted(folder.rglob("*"))
    model = str(reference.directory)
    fit = ["fit", "--model", model, "--train", str(folder), "--question", "What?", "--num-heads", "2"]
    assert main([*fit, "--output", str(folder)]) == 2
    assert "holds other things" in capsys.readouterr().err
    clf = str(tmp_path / "clf")
    assert main([*fit, "--output", clf]) == 0
    assert main([*fit, "--output", clf]) == 0, "an earlier classifier is replaced"
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "What?", "image": "photographs/a/0.png"}\n')
    for data, output in ((rows, rows), (folder, folder / "a" / "0.png"), (folder, folder / "new.jsonl")):
        assert main(["predict", "--classifier", clf, "--data", str(data), "--output", str(output)]) == 2
        assert "choose another output" in capsys.readouterr().err
    assert rows.read_text().startswith('{"question"')
    assert sorted(folder.rglob("*")) == before
