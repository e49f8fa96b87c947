"""Tasks with free answers, from the split to the report."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from eval_made import made_features, no_model

import sav_jax
from sav_jax import Example, UserError
from sav_jax.cli import main
from sav_jax.eval.compare import MCNEMAR, SIGN_FLIPS, compare, compare_json, pair, table
from sav_jax.eval.features import Features
from sav_jax.eval.methods import METHODS, Method, Outcome, Settings
from sav_jax.eval.methods import icl as in_context
from sav_jax.eval.methods.asking import written
from sav_jax.eval.metrics import Answers, Units
from sav_jax.eval.report import write_report
from sav_jax.eval.run import Plan, evaluate
from sav_jax.eval.stored import Answered, Query, Results
from sav_jax.eval.tasks import TASKS, Data, Item, Split, Task, split_task
from sav_jax.eval.tasks.gqa import parse_gqa
from sav_jax.eval.tasks.scoring import CIDER, EXACT_MATCH, VIZWIZ_ACCURACY, VQA_ACCURACY, commonest
from sav_jax.generation import Generation
from sav_jax.reading import Readings

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


def coloured_items() -> tuple[Item, ...]:
    """Squares of three colours, each twice and a little different, of two groups."""
    items = []
    for i in range(12):
        name = list(COLOURS)[i % 3]
        picture = PIL.Image.new("RGB", (8, 8), tuple(value + i for value in COLOURS[name]))
        example = Example("Describe it.", (picture,), f"a {name} square", id=f"{name}-{i}", source=f"square {i}")
        items.append(Item(example, references=(f"a {name} square", f"the square is {name}"), group=f"g{i // 2}"))
    return tuple(items)


def coloured_task(**options: Any) -> Task:
    data = Data(coloured_items())
    fields: dict[str, Any] = {"metric": "cider", "metrics": (CIDER, EXACT_MATCH), "generative": True}
    return Task("squares", "describe squares", lambda _: data, **(fields | options))


def split_of(task: Task, shots: int = 3, seed: int = 0, limit: int | None = None) -> Split:
    return split_task(task, task.load(Path("nowhere")), shots, seed, limit)


def saying(name: str, say: Any, **options: Any) -> Method:
    """A method that writes what a function of a query says; it needs no model."""

    def run(features: Features) -> Outcome:
        return written(features, tuple(say(item) for item in features.split.queries))

    return Method(name, f"says {name}", run, generates=True, **options)


# Splits


def test_shots_are_counted_in_all() -> None:
    task = coloured_task()
    split = split_of(task)
    assert (len(split.support), split.labels) == (3, ())
    shown = {item.group for item in split.support}
    assert shown.isdisjoint(item.group for item in split.queries)
    assert len(split.queries) == 12 - 2 * len(shown) == split.available
    fewer = {item.example.id for item in split_of(task, 2).support}
    assert fewer < {item.example.id for item in split.support}, "fewer are part of more"
    with pytest.raises(UserError, match=r"^task squares: there are 12 examples to draw from, fewer than --shots 13$"):
        split_of(task, 13)


def test_other_references_are_other_items() -> None:
    task = coloured_task()
    items = [dataclasses.replace(item, references=(item.label,)) for item in coloured_items()]
    fewer = dataclasses.replace(task, load=lambda _: Data(tuple(items)))
    assert split_of(task).digest != split_of(fewer).digest


def test_leaks_are_refused() -> None:
    items = coloured_items()
    again = Data(items, tuple(dataclasses.replace(item, group="") for item in items))
    with pytest.raises(UserError, match=r"^task squares: 3 queries also stand in the support, same question"):
        split_task(coloured_task(), again, 3, 0)
    assert split_task(coloured_task(), again, 3, 0, allow_leak=True).leaked == 3


def test_a_limit_changes_no_score() -> None:
    """What words are rare is counted over all queries."""
    task = coloured_task()
    whole, part = split_of(task), split_of(task, limit=4)
    assert len(part.queries) == 4 < len(whole.queries)
    assert part.corpus == whole.corpus == tuple(item.references for item in whole.queries)


# Methods


def test_only_methods_that_write_are_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", "--model", "tiny", "--output-path", str(tmp_path / "out"), "--tasks", "drawn-vqa,digits"]
    assert main([*command, "--methods", "zero-shot,sav,knn"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error == (
        "error: --methods: sav, knn only choose among classes, and the answers to drawn-vqa are written freely; "
        "methods that write: " + ", ".join(name for name, method in METHODS.items() if method.generates)
    )
    assert not (tmp_path / "out").exists()
    assert {"zero-shot", "icl"} <= {name for name, method in METHODS.items() if method.generates}
    for name in ("chance", "pixels", "sav", "hec", "zero-shot-likelihood", "mtv"):
        assert not METHODS[name].generates


def test_lists_say_which_kind(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["tasks"], ["eval", "--tasks", "list"]):
        assert main(command) == 0
        kinds = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()}
        assert (kinds["digits"], kinds["drawn-captions"], kinds["pope"]) == ("classification", "generation", "group")
        assert {name for name, kind in kinds.items() if kind == "generation"} == {
            name for name, task in TASKS.items() if task.generative
        }
    assert main(["eval", "--methods", "list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    free = [line.split()[0] for line in listed if line.endswith(" (free answers, too)")]
    assert free == [name for name, method in METHODS.items() if method.generates]
    assert main(["tasks", "okvqa,digits"]) == 0
    cards = " ".join(capsys.readouterr().out.split())
    assert "kind generation: answers are written freely and scored against references" in cards
    assert "kind classification: the answer is one of the labels" in cards
    assert cards.count("and what all classification tasks have") == 1


def test_what_the_model_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries alone, or after demonstrations that show one of the references; no heads, and not the support."""
    task = coloured_task()
    split = split_of(task)
    asked: list[Example] = []

    def answers(_: Features, examples: Sequence[Example]) -> Readings:
        asked[:] = examples
        texts = tuple(Generation(f" a {i}\n", ()) for i in range(len(examples)))
        return Readings(("",) * len(examples), np.zeros((len(examples), 0, 0, 0)), np.zeros((1, 0)), texts, 0)

    monkeypatch.setattr(Features, "answers", answers)
    # What prompts cost is asked of a model.
    monkeypatch.setattr(in_context, "answered", lambda features, prompts: (features.answers(prompts), {}))
    features = made_features(split, task=task, settings=Settings(shots=3, demonstrations=2, seed=1))
    del features._universe.readings
    queries = [item.example for item in split.queries]
    zero = METHODS["zero-shot"].run(features)
    assert asked == queries
    assert zero.texts == tuple(f" a {i}\n" for i in range(len(queries)))
    assert zero.predictions == tuple(f"a {i}" for i in range(len(queries)))
    icl = METHODS["icl"].run(features)
    chosen = [next(item for item in split.support if item.example.id == name) for name in icl.facts["demonstrations"]]
    assert len(chosen) == 2
    shown = "".join(f"<image>\nDescribe it.\nAnswer: {item.label}\n\n" for item in chosen)
    assert [example.question for example in asked] == [f"{shown}<image>\nDescribe it.\nAnswer:"] * len(queries)
    pictures = tuple(image for item in chosen for image in item.example.images)
    assert [example.images for example in asked] == [pictures + query.images for query in queries]
    assert (icl.texts, icl.predictions) == (zero.texts, zero.predictions)


def test_the_bundled_model_describes_what_it_sees(tmp_path: Path) -> None:
    plan = Plan(shots=(4,), limit=16, max_new_tokens=16, log_samples=True)
    (summary,) = evaluate(
        lambda: sav_jax.load("tiny"), [TASKS["drawn-captions"]], [METHODS["zero-shot"]], plan, tmp_path / "out"
    )
    # Colours, sizes and places alone, without the shape's name, score about 2; 4.1 was measured on 30 queries.
    assert summary.metrics["cider"].mean > 2
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples_drawn-captions.jsonl").read_text().splitlines()]
    assert summary.metrics["cider"].mean == pytest.approx(np.mean([row["cider"] for row in rows]), rel=1e-12)
    assert summary.metrics["exact_match"].mean == np.mean(
        [row["filtered_resps"][0] in row["references"] for row in rows]
    )


# Metrics


def test_vqa_accuracies_of_written_answers() -> None:
    # Nine of ten when three agree: 3 * 2/3 + 7 of ten (tests/eval/test_task_metrics.py).
    item = Item(Example("What?"), references=("a can",) * 3 + ("tin",) * 7)
    answers = Answers((item,) * 4, (), ("The can.", "can", "a tin", "a can"))
    for metric, expected in ((VQA_ACCURACY, [0.9, 0.9, 1, 0.9]), (VIZWIZ_ACCURACY, [0, 0, 1, 0])):
        units = metric.compute(answers)
        assert isinstance(units, Units)
        # VizWiz' scorer normalises what is written, not what people said: "a can" is then met by nothing.
        np.testing.assert_allclose(units.values, expected, rtol=1e-12)
    exact = EXACT_MATCH.compute(answers)
    assert isinstance(exact, Units)
    assert exact.values.tolist() == [1, 1, 1, 1]
    assert commonest(item.references) == "tin"
    assert commonest(("b", "a", "a", "b")) == "b", "the first of equally common ones"


@pytest.mark.parametrize(("text", "answer"), [("No.", "no"), (" Yes\n", "yes"), ("a T-shirt..", "a t-shirt")])
def test_gqa_compares_as_llava(text: str, answer: str) -> None:
    assert parse_gqa(text) == answer


# Results, comparisons and reports, without a model


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two made methods on both drawn tasks, under two seeds."""
    output = tmp_path_factory.mktemp("free") / "results"
    knowing = saying("knowing", lambda item: item.references[0] if int(item.example.id) % 2 else "Large blue ring")
    guessing = saying("guessing", lambda item: " yes\n", uses_support=False)
    tasks = [TASKS["drawn-captions"], TASKS["drawn-vqa"]]
    plan = Plan(shots=(2, 4), seeds=(0, 1), limit=40)
    evaluate(no_model, tasks, [knowing, guessing], plan, output)
    return output


def test_what_is_stored(results: Path) -> None:
    content = json.loads((results / "results.json").read_text())
    assert content["configs"]["drawn-vqa_2shot"]["output_type"] == "generate_until"
    assert "doc_to_choice" not in content["configs"]["drawn-vqa_2shot"]
    assert content["higher_is_better"]["drawn-captions_2shot"] == {"cider": True, "exact_match": True}
    assert set(content["results"]["drawn-vqa_2shot"]) == {
        "alias",
        *(f"exact_match{of},{name}" for of in ("", "_stderr") for name in ("knowing", "guessing")),
    }
    assert content["sav_jax"]["tasks"]["drawn-vqa"]["kind"] == "generation"
    rows = [json.loads(line) for line in (results / "samples_drawn-vqa_2shot.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 2 * 40
    for row in rows:
        assert "acc" not in row
        assert row["exact_match"] == float(row["filtered_resps"][0] in row["references"])
    guessed = [row for row in rows if row["filter"] == "guessing"]
    assert {(row["resps"][0][0], row["filtered_resps"][0]) for row in guessed} == {(" yes\n", "yes")}
    run = next(
        run for run in content["sav_jax"]["runs"] if (run["key"], run["method"]) == ("drawn-vqa_2shot", "guessing")
    )
    assert run["metrics"]["exact_match"]["mean"] == np.mean([row["exact_match"] for row in guessed])
    low, high = run["metrics"]["exact_match"]["ci"]
    assert low < run["metrics"]["exact_match"]["mean"] < high
    assert set(run["subsets"]) == {"shape", "pair", "group", "glyph"}


def test_what_is_read_back(results: Path) -> None:
    stored = Results(results)
    assert stored.generative("drawn-captions")
    assert stored.graded("drawn-captions") == "cider"
    answered = stored.answers("drawn-captions_4shot")["knowing", 1]
    run = stored.run("drawn-captions", 4, "knowing")
    assert run is not None
    assert run.primary.per_seed[1] == pytest.approx(answered.scores.mean(), rel=1e-12)
    assert 0 < answered.scores.max() <= 10
    assert len(answered.queries[0].references) == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [({"cider": None}, '"cider" is not a number'), ({"references": "x"}, '"references" is not a list')],
)
def test_damaged_rows_are_named(results: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    name = "samples_drawn-captions_4shot.jsonl"
    (tmp_path / "results.json").write_bytes((results / "results.json").read_bytes())
    first, *others = (results / name).read_text().splitlines()
    (tmp_path / name).write_text("\n".join([first, json.dumps(json.loads(others[0]) | change), *others[1:], ""]))
    with pytest.raises(UserError, match=rf"{name} row 2: field {said}$"):
        Results(tmp_path).answers("drawn-captions_4shot")


def test_graded_answers_are_compared(results: Path) -> None:
    compared = compare(Results(results), None, baseline="guessing")
    assert [(row.task, row.shots, row.paired.metric) for row in compared.rows] == [
        (task, shots, metric)
        for task, metric in (("drawn-captions", "cider"), ("drawn-vqa", "exact_match"))
        for shots in (2, 4)
    ], "there is no accuracy"
    assert {row.verdict for row in compared.rows} == {"knowing is better than guessing"}
    assert not compared.notes
    assert "own metric, in % (cider: CIDEr-D times 100)" in table(compared)
    found = json.loads(compare_json(compared))["comparisons"][0]
    run = Results(results).run("drawn-captions", 2, "knowing")
    assert run is not None
    assert (found["metric"], found["mean_b"]) == ("cider", pytest.approx(run.primary.mean, rel=1e-12))


def test_graded_answers_are_tested_by_sign_flips() -> None:
    queries = tuple(Query(str(i), str(i), "", "", "?", "x") for i in range(6))
    a = Answered(queries, ("x",) * 6, np.array([0.0, 0.3, 0.9, 1, 1, 0]), None, graded="vqa_acc")
    b = Answered(queries, ("x",) * 6, np.array([0.5, 0.6, 1, 1, 0.9, 0]), None, graded="vqa_acc")
    paired = pair({0: a}, {0: b}, VQA_ACCURACY)
    assert (paired.test, paired.only_a, paired.only_b) == (SIGN_FLIPS, 1, 3)
    assert paired.difference.mean == pytest.approx(0.8 / 6)
    # Of the 16 choices of signs of 0.5, 0.3, 0.1 and -0.1 these sums are as large: 0.8 (two), 1.0, and their opposites.
    assert paired.p == pytest.approx(6 / 16, abs=4 * np.sqrt(6 / 16 * 10 / 16 / 10_000))
    one, other = dataclasses.replace(a, scores=np.round(a.scores)), dataclasses.replace(b, scores=np.ceil(b.scores))
    right = pair({0: one}, {0: other}, VQA_ACCURACY)
    assert right.test == MCNEMAR, "right or wrong is all there is"


def test_the_report_shows_what_was_written(results: Path, tmp_path: Path) -> None:
    files = write_report([Results(results)], tmp_path)
    assert [name for name in files if name.endswith(".svg")] == ["figure_shots.svg"], "no pictures of classes or heads"
    page = (tmp_path / "report.html").read_text()
    for part in (
        "<h1>Few-shot evaluation with no model</h1>",
        "Answers are written freely.",
        "Answers of knowing under the first seed, from the worst to the best at even steps.",
        "Large blue ring",
        "Parts of the data, 2 shots: CIDEr-D times 100",
        "Parts of the data, 4 shots: exact match in percent",
        "with 2 and 4 labelled examples and",
    ):
        assert part in page, part
    for part in ("per class", "classes", "Confusions", "Confidence"):
        assert part not in page, part
    text = (tmp_path / "report.md").read_text()
    assert "drawn-captions, 4 shots: knowing is highest with CIDEr-D " in text
    assert "CIDEr-D is shown times 100" in text
    assert "drawn-vqa, 4 shots: knowing is highest with exact match " in text


def test_reports_mix_both_kinds(tmp_path: Path) -> None:
    def first(features: Features) -> Outcome:
        return written(features, tuple(item.label for item in features.split.queries))

    method = Method("first", "says the answer", first, generates=True)
    plan = Plan(shots=(2,), limit=20)
    evaluate(no_model, [TASKS["drawn-vqa"], TASKS["drawn-hallucination"]], [method], plan, tmp_path / "out")
    write_report([Results(tmp_path / "out")], tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert "2 classes: hallucination, non-hallucination." in page
    assert "Answers are written freely." in page
    assert "with 2 labelled examples per class (in all, where answers are free)" in page
    text = (tmp_path / "report" / "report.md").read_text()
    assert "drawn-vqa, 2 shots: first is highest" in text
    assert "drawn-hallucination, 2 shots per class: first is highest" in text


def test_nothing_is_written_about_without_samples(tmp_path: Path) -> None:
    plan = Plan(shots=(2,), limit=10, log_samples=False)
    evaluate(no_model, [TASKS["drawn-vqa"]], [saying("one", lambda item: "1")], plan, tmp_path / "out")
    write_report([Results(tmp_path / "out")], tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Single answers were not written (--log-samples): examples of them are left out." in page
