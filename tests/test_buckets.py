"""Every command reads and writes buckets: the objects are the files of the same command on a disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from buckets import Buckets
from checkpoints import picture

from sav_jax.cli import main
from sav_jax.headstore import read_head_array

pytestmark = pytest.mark.usefixtures("elsewhere")

LABELS = ("day", "night")


@pytest.fixture
def rows(buckets: Buckets, tmp_path: Path) -> Path:
    """Labelled rows and their pictures, on a disk and, under the same names, in the bucket."""
    lines = []
    for i in range(12):
        picture(30, 34, seed=i).save(tmp_path / f"{i}.png")
        buckets.put("bucket", f"data/{i}.png", (tmp_path / f"{i}.png").read_bytes())
        lines.append(
            json.dumps({"image": f"{i}.png", "question": "Is it day or night?", "label": LABELS[i % 2]}) + "\n"
        )
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    buckets.put("bucket", "data/rows.jsonl", "".join(lines).encode())
    return tmp_path / "rows.jsonl"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(*words: object) -> int:
    return main([str(word) for word in words])


def test_the_same_bytes(
    model: str, rows: Path, buckets: Buckets, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """fit, predict and extract, from data in a bucket to results in it, with the features there, too."""
    there, here, said = "gs://bucket/", f"{rows.parent}/out/", []
    for root, data in ((here, rows), (there, f"{there}data/rows.jsonl")):
        monkeypatch.setenv("SAV_JAX_CACHE", f"{root}cache")
        given = ("--model", model, "--num-heads", 5)
        assert run("fit", *given, "--train", data, "--output", f"{root}clf") == 0
        assert (
            run("predict", "--classifier", f"{root}clf", "--data", data, "--output", f"{root}p/predictions.jsonl") == 0
        )
        assert run("extract", *given[:2], "--data", data, "--output", f"{root}heads") == 0
        said.append(capsys.readouterr().out.replace(root, ""))
    assert said[0] == said[1]
    for name in ("clf", "p", "heads", "cache/heads"):
        assert buckets.contents("bucket", name) == files_of(rows.parent / "out" / name), name
    np.testing.assert_array_equal(read_head_array(f"{there}heads")[0], read_head_array(f"{here}heads")[0])


def test_results_reports_and_comparisons(rows: Path, buckets: Buckets) -> None:
    """eval and report write to a bucket, and read from it as from a copy of it on a disk."""
    given = ("eval", "--train", "gs://bucket/data/rows.jsonl", "--shots", 3, "--methods", "chance,pixels")
    buckets.put("bucket", "results/samples_of-before.jsonl", b"{}")
    assert run(*given, "--output-path", "gs://bucket/results") == 0
    results = buckets.contents("bucket", "results")
    assert set(results) == {"results.json", "samples_files.jsonl"}
    assert [name for name in buckets.writes if name.startswith("bucket/results/")][-1] == "bucket/results/results.json"
    assert run(*given, "--output-path", rows.parent / "results") == 0
    assert results["samples_files.jsonl"] == (rows.parent / "results/samples_files.jsonl").read_bytes()

    assert run("report", "gs://bucket/results") == 0
    report = buckets.contents("bucket", "results/report")
    assert {"report.html", "report.md", "report.tex", "report.csv", "figure_0_confusion.svg"} <= set(report)
    assert run("compare", "gs://bucket/results", rows.parent / "results", "--output", "gs://bucket/compared.json") == 0
    [compared] = json.loads(buckets.contents("bucket")["compared.json"])["comparisons"]
    assert compared["difference"] == 0


def test_what_needs_a_disk_says_so(
    model: str, rows: Path, buckets: Buckets, capsys: pytest.CaptureFixture[str]
) -> None:
    fit, train = ("fit", "--train", rows, "--output", "clf"), ("train", "lora", "--model", model, "--data", rows)
    for words, problem in (
        ((*fit, "--model", "gs://bucket/model"), "gs://bucket/model: a model must lie on a local disk"),
        ((*train, "--output", "gs://bucket/run"), "gs://bucket/run: the output of training must lie on a local disk"),
        (
            ("eval", "--data-dir", "gs://bucket/d"),
            "gs://bucket/d: the folder of the benchmarks' files (--data-dir) must",
        ),
        ((*fit[:3], "--output", "gs://locked/clf", "--model", model), "gs://locked/clf: cannot be written: "),
        ((*fit[:3], "--output", "s3://bucket/clf", "--model", model), "s3://bucket/clf: not a path that is known here"),
        (("report", "gs://bucket/none"), "gs://bucket/none: is no folder of results"),
        (
            ("predict", "--classifier", "gs://bucket/none", "--data", rows, "--output", "-"),
            "gs://bucket/none: holds no cl",
        ),
        (
            ("predict", "--classifier", "clf", "--data", "gs://bucket/data", "--output", "gs://bucket/data/p.jsonl"),
            "gs://bucket/data/p.jsonl: is, or lies in, the data to be classified",
        ),
    ):
        assert run(*words) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(f"error: {problem}")
    assert not [name for name in buckets.objects["bucket"] if not name.startswith("data/")]
