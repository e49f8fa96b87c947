"""``sav-jax eval`` from end to end on a tiny random checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import Reference, picture

from sav_jax.cli import main
from sav_jax.eval.methods import METHODS

REFERENCE = "the random checkpoint"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAV_JAX_CACHE", str(shared))


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--tasks", "list"]) == 0
    assert any(line.startswith("digits ") for line in capsys.readouterr().out.splitlines())
    assert main(["eval", "--methods", "list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(METHODS)


@pytest.mark.usefixtures("workplace")
def test_every_prompt_is_run_once(reference: Reference, capsys: pytest.CaptureFixture[str], passes: list[int]) -> None:
    command = ["eval", "--model", str(reference.directory), "--tasks", "digits", "--num-heads", "5", "--limit", "20"]
    command += ["--max-new-tokens", "3"]
    first = [*command, "--shots", "1,2", "--seeds", "0,1", "--methods", "sav,chance", "--output-path", "first"]
    assert main(first) == 0
    printed = capsys.readouterr().out
    content = json.loads(Path("first/results.json").read_text())
    counted = content["sav_jax"]["passes"]
    asked = set()
    for key in ("digits_1shot", "digits_2shot"):
        rows = [json.loads(line) for line in Path(f"first/samples_{key}.jsonl").read_text().splitlines()]
        assert len(rows) == 2 * 20, "chance has no answers"
        asked |= {row["doc_hash"] for row in rows}
    # All pictures of the set differ: distinct prompts are distinct items, queries and support examples (2 * 10 at most
    # for either seed, of which some may be queries of the other).
    assert len(asked) < counted["prompts"] <= len(asked) + 40
    assert counted["forward"] == counted["prompts"] == sum(passes)
    assert f"forward passes: {counted['forward']} (distinct prompts: {counted['prompts']}, of which 0 were" in printed
    # More methods, other numbers of heads and a subset of the shots: nothing is run.
    passes.clear()
    more = [*command, "--shots", "2", "--seeds", "1,0", "--methods", "zero-shot,zero-shot-likelihood,sav,pixels"]
    assert main([*more, "--num-heads", "7", "--output-path", "more"]) == 0
    assert passes == []
    assert "forward passes: 0 (distinct prompts: " in capsys.readouterr().out
    again = json.loads(Path("more/results.json").read_text())
    assert again["task_hashes"] == {"digits": content["sav_jax"]["splits"]["digits_2shot"]["1"]["digest"]}
    # Exactly the same again gives the same files, but for the times.
    assert main([*first[:-1], "second"]) == 0
    for file in Path("first").rglob("*"):
        if file.is_file() and file.name != "results.json":
            assert file.read_bytes() == (Path("second") / file.relative_to("first")).read_bytes(), file


@pytest.mark.usefixtures("workplace")
def test_the_recipe_of_task_vectors(reference: Reference, capsys: pytest.CaptureFixture[str]) -> None:
    """What is asked for is what is run, is in the results, and is a search of its own."""
    command = [
        *("eval", "--model", str(reference.directory), "--tasks", "digits", "--shots", "1", "--limit", "4"),
        *("--max-new-tokens", "3", "--methods", "mtv", "--mtv-prompts", "3", "--output-path", "results"),
    ]
    # Ten examples at the end; four in a step; the queries, anew if other heads are replaced.
    for steps, searched in ((0, {10 + 4}), (1, {4 + 10, 4 + 10 + 4}), (0, {0})):
        assert main([*command, "--mtv-steps", str(steps)]) == 0
        content = json.loads(Path("results/results.json").read_text())
        recipe = content["config"]["mtv"]
        assert (recipe["prompts"], recipe["steps"], recipe["examples"]) == (3, steps, 4)
        assert content["sav_jax"]["passes"]["patched"] in searched
        assert content["sav_jax"]["passes"]["prompts"] <= 3
    assert "forward passes: 0 (" in capsys.readouterr().out.rpartition("| digits")[2]


@pytest.mark.usefixtures("workplace")
def test_eval_command(reference: Reference, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        *("eval", "--model", str(reference.directory), "--tasks", "digits", "--shots", "2", "--num-heads", "5"),
        *("--limit", "30", "--output-path", "results", "--seed", "1", "--max-new-tokens", "3", "--log-samples"),
    ]
    assert main(command) == 0
    printed = capsys.readouterr().out
    methods = ["chance", "zero-shot", "pixels", "sav-random", "sav"]
    assert [line.split("|")[2].strip() for line in printed.splitlines()[2:7]] == methods
    assert "digits, sav, 2 shots, seed 1: layer.head (of 20 examples right), best first: " in printed
    names = {str(path.relative_to("results")) for path in Path("results").rglob("*") if path.is_file()}
    assert {"heads_digits.png", "results.json", "samples_digits.jsonl"} < names
    content = json.loads(Path("results/results.json").read_text())
    assert content["results"]["digits"]["acc,chance"] == 0.1
    assert content["n-samples"] == {"digits": {"original": 1777, "effective": 30}}
    assert content["n-shot"] == {"digits": 2}
    assert content["config"]["random_seed"] == 1
    arguments = content["config"]["model_args"]
    assert arguments["name"] == str(reference.directory)
    assert len(arguments["fingerprint"]) == 64
    assert "size" in arguments["image_processor"]
    ours = content["sav_jax"]
    assert set(ours["heads"]["digits"]) == {"sav", "sav-random"}
    assert set(ours["curves"]["digits"]) == {"sav"}
    pictures = {name for row in ours["disagreements"]["digits"] for name in row["images"]}
    assert pictures == {name for name in names if name.startswith("images/")}
    samples = [json.loads(line) for line in Path("results/samples_digits.jsonl").read_text().splitlines()]
    assert len(samples) == 4 * 30
    assert all(row["pixel_limits"]["size"] == arguments["image_processor"]["size"] for row in samples)
    assert all(row["model_fingerprint"] == arguments["fingerprint"] and row["versions"]["jax"] for row in samples)
    for method in methods[1:]:
        right = [row["acc"] for row in samples if row["filter"] == method]
        assert content["results"]["digits"][f"acc,{method}"] == pytest.approx(sum(right) / 30)
    Path("results/earlier.txt").write_text("stays")
    Path("results/samples_digits_3shot.jsonl").write_text("{}\n")  # as of a run with several numbers of shots
    assert main([*command, "--methods", "sav,pixels", "--no-log-samples"]) == 0
    assert not list(Path("results").glob("samples_*")), "what stood there belongs to no results any more"
    assert "acc,sav-random" not in json.loads(Path("results/results.json").read_text())["results"]["digits"]
    assert Path("results/earlier.txt").exists()


@pytest.mark.usefixtures("workplace")
def test_a_task_of_two_files(reference: Reference, capsys: pytest.CaptureFixture[str]) -> None:
    for part, labels in (("train", "ab"), ("test", "ba"), ("other", "ac")):
        for label in labels:
            (Path(part) / label).mkdir(parents=True)
            for i in range(2):
                picture(20, 20, seed=hash((part, label, i)) % 1000).save(Path(part) / label / f"{i}.png")
    command = ["eval", "--model", str(reference.directory), "--train", "train", "--question", "What?", "--shots", "1"]
    command += ["--num-heads", "3", "--max-new-tokens", "3", "--methods", "sav"]
    assert main([*command, "--test", "test", "--output-path", "out"]) == 0
    content = json.loads(Path("out/results.json").read_text())
    assert content["n-samples"] == {"files": {"original": 4, "effective": 4}}
    capsys.readouterr()
    assert main([*command, "--test", "other"]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "other/c/0.png: field \"label\" is 'c', which no" in error


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--tasks", "digit"], "no task is called 'digit' (perhaps digits"),
        (["--methods", "sav,guess"], "no method is called 'guess'; there are: chance, "),
        (["--methods", ","], "no method is named"),
        (["--model", REFERENCE, "--methods", "sav", "--num-heads", "41"], "--num-heads is 41; there are 40 heads"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--shots", "500"], "fewer than --shots 500"),
        (["--shots", "5,many"], "--shots takes whole numbers separated by commas, not '5,many'"),
        (["--shots", "5,5"], "--shots names a number twice"),
        (["--seeds", ","], "--seeds names no number"),
        (["--seeds", "-1"], "seed must not be negative"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["--mtv-prompts", "0"], "--mtv-prompts must be at least 1"),
        (["--mtv-steps", "-1"], "--mtv-steps must be at least 0"),
        (["--test", "b.jsonl"], "needs --train"),
        (["--train", "a.jsonl", "--test", "b.jsonl"], "a.jsonl: no such file or folder"),
        (["--model", "./nowhere", "--methods", "chance"], "no such model"),
        (["--methods", "chance,siglip-few-shot"], "need a checkpoint: --siglip PATH"),
    ],
)
def test_eval_refuses(
    options: list[str], expected: str, reference: Reference, capsys: pytest.CaptureFixture[str], passes: list[int]
) -> None:
    options = [str(reference.directory) if word == REFERENCE else word for word in options]
    assert main(["eval", "--output-path", "results", *options]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert expected in errors[0]
    assert not Path("results").exists()
    assert not passes, "refused before anything is read"
