"""The study: verdicts, differences, what is measured once, and the page."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
from scripts_loaded import imported

import sav_jax
from sav_jax.errors import UserError
from sav_jax.eval.metrics import COMMON
from sav_jax.eval.metrics import Answers as MetricAnswers
from sav_jax.eval.tasks.base import Item
from sav_jax.examples import Example

study = imported("reproduction.study")
page = imported("reproduction.page")
heads = imported("reproduction.heads")
rescoring = imported("reproduction.rescoring")
beyond = imported("reproduction.beyond")
savs = imported("reproduction.savs")
rivals = imported("reproduction.rivals")
tower = imported("reproduction.tower")
trained = imported("reproduction.trained")


def make_finding(claim: str = "Few beat all.", model: str = "tiny", **options: Any) -> Any:
    values = {
        "part": "savs",
        "source": "a paper, table 1",
        "setting": "digits, 20 shots",
        "values": {"few": 90.0, "all": 80.0},
        "difference": 10.0,
        "low": 5.0,
        "high": 15.0,
        "seeds": 3,
        **options,
    }
    return study.Finding(claim=claim, model=model, **values)


@pytest.fixture
def quiet(tmp_path: Path) -> Any:
    """A study in a folder of its own."""
    return study.Study(tmp_path / "out", pages=tmp_path / "pages", say=lambda _: None)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.1, 3.0, "holds"),
        (-3.0, -0.1, "does not hold"),
        (-1.0, 1.0, "undecided"),
        (0.0, 1.0, "undecided"),
        (-1.0, 0.0, "undecided"),
        (None, None, "undecided"),
    ],
)
def test_the_verdict_is_the_interval_s_sign(low: float | None, high: float | None, verdict: str) -> None:
    assert make_finding(low=low, high=high).verdict == verdict
    assert make_finding(difference=None, low=None, high=None).verdict == "not testable"


def answers(*seeds: Sequence[float]) -> Any:
    names = tuple(tuple(f"query {i}" for i in range(len(values))) for values in seeds)
    return study.Answers(tuple(np.array(values, float) for values in seeds), names)


def test_differences_are_means_over_tasks_in_points() -> None:
    right, wrong = answers([1, 1, 0, 1] * 25), answers([0, 1, 0, 1] * 25)
    longer = {"a": (right, wrong), "b": (answers([1] * 400), answers([1] * 400))}
    better, worse = ({task: sides[i] for task, sides in longer.items()} for i in (0, 1))
    assert study.difference({"a": right}, {"a": wrong}).mean == pytest.approx(25)
    found = study.difference(better, worse, margin=1)
    assert found.queries == 500
    assert found.mean == pytest.approx(12.5 + 1)  # every task counts alike, however many queries it has
    assert 1 < found.low < 13.5 < found.high
    with pytest.raises(ValueError, match="not the same"):
        study.difference({"a": right}, {"b": wrong})
    with pytest.raises(ValueError, match="the queries are not the same"):
        study.difference({"a": right}, {"a": answers([0, 1, 0])})


def test_a_mean_that_one_task_carries_says_so() -> None:
    """With what is left of it; not where the others are about as far ahead, or where there are only two tasks."""
    worse = {task: answers([0.0] * 40, [0.0] * 40) for task in "abc"}
    some, many = [1.0, 0.0, 0.0, 0.0] * 10, [1.0, 1.0, 1.0, 1.0] * 10
    one = {"a": answers(some, some), "b": answers(many, many), "c": answers([0.0] * 40, [0.0] * 40)}
    told = trained.carried(one, worse)
    assert told.startswith("On `b` the difference is +100.0; the mean of the others is +12.5 [")
    assert trained.carried({**one, "c": answers(many, many)}, worse) == ""
    assert trained.carried({task: one[task] for task in "bc"}, {task: worse[task] for task in "bc"}) == ""


def test_commands_run_once(quiet: Any, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import pathlib, sys\n"
        "folder = pathlib.Path(sys.argv[1]); folder.mkdir(parents=True, exist_ok=True)\n"
        "with (folder / 'runs').open('a') as file: file.write('x')\n"
        "print('half way')\n"
        "sys.exit('no such task' if sys.argv[2] == 'fail' else None)\n"
    )

    def runs(*arguments: str) -> str:
        folder = quiet.command("a/b", [study.OUTPUT, *arguments], script=str(script))
        return str((folder / "runs").read_text())

    assert runs("one") == "x"
    assert runs("one") == "x"
    assert runs("two") == "x"  # another command: nothing is left of the first
    record = quiet.output / "a" / "b.json"
    killed = json.loads(record.read_text()) | {"seconds": None}
    record.write_text(json.dumps(killed))
    assert runs("two") == "xx"  # a killed run of the same one goes on in its folder
    assert [command.split()[-1] for command, _ in quiet.commands()] == ["two"]
    moved = dataclasses.replace(quiet, output=quiet.output.rename(tmp_path / "moved"), kept_only=True)
    folder = moved.command("a/b", [study.OUTPUT, "two"], script=str(script))
    assert (folder / "runs").read_text() == "xx"  # the same command wherever its folder is
    with pytest.raises(UserError, match="a/b: not there, or of other settings"):
        moved.command("a/b", [study.OUTPUT, "three"], script=str(script))
    assert (folder / "runs").read_text() == "xx"  # nothing is touched
    moved.output.rename(quiet.output)
    with pytest.raises(UserError, match=r"fail: ended with 1: no such task \(all of it: .*b\.log\)"):
        runs("fail")
    assert quiet.commands() == []


def test_the_docs_keep_their_page_while_parts_are_missing(quiet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a fresh clone, where one part is measured."""
    monkeypatch.setattr(page, "ROOT", quiet.output.parent)
    monkeypatch.setattr(page, "module", lambda _: None)
    docs = dataclasses.replace(quiet, pages=quiet.output.parent / "docs")
    docs.pages.mkdir()
    (docs.pages / page.PAGE).write_text("all parts")
    (quiet.output.parent / "README.md").write_text(f"{page.START}\n{page.END}\n")
    docs.save("savs", [make_finding()], 1)
    assert page.write(docs) == quiet.output / page.PAGE
    assert (docs.pages / page.PAGE).read_text() == "all parts"
    assert "Few beat all" in (quiet.output / page.PAGE).read_text()
    assert "Few" not in (quiet.output.parent / "README.md").read_text()
    for part in page.PARTS:
        docs.save(part, [make_finding()], 1, complete=part != "aim")
    assert page.write(docs) == quiet.output / page.PAGE
    assert (quiet.output / page.PAGE).read_text().count("Not all rows of `tiny` and `tiny-qwen` are there") == 1
    docs.save("aim", [make_finding()], 1)
    assert page.write(docs) == docs.pages / page.PAGE
    assert "Few beat all" in (quiet.output.parent / "README.md").read_text()
    docs.save("aim", [], 1, complete=False)
    assert docs.findings("aim") == [make_finding()], "what was complete stays"


def test_results_are_computed_once(quiet: Any) -> None:
    calls: list[int] = []

    def compute() -> dict[str, tuple[float, ...]]:
        calls.append(1)
        return {"a": (1.0, 2.0)}

    for _ in range(2):
        assert quiet.kept("x/y", compute, limit=3) == {"a": [1.0, 2.0]}
    assert len(calls) == 1
    quiet.kept("x/y", compute, limit=4)
    assert len(calls) == 2
    looking = dataclasses.replace(quiet, kept_only=True)
    assert looking.kept("x/y", compute, limit=4) == {"a": [1.0, 2.0]}
    with pytest.raises(UserError, match="x/y: not there, or of other settings"):
        looking.kept("x/y", compute, limit=5)


def test_the_page_shows_every_claim(quiet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = "All heads beat few."
    quiet.save(
        "savs",
        [
            make_finding(queries=400),
            make_finding(model="tiny-qwen", note="Two seeds differ."),
            make_finding(failed, low=-4.0, difference=-3.0, high=-2.0),
            make_finding(failed, model="tiny-qwen", low=-1.0, difference=0.5, high=2.0),
        ],
        60.0,
    )
    table = study.Table("By task", ("task", "sav"), (("digits", "96.5"),), "In %.")
    part = SimpleNamespace(REASONS={failed: "Most heads say nothing."}, tables=lambda _: [table])
    monkeypatch.setattr(page, "module", lambda name: part if name == "savs" else None)
    text = page.write(quiet).read_text()
    assert "| Few beat all. | holds +10.0 [5.0, 15.0] | holds +10.0 [5.0, 15.0] |" in text
    assert f"| {failed} | **does not hold** -3.0 [-4.0, -2.0] | undecided +0.5 [-1.0, 2.0] |" in text
    assert "Of 4 rows: 2 holds, 1 does not hold, 1 undecided." in text
    assert "- `tiny-qwen`. Few beat all: Two seeds differ." in text
    assert f"Not shown on `tiny` and `tiny-qwen`: {failed[:-1]}. Most heads say nothing." in text
    assert "| digits | 96.5 |" in text
    assert "| +10.0 [5.0, 15.0] | 3 | 400 | holds |" in text
    assert "Not measured yet: `bash scripts/reproduce.sh --parts aim`." in text


@pytest.mark.parametrize(
    ("low", "high", "told"),
    [
        (5.0, 15.0, "+10.0 [5.0, 15.0]"),
        (0.04, 0.96, "+10.0 [0.04, 1.0]"),
        (-0.004, 0.049, "+10.0 [-0.004, 0.05]"),
        (0.0, 1.0, "+10.0 [0.0, 1.0]"),
        (None, None, "+10.0"),
    ],
)
def test_an_end_beside_0_is_told_from_0(low: float | None, high: float | None, told: str) -> None:
    assert page.shown(make_finding(low=low, high=high)) == told


def test_the_readme_s_table_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "module", lambda _: None)
    readme = f"before\n{page.START}\nformer\n{page.END}\nafter\n"
    found = {"savs": [make_finding(), make_finding(model="tiny-qwen", low=-1.0)]}
    new = page.with_summary(readme, found)
    assert new.startswith(f"before\n{page.START}\n| claim |")
    assert new.endswith(f"{page.END}\nafter\n")
    assert "| Few beat all. | holds +10.0 [5.0, 15.0] | undecided +10.0 [-1.0, 15.0] |" in new
    assert "former" not in new
    assert page.with_summary(new, found) == new


def made_draw(rng: np.random.Generator, seed: int = 0) -> tuple[Any, np.ndarray, np.ndarray]:
    """Two classes that some of twelve heads tell apart."""
    items = [Item(Example("?", (), "ab"[i % 2], id=str(i))) for i in range(60)]
    strength = np.linspace(0, 2, 12).reshape(3, 4, 1)
    offset = np.array([1.0 if item.label == "a" else -1.0 for item in items])[:, None, None, None]
    vectors = (rng.standard_normal((60, 3, 4, 5)) + strength * offset).astype(np.float32)
    names = tuple(str(i) for i in range(20, 60))
    draw = heads.Draw("made", seed, ("a", "b"), tuple(items[:20]), tuple(items[20:]), names)
    return draw, vectors[:20], vectors[20:]


def test_ballots_answer_as_classifiers_do() -> None:
    draw, support, queries = made_draw(np.random.default_rng(0))
    ballots = heads.Ballots.of(draw, support, queries)
    for number, depth in ((1, None), (4, None), (12, None), (4, 2)):
        classifier = sav_jax.SparseAttentionVectors.fit(support, draw.labels, number, max_layer=depth)
        wanted = [name == item.label for name, item in zip(classifier.predict(queries), draw.queries, strict=True)]
        chosen = ballots.best(number, depth)
        assert [(int(head) // 4, int(head) % 4) for head in chosen] == list(classifier.heads)
        assert ballots.right(chosen).tolist() == wanted


def test_sheets_keep_answers() -> None:
    sheet = heads.Sheet()
    values = [np.array([1.0, 0.0, 0.25]), np.array([0.0, 1.0])]
    for names, of in zip((["x", "y", "z"], ["x", "w"]), values, strict=True):
        sheet.start(names)
        sheet.add("some", of)
    kept = heads.answers(json.loads(json.dumps(sheet.content())), "some")
    assert [of.tolist() for of in kept.values] == [of.tolist() for of in values]
    assert kept.clusters == (("x", "y", "z"), ("x", "w"))
    sheet.add("other", values[0])
    with pytest.raises(ValueError, match="lacks a seed"):
        sheet.content()


def test_calibration_errors_are_those_of_the_results() -> None:
    rng = np.random.default_rng(1)
    given = rng.dirichlet([1, 1, 1], 50)
    truth = rng.integers(3, size=50)
    answer, labels = given.argmax(axis=1), ("a", "b", "c")
    items = tuple(Item(Example("?", (), labels[t], id=str(i))) for i, t in enumerate(truth))
    metric = next(metric for metric in COMMON if metric.name == "ece")
    draws = np.concatenate([np.ones((1, 50), int), rng.multinomial(50, np.full(50, 1 / 50), 3)])
    found = beyond.calibration_error((answer == truth).astype(float), given.max(axis=1), draws)
    whole = MetricAnswers(items, labels, tuple(labels[a] for a in answer), probabilities=given)
    wanted = [metric.compute(whole.take(np.repeat(np.arange(50), row))) for row in draws]
    np.testing.assert_allclose(found, np.array(wanted, float), rtol=1e-12)  # sums of 50 numbers


def test_a_calibration_interval_is_about_its_estimate() -> None:
    """Resamples of a well calibrated side have larger errors than it has: not the percentiles."""
    rng = np.random.default_rng(2)
    sure = rng.uniform(0.5, 1, 400)
    sides = {"good": sure, "bad": np.sqrt(sure)}
    right = (rng.uniform(size=400) < sure).astype(float)
    of_task = {
        "confidence": {kind: [(right.tolist(), given.tolist())] for kind, given in sides.items()},
        "sheet": {"clusters": [[str(i) for i in range(400)]]},
    }
    found = beyond.calibration_difference({"task": of_task}, ["task"], "good", "bad")
    assert found.low < found.mean < found.high
    assert found.queries == 400
    assert found.low > 0, "10 points worse on average"
    other = beyond.calibration_difference({"task": of_task}, ["task"], "bad", "good")
    np.testing.assert_allclose([other.mean, other.low, other.high], [-found.mean, -found.high, -found.low], rtol=1e-12)


def test_agreement_of_chosen_heads() -> None:
    assert rescoring.jaccard([1, 2, 3], [2, 3, 4]) == 0.5
    assert rescoring.agreement([[1, 2], [1, 2], [3, 4]]) == pytest.approx(1 / 3)
    assert rescoring.agreement([[1, 2], [3, 4]], [[1, 2], [1, 2]]) == 0.5
    assert rescoring.by_chance(20) == 1  # all of them
    # Of 96 heads twenty share 400 / 96 with another twenty on average. J = c / (40 - c) bends: half its second
    # derivative (0.0017) times c's variance (2.6) makes 0.0023; the mean of 2,000 draws has a standard error of 0.0011.
    assert rescoring.by_chance(96) == pytest.approx(400 / 96 / (40 - 400 / 96), abs=0.01)


def test_the_tower_alone_sees_images_and_no_questions(lmm: sav_jax.LMM) -> None:
    pictures = [PIL.Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    asked = [("What?", pictures[0]), ("Which of them?", pictures[0]), ("What?", pictures[1])]
    items = [Item(Example(question, (picture,))) for question, picture in asked]
    seen, read = tower.pooled(lmm, items)
    tolerance = 1e-6  # float32, in batches of other lengths
    np.testing.assert_allclose(seen[0], seen[1], atol=tolerance)
    np.testing.assert_allclose(read[0], read[2], atol=tolerance)
    assert np.abs(seen[0] - seen[2]).max() > 1e-3
    assert np.abs(read[0] - read[1]).max() > 1e-3
    np.testing.assert_allclose(np.linalg.norm(seen, axis=1), 1, atol=tolerance)


def test_nearest_means() -> None:
    support = np.array([[1.0, 0.1], [1.0, -0.1], [0.1, 1.0], [-0.1, 3.0]])
    found = tower.nearest_mean(support, np.array([0, 0, 1, 1]), np.array([[2.0, 1.0], [1.0, 2.0]]), 2)
    assert found.tolist() == [0, 1]


@pytest.fixture
def made_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A study whose heads are made by a rule and whose commands answer by lot: everything but models."""
    tasks = ("drawn-safety", "drawn-hallucination", "drawn-paired")
    monkeypatch.setattr(rescoring, "QUICK_TASKS", tasks)

    monkeypatch.setattr(study.Study, "limit", 40)

    def read(_: Any, lmm: Any, examples: Sequence[Example]) -> np.ndarray:
        rows = []
        for example in examples:
            rng = np.random.default_rng(sum(example.image_digests()[0].encode()) + len(example.question))
            sign = 1.0 if example.label in ("harmful", "hallucination", "yes") else -1.0
            rows.append(rng.standard_normal((12, 8, 4)) + sign * np.linspace(0, 1, 96).reshape(12, 8, 1))
        return np.array(rows, np.float32)

    def answered(folder: Path, method: str, asked: Sequence[str]) -> dict[str, Any]:
        rng = np.random.default_rng(len(method))
        return {task: answers(*rng.integers(2, size=(3, 60))) for task in asked}

    monkeypatch.setattr(heads, "read_examples", read)
    monkeypatch.setattr(rescoring, "read_examples", read)
    monkeypatch.setattr(study.Study, "load", lambda *_: None)
    monkeypatch.setattr(study.Study, "command", lambda self, name, *_, **__: self.output / name)
    monkeypatch.setattr(study.Study, "finished", lambda *_: True)
    for part in (rivals, savs, beyond):
        monkeypatch.setattr(part, "methods_of", answered)

    def tuned(run: Any, model: str, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """LoRA of its own task is always right, that of another one by lot."""
        rng = np.random.default_rng(0)
        found = {}
        for source, target in pairs:
            clusters = rescoring.rescored(run, model)[target]["sheet"]["clusters"]
            values = {
                f"lora of {target}": [" ".join("1" * len(names)) for names in clusters],
                f"lora of {source}": [" ".join(map(str, rng.integers(2, size=len(names)))) for names in clusters],
            }
            found[target] = {"sheet": {"clusters": clusters, "values": values}}
        return found

    monkeypatch.setattr(savs, "lora_elsewhere", tuned)
    monkeypatch.setattr(savs, "unreadable", lambda *_: "")

    def pooled(_: Any, items: Sequence[Item]) -> tuple[np.ndarray, np.ndarray]:
        vectors = read(None, None, [item.example for item in items]).reshape(len(items), -1)
        return vectors[:, :8], vectors[:, 8:20]

    monkeypatch.setattr(tower, "pooled", pooled)
    monkeypatch.setattr(beyond, "compute_shares", lambda *_: [(i + 1) / 12 for i in range(12)])
    return study.Study(tmp_path / "out", ("tiny",), (0, 1), True, tmp_path / "pages", lambda _: None)


def test_all_claims_get_a_row_and_a_place_on_the_page(made_study: Any) -> None:
    ahead: dict[str, float] = {}
    for name, part in (("savs", savs), ("beyond", beyond)):
        found = list(part.measure(made_study))
        ahead |= {finding.claim: finding.difference for finding in found}
        claims = [finding.claim for finding in found]
        assert len(set(claims)) == len(claims) > 9
        assert {*part.HEADLINES, *part.REASONS} <= set(claims)  # what is said of a claim is of one that is made
        for finding in found:
            if finding.verdict == "not testable":
                assert "the short form" in finding.note
                continue
            assert finding.low <= finding.difference <= finding.high, finding.claim
            assert finding.seeds >= 2
            assert finding.queries or "of the same heads" in finding.claim, finding.claim
        made_study.save(name, found, 1.0)
    # Later heads know more, and all of them harm, not which object it is: two seeds' Student's intervals are far wider.
    assert ahead["The chosen twenty heads beat twenty random ones."] > 0
    assert ahead["A control: harm is told better than arbitrary halves of the same objects."] > 20
    told: list[tuple[Any, Any]] = []
    whole = dataclasses.replace(made_study, quick=False)
    scores = rescoring.rescored(made_study, "tiny")
    savs.add_elsewhere(whole, "tiny", scores, lambda *of, **_: told.append(of[3:]))
    (_, (kept, lost)) = told  # nothing of heads that are alike, half of what LoRA had
    assert study.difference(kept, lost).low > 30
    text = page.write(made_study).read_text()
    assert "This is the quick form" in text
    for picture in ("heads", "shots", "transfer", "depth", "calibration"):
        assert f"(reproduction-{picture}.svg)" in text
        assert (made_study.pages / f"reproduction-{picture}.svg").stat().st_size > 1000
