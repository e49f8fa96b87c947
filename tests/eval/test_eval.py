"""Tasks, methods, results and pictures, and ``sav-jax eval`` from end to end on a tiny random checkpoint."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import PIL.Image
import pytest
from checkpoints import Reference, picture

from sav_jax import LMM, Example, SparseAttentionVectors, UserError, extract, generation
from sav_jax.cli import main
from sav_jax.eval.methods import METHODS, Features, Outcome, Settings
from sav_jax.eval.plots import head_map
from sav_jax.eval.results import Run, samples_jsonl, table
from sav_jax.eval.tasks import TASKS, Task, example_digest, from_files, split_task


def no_model() -> NoReturn:
    raise AssertionError("the model is not needed here")


def grey_task(per_class: int = 6) -> Task:
    """Dark, middle and bright squares with some noise."""
    rng = np.random.default_rng(0)
    examples = [
        Example(
            "How bright?",
            (PIL.Image.fromarray(rng.integers(level, level + 40, (8, 8, 3), dtype=np.uint8)),),
            label=name,
            id=f"{name}-{i}",
            source=f"grey[{i}]",
        )
        for i in range(per_class)
        for name, level in (("dark", 10), ("middle", 100), ("bright", 200))
    ]
    return Task("grey", "squares", lambda: (examples, None))


# Tasks


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    examples, queries = TASKS["digits"].load()
    assert queries is None
    data = load_digits()
    assert len(examples) == len(data.images) == 1797
    assert [example.label for example in examples] == [str(target) for target in data.target]
    assert {example.question for example in examples} == {"What digit is this?"}
    for i in (0, 1000, 1796):
        (image,) = examples[i].load_images()
        assert (image.mode, image.size) == ("RGB", (8, 8))
        pixels = np.asarray(image)
        assert (pixels == pixels[..., :1]).all()
        np.testing.assert_array_equal(np.round(pixels[..., 0] * (16 / 255)), data.images[i])


def test_split() -> None:
    split = split_task(TASKS["digits"], shots=20, seed=0)
    assert Counter(example.label for example in split.support) == dict.fromkeys("0123456789", 20)
    assert split.labels == tuple("0123456789")
    assert split.available == len(split.queries) == 1597
    assert not {example.id for example in split.support} & {example.id for example in split.queries}
    assert split == split_task(TASKS["digits"], shots=20, seed=0)
    assert split.digest != split_task(TASKS["digits"], shots=20, seed=1).digest


def test_fewer_shots_and_limits_are_part_of_more() -> None:
    many, few = (split_task(TASKS["digits"], shots, seed=3) for shots in (20, 5))
    assert {example.id for example in few.support} < {example.id for example in many.support}
    limited = split_task(TASKS["digits"], 20, seed=3, limit=50)
    assert limited.available == 1597
    ids = [example.id for example in many.queries]
    positions = [ids.index(example.id) for example in limited.queries]
    assert len(positions) == 50
    assert positions == sorted(positions)
    assert len({example.label for example in limited.queries}) == 10


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"shots": 7}, "task grey: class 'bright' has 6 examples, fewer than --shots 7"),
        ({"shots": 6}, "task grey: --shots 6 leaves no queries"),
        ({"shots": 0}, "at least 1, not 0"),
        ({"shots": 2, "limit": 0}, "--limit must be at least 1"),
        ({"shots": 2, "seed": -1}, "seed must not be negative"),
    ],
)
def test_impossible_splits(options: dict[str, int], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        split_task(grey_task(), **({"seed": 0} | options))


def test_task_of_two_files(tmp_path: Path) -> None:
    for part, labels in (("train", "ab"), ("test", "ba"), ("other", "ac")):
        for label in labels:
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(2):
                picture(20, 20, seed=i).save(tmp_path / part / label / f"{i}.png")
    task = from_files(tmp_path / "train", tmp_path / "test", "What?")
    split = split_task(task, 1, 0)
    assert (len(split.support), len(split.queries), split.labels) == (2, 4, ("a", "b"))
    with pytest.raises(UserError, match=r"other/c/0.png: field \"label\" is 'c', which no row of .*train has"):
        from_files(tmp_path / "train", tmp_path / "other", "What?")


def test_digest_depends_on_all_that_a_method_sees() -> None:
    dark, bright = PIL.Image.new("RGB", (2, 2)), PIL.Image.new("RGB", (2, 2), "white")
    variants = [
        Example("What?", (dark,), "a"),
        Example("Who?", (dark,), "a"),
        Example("What?", (dark,), "b"),
        Example("What?", (bright,), "a"),
        Example("What?", (dark, dark), "a"),
    ]
    assert len({example_digest(example) for example in variants}) == 5
    assert example_digest(Example("What?", (dark.copy(),), "a", id="7", source="x")) == example_digest(variants[0])


# Methods


@pytest.mark.filterwarnings("ignore:self.within_class_std_dev_ has at least 1 zero:UserWarning")  # white margins
def test_pixels_is_scikit_learns_nearest_centroid() -> None:
    from sklearn.neighbors import NearestCentroid

    split = split_task(TASKS["digits"], 20, 0)
    vectors = {
        part: np.stack([np.asarray(example.load_images()[0], np.float64).ravel() for example in examples])
        for part, examples in (("support", split.support), ("queries", split.queries))
    }
    model = NearestCentroid().fit(vectors["support"], [example.label for example in split.support])
    expected = model.predict(vectors["queries"])
    outcome = METHODS["pixels"].run(Features(no_model, split, Settings()))
    assert outcome.predictions == tuple(expected)


def test_pixels_of_several_sizes() -> None:
    sizes = [(100, 40), (20, 30), (64, 64), (500, 400)]
    examples = [
        Example("?", (PIL.Image.new("RGB", size, colour),), label=colour, source=str(size))
        for size in sizes
        for colour in ("black", "white")
    ]
    split = split_task(Task("sizes", "", lambda: (examples, None)), 2, 0)
    outcome = METHODS["pixels"].run(Features(no_model, split, Settings()))
    assert outcome.predictions == tuple(query.label for query in split.queries)
    texts = [Example("?", label=name, source=f"rows.jsonl:{i}") for i in range(2) for name in "ab"]
    split = split_task(Task("texts", "", lambda: (texts, None)), 1, 0)
    with pytest.raises(UserError, match=r"rows.jsonl:.: method pixels needs one image per example, not 0"):
        METHODS["pixels"].run(Features(no_model, split, Settings()))


def test_chance() -> None:
    split = split_task(grey_task(), 2, 0)
    outcome = METHODS["chance"].run(Features(no_model, split, Settings()))
    assert outcome == Outcome(None, accuracy=1 / 3)


def test_zero_shot_takes_the_likeliest_label() -> None:
    split = split_task(grey_task(), 2, 0)
    features = Features(no_model, split, Settings())
    scores = np.log(np.random.default_rng(0).random((len(split.queries), 3), np.float32))
    features.option_scores = scores
    outcome = METHODS["zero-shot"].run(features)
    assert outcome.predictions == tuple(split.labels[column] for column in scores.argmax(axis=1))
    assert outcome.probabilities is not None
    expected = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(outcome.probabilities, expected, rtol=1e-5)


def test_sav_reads_support_and_queries() -> None:
    split = split_task(grey_task(), 2, 0)
    rng = np.random.default_rng(0)
    features = Features(no_model, split, Settings(num_heads=4))
    features.heads = (
        rng.standard_normal((6, 2, 3, 4), dtype=np.float32),
        rng.standard_normal((12, 2, 3, 4), dtype=np.float32),
    )
    labels = [str(example.label) for example in split.support]
    expected = SparseAttentionVectors.fit(features.heads[0], labels, 4)
    outcome = METHODS["sav"].run(features)
    assert outcome.predictions == tuple(expected.predict(features.heads[1]))
    assert outcome.classifier is not None
    assert outcome.classifier.heads == expected.heads


# Results


def runs_of(methods: list[str]) -> list[Run]:
    task = grey_task()
    split = split_task(task, 2, 0)
    truth = tuple(str(query.label) for query in split.queries)
    probabilities = np.tile(np.array([0.5, 0.25, 0.25], np.float32), (len(truth), 1))
    outcomes = {
        "chance": Outcome(None, accuracy=1 / 3),
        "sav": Outcome(truth, probabilities),
        "pixels": Outcome(("dark",) * len(truth)),
    }
    return [Run(task, METHODS[name], split, outcomes[name], 0.1) for name in methods]


def test_table() -> None:
    assert table(runs_of(["chance", "sav", "pixels"]), 2).splitlines() == [
        "| task | method | shots | accuracy | stderr | queries |",
        "| ---- | ------ | ----: | -------: | -----: | ------: |",
        "| grey | chance |     0 |   0.3333 |        |      12 |",
        "| grey | sav    |     2 |   1.0000 | 0.0000 |      12 |",
        # sqrt(1/3 * 2/3 * 12/11 / 12) = sqrt(2/99)
        "| grey | pixels |     2 |   0.3333 | 0.1421 |      12 |",
    ]


def test_samples() -> None:
    rows = [json.loads(line) for line in samples_jsonl(runs_of(["chance", "sav", "pixels"])).splitlines()]
    assert [row["filter"] for row in rows] == ["sav"] * 12 + ["pixels"] * 12
    first = rows[0]
    assert first["doc_id"] == 0
    assert first["target"] == first["filtered_resps"][0] == first["resps"][0][0]
    assert first["acc"] == 1.0
    assert first["probabilities"] == {"bright": 0.5, "dark": 0.25, "middle": 0.25}
    assert sum(row["acc"] for row in rows[12:]) == 4
    assert len({row["doc_hash"] for row in rows}) == 12


@pytest.mark.parametrize(("layers", "heads", "k"), [(1, 1, 1), (4, 32, 5), (28, 28, 20)])
def test_head_map_is_a_picture_that_can_be_made_again(layers: int, heads: int, k: int) -> None:
    scores = np.random.default_rng(0).integers(0, 41, (layers, heads), np.int32)
    best = np.argsort(-scores.ravel(), kind="stable")[:k]
    classifier = SparseAttentionVectors(
        heads=tuple((int(i) // heads, int(i) % heads) for i in best),
        scores=scores,
        labels=("a", "b"),
        centroids=np.zeros((k, 2, 4), np.float32),
        support=(20, 20),
    )
    content = head_map(classifier, "A title")
    assert content == head_map(classifier, "A title")
    image = PIL.Image.open(io.BytesIO(content))
    assert image.format == "PNG"
    assert image.width > 900
    red = (np.asarray(image.convert("RGB")) == (0xE3, 0x1A, 0x1C)).all(axis=-1)
    assert red.any(), "the chosen heads are outlined"


# The command


REFERENCE = "the random checkpoint"


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAV_JAX_CACHE", str(tmp_path / "cache"))


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--tasks", "list"]) == 0
    assert capsys.readouterr().out.startswith("digits ")
    assert main(["eval", "--methods", "list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(METHODS)


@pytest.mark.usefixtures("workplace")
def test_eval_command(
    reference: Reference, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[tuple[str, int]] = []
    original = extract.run_batches

    def spy(model: LMM, step: Any, plans: Any, *rest: Any, **options: Any) -> Any:
        passes.append((options["what"], sum(len(plan.rows) for plan in plans)))
        return original(model, step, plans, *rest, **options)

    for module in (extract, generation):
        monkeypatch.setattr(module, "run_batches", spy)
    command = [
        *("eval", "--model", str(reference.directory), "--tasks", "digits", "--shots", "2", "--num-heads", "5"),
        *("--limit", "30", "--output-path", "results", "--seed", "1"),
    ]
    assert main(command) == 0
    # One pass for the heads of the model, one for the control's; answering takes one over the queries.
    assert passes == [("options", 30), ("heads", 50), ("heads", 50)]
    printed = capsys.readouterr().out
    assert [line.split("|")[2].strip() for line in printed.splitlines()[2:7]] == list(METHODS)
    assert "digits, sav: layer.head (of 20 examples right), best first: " in printed
    assert sorted(path.name for path in Path("results").iterdir()) == [
        "heads_digits.png",
        "results.json",
        "samples_digits.jsonl",
    ]
    content = json.loads(Path("results/results.json").read_text())
    assert content["results"]["digits"]["alias"] == "digits"
    assert content["results"]["digits"]["acc,chance"] == 0.1
    assert content["results"]["digits"]["acc_stderr,chance"] == "N/A"
    assert content["n-samples"] == {"digits": {"original": 1777, "effective": 30}}
    assert content["n-shot"] == {"digits": 2}
    assert content["config"]["model_args"]["name"] == str(reference.directory)
    assert set(content["sav_jax"]["heads"]["digits"]) == {"sav", "sav-random"}
    samples = [json.loads(line) for line in Path("results/samples_digits.jsonl").read_text().splitlines()]
    assert len(samples) == 4 * 30
    for method in ("zero-shot", "pixels", "sav-random", "sav"):
        right = [row["acc"] for row in samples if row["filter"] == method]
        assert content["results"]["digits"][f"acc,{method}"] == pytest.approx(sum(right) / 30)
    Path("results/earlier.txt").write_text("stays")
    assert main([*command, "--methods", "sav,pixels"]) == 0
    assert passes[3:] == [("heads", 0)], "everything was in the cache"
    assert "acc,sav-random" not in json.loads(Path("results/results.json").read_text())["results"]["digits"]
    assert Path("results/earlier.txt").exists()


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--tasks", "digit"], "no task is called 'digit'; there are: digits"),
        (["--methods", "sav,guess"], "no method is called 'guess'; there are: chance, "),
        (["--methods", ","], "no method is named"),
        (["--model", REFERENCE, "--methods", "sav", "--num-heads", "41"], "--num-heads is 41; there are 40 heads"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--shots", "500"], "fewer than --shots 500"),
        (["--train", "a.jsonl"], "needs both --train and --test"),
        (["--train", "a.jsonl", "--test", "b.jsonl"], "a.jsonl: no such file or folder"),
        (["--model", "./nowhere", "--methods", "sav"], "no such model"),
    ],
)
def test_eval_refuses(
    options: list[str], expected: str, reference: Reference, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [str(reference.directory) if word == REFERENCE else word for word in options]
    assert main(["eval", "--output-path", "results", *options]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert expected in errors[0]
    assert not Path("results").exists()
