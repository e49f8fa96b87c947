"""``sav-jax compare``: what it says about made-up results, and what it refuses to compare."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from results_folders import Made, write_results

from sav_jax.cli import main
from sav_jax.eval.compare import pair, paired_p, verdict
from sav_jax.eval.metrics import COMMON
from sav_jax.eval.statistics import holm
from sav_jax.eval.stored import Answered, Query, Results
from sav_jax.eval.tasks import TASKS

METHODS = {"zero-shot": 0.4, "sav": 0.9, "hec": 0.88}
ONE = Made(METHODS, shots=(5, 10))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*words: object) -> int:
    return main([str(word) for word in words])


def cells(output: str) -> list[dict[str, str]]:
    """The Markdown table as one dictionary per row."""
    lines = [line.strip("|").split("|") for line in output.splitlines() if line.startswith("|")]
    head = [cell.strip() for cell in lines[0]]
    return [dict(zip(head, (cell.strip() for cell in line), strict=True)) for line in lines[2:]]


def answered(right: list[int], group: str = "") -> Answered:
    queries = [Query(f"d{i}", f"i{i}", group and f"{group}{i // 2}", "", "?", "x") for i in range(len(right))]
    return Answered(tuple(queries), tuple("x" if r else "y" for r in right), np.array(right, bool), None)


# What it says


def test_methods_of_one_folder_against_a_baseline(capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_results(Path("a"), ONE)
    assert run("compare", folder, "--baseline", "sav", "--output", "out/compare.json") == 0
    output = capsys.readouterr().out
    rows = cells(output)
    assert [(row["shots"], row["method B"]) for row in rows] == [
        ("5", "zero-shot"),
        ("5", "hec"),
        ("10", "zero-shot"),
        ("10", "hec"),
    ]
    assert "A: sav, B: each other method, both in a (model: tiny)" in output
    assert "McNemar's exact test, two-sided; p (Holm): corrected for 4 comparisons" in output

    # The numbers again, from the files alone.
    written = json.loads(Path("out/compare.json").read_text())["comparisons"]
    exact = []
    for row, told in zip(written, rows, strict=True):
        text = (folder / f"samples_colours_{row['shots']}shot.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        right = {m: {r["doc_hash"]: r["acc"] for r in lines if r["filter"] == m} for m in ("sav", row["method_b"])}
        a, b = (np.array([right[m][digest] for digest in right["sav"]]) for m in ("sav", row["method_b"]))
        assert (row["only_a"], row["only_b"]) == (int((a > b).sum()), int((b > a).sum()))
        exact.append(scipy.stats.binomtest(row["only_b"], max(1, row["only_a"] + row["only_b"])).pvalue)
        assert row["difference"] == pytest.approx(b.mean() - a.mean(), abs=1e-12)
        assert row["ci"][0] <= row["difference"] <= row["ci"][1]
        assert told["metric"] == row["metric"] == "acc"
        assert told["A"] == f"{100 * a.mean():.1f}"
        assert (told["items"], told["seeds"]) == (str(len(a)), "1")
    assert [row["p"] for row in written] == pytest.approx(exact, rel=1e-9)
    assert [row["p_corrected"] for row in written] == pytest.approx(holm(exact), rel=1e-9)
    assert rows[0]["verdict"] == "sav is better than zero-shot"
    assert rows[1]["verdict"] == "no clear difference"


def test_two_folders_each_method_with_itself(capsys: pytest.CaptureFixture[str]) -> None:
    write_results(Path("a"), ONE)
    better = {"sav": 0.9, "zero-shot": 0.8, "knn": 0.5}
    write_results(Path("b"), dataclasses.replace(ONE, methods=better, model="larger", heads=None))
    assert run("compare", "a", "b") == 0
    output = capsys.readouterr().out
    rows = cells(output)
    assert [row["method"] for row in rows] == ["sav", "zero-shot"] * 2
    assert {row["verdict"] for row in rows if row["method"] == "zero-shot"} == {"B is better than A"}
    assert {row["verdict"] for row in rows if row["method"] == "sav"} == {"the same answers are right"}
    assert "A: a (model: tiny)\nB: b (model: larger)" in output
    assert "note: knn: only in b (colours, 5 shots; colours, 10 shots)" in output
    assert "note: hec: only in a (colours, 5 shots; colours, 10 shots)" in output

    assert run("compare", "b", "a", "--methods", "zero-shot") == 0
    assert {row["verdict"] for row in cells(capsys.readouterr().out)} == {"A is better than B"}
    assert run("compare", "a", "b", "--baseline", "hec", "--methods", "knn") == 0
    (row, _) = cells(capsys.readouterr().out)
    assert (row["method A"], row["method B"], row["verdict"]) == ("hec", "knn", "A is better than B")


def test_keys_differ_where_one_run_had_one_number_of_shots(capsys: pytest.CaptureFixture[str]) -> None:
    write_results(Path("a"), ONE)
    write_results(Path("b"), dataclasses.replace(ONE, shots=(10,)))
    assert run("compare", "a", "b") == 0
    output = capsys.readouterr().out
    assert [row["shots"] for row in cells(output)] == ["10"] * 3
    assert "note: zero-shot, sav, hec: only in a (colours, 5 shots)" in output


def test_several_seeds_are_compared_jointly_and_only_those_in_both(capsys: pytest.CaptureFixture[str]) -> None:
    write_results(Path("a"), dataclasses.replace(ONE, seeds=(0, 1, 2), shots=(5,)))
    write_results(Path("b"), dataclasses.replace(ONE, seeds=(2, 0), shots=(5,)))
    assert run("compare", "a", "--baseline", "zero-shot") == 0
    output = capsys.readouterr().out
    assert {row["seeds"] for row in cells(output)} == {"3"}
    assert "paired randomisation test" in output
    assert "McNemar" not in output
    assert run("compare", "a", "b") == 0
    output = capsys.readouterr().out
    assert {(row["seeds"], row["B - A"]) for row in cells(output)} == {("2", "+0.0")}
    assert "note: zero-shot, sav, hec: only seeds 0, 2 are in both (colours, 5 shots)" in output


def test_order_of_rows_does_not_matter_and_items_asked_twice_pair_up() -> None:
    a, b = answered([1, 0, 1, 1]), answered([0, 0, 1, 1])
    turned = Answered(b.queries[::-1], b.predictions[::-1], b.right[::-1], None)
    assert pair({0: a}, {0: turned}) == pair({0: a}, {0: b})
    twice = Answered((*a.queries, a.queries[0]), (*a.predictions, "x"), np.append(a.right, False), None)
    result = pair({0: twice}, {0: twice})
    assert (result.items, result.only_a, result.only_b, result.test) == (4, 0, 0, "sign flips")
    with pytest.raises(ValueError, match="not the same"):
        pair({0: a}, {0: twice})


def test_queries_of_a_group_are_no_independent_tosses() -> None:
    a, b = [1, 1, 0, 0] * 5 + [1] * 10, [1, 1, 1, 1] * 5 + [1] * 10
    alone, grouped = (pair({0: answered(a, group)}, {0: answered(b, group)}) for group in ("", "g"))
    assert (alone.test, grouped.test) == ("McNemar", "sign flips")
    assert alone.p == pytest.approx(2 * 0.5**10, rel=1e-9)  # 10 queries, all better under B
    # 5 groups of two: 2 of 2^5 choices of signs, with the spread of 10,000 random ones, four times.
    assert grouped.p == pytest.approx(2 * 0.5**5, abs=4 * np.sqrt(0.0625 / 10_000))
    assert grouped.difference.stderr > alone.difference.stderr


def test_verdicts() -> None:
    better = pair({0: answered([0, 0, 1])}, {0: answered([1, 1, 1])})
    assert verdict(better, 0.049, "x", "y") == "y is better than x"
    assert verdict(better, 0.05, "x", "y") == "no clear difference"
    assert verdict(pair({0: answered([1, 1])}, {0: answered([0, 1])}), 0.001, "x", "y") == "x is better than y"
    even = pair({0: answered([1, 0])}, {0: answered([0, 1])})
    assert verdict(even, 0.001, "x", "y") == "no clear difference"


# Metrics other than accuracy


def stored(
    targets: list[str],
    predictions: list[str],
    shares: list[float] | None = None,
    groups: list[str] | None = None,
    roles: list[str] | None = None,
) -> Answered:
    """Answers to binary queries, with the probability of "Yes"."""
    count = len(targets)
    queries = tuple(
        Query(f"d{i}", f"i{i}", groups[i] if groups else "", "", "?", targets[i], roles[i] if roles else "")
        for i in range(count)
    )
    probabilities = None if shares is None else np.array([[1 - p, p] for p in shares])
    right = np.array([t == p for t, p in zip(targets, predictions, strict=True)])
    return Answered(queries, tuple(predictions), right, probabilities, ("No", "Yes"))


AUROC = next(metric for metric in COMMON if metric.name == "auroc")


def test_areas_by_hand() -> None:
    targets = ["Yes", "Yes", "No", "No"]
    a = stored(targets, ["Yes"] * 4, [0.9, 0.4, 0.6, 0.1])  # 3 of 4 pairs in order
    b = stored(targets, ["Yes"] * 4, [0.9, 0.8, 0.7, 0.6])  # 4 of 4, with the same answers
    result = pair({0: a}, {0: b}, AUROC)
    assert (result.mean_a, result.mean_b, result.difference.mean) == (0.75, 1.0, 0.25)
    assert (result.metric, result.test, result.only_a, result.only_b) == ("auroc", "bootstrap", None, None)
    assert result.p == result.p_bootstrap
    # The pair out of order is the only difference: a resample has one if both its queries were drawn and defines the
    # areas if either class was. With n = 4 draws, P(some of two given) = 15/16 and so on by inclusion and exclusion.
    some_yes_and_no = 1 - 2 * (1 / 2) ** 4
    both = 1 - 2 * (3 / 4) ** 4 + (1 / 2) ** 4
    # Differences are never negative: p is twice the share of zeros, of those of the 10,000 that are defined.
    zero = 1 - both / some_yes_and_no
    assert result.p == pytest.approx(min(1, 2 * zero), abs=8 * np.sqrt(zero * (1 - zero) / 8750))
    assert verdict(result, 0.01, "x", "y") == "y is better than x"
    turned = pair({0: a}, {0: b.take(np.array([3, 1, 0, 2]))}, AUROC)
    assert turned == result, "queries are paired, not rows"


def test_areas_against_an_independent_bootstrap() -> None:
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    truth = np.arange(120) % 2
    shares = [np.clip(0.5 + gain * (truth - 0.5) + rng.normal(0, 0.25, 120), 0.01, 0.99) for gain in (0.2, 0.5)]
    names = [("No", "Yes")[t] for t in truth]
    groups = [f"g{i // 3}" for i in range(120)]
    a, b = (stored(names, names, of.tolist(), groups) for of in shares)
    result = pair({0: a}, {0: b}, AUROC)
    assert result.mean_a == pytest.approx(roc_auc_score(truth, shares[0]), abs=1e-12)
    assert result.mean_b == pytest.approx(roc_auc_score(truth, shares[1]), abs=1e-12)
    draws = []
    for _ in range(2000):  # whole groups with replacement
        rows = np.concatenate([np.arange(3 * g, 3 * g + 3) for g in rng.integers(0, 40, 40)])
        one, two = (roc_auc_score(truth[rows], of[rows]) for of in shares)
        draws.append(two - one)
    stderr = float(np.std(draws, ddof=1))
    # 2,000 resamples: a standard deviation within 1 / sqrt(4,000) = 1.6 %, a 95 % quantile within 2.67 / sqrt(2,000)
    # = 0.060 standard errors (0.027 with 10,000): four times either.
    assert result.difference.stderr == pytest.approx(stderr, rel=0.07)
    low, high = np.quantile(draws, [0.025, 0.975])
    assert (result.difference.low, result.difference.high) == pytest.approx((low, high), abs=4 * 0.066 * stderr)


def test_groups_by_hand() -> None:
    """Accuracy and group accuracy of NaturalBench may differ in sign."""
    (group,) = (metric for metric in TASKS["naturalbench"].metrics if metric.name == "g_acc")
    roles = ["q0i0", "q0i1", "q1i0", "q1i1"]
    truth = ["Yes", "No", "No", "Yes"]
    wrong = {"Yes": "No", "No": "Yes"}

    def said(errors: list[tuple[int, ...]]) -> Answered:
        """One group for each tuple, which has the places of wrong answers."""
        answers = [wrong[t] if i in of else t for of in errors for i, t in enumerate(truth)]
        groups = [f"g{g}" for g, _ in enumerate(errors) for _ in truth]
        names = [f"{g}/{role}" for g, _ in enumerate(errors) for role in roles]
        return stored(truth * len(errors), answers, None, groups, names)

    # A: all of ten groups have one error. B: seven groups are right, three wrong throughout.
    a, b = said([(0,)] * 10), said([()] * 7 + [(0, 1, 2, 3)] * 3)
    accuracy = pair({0: a}, {0: b})
    assert (accuracy.mean_a, accuracy.mean_b) == (0.75, 0.7)
    result = pair({0: a}, {0: b}, group)
    assert (result.mean_a, result.mean_b, result.only_a, result.only_b) == (0.0, 0.7, 0, 7)
    assert result.test == "McNemar", "one group is one toss"
    assert result.p == pytest.approx(2 * 0.5**7, rel=1e-12)
    # Means of ten draws of which each is one with probability 0.7: binomial quantiles 4 and 9 of 10.
    assert result.difference.ci == pytest.approx((0.4, 0.9 + 0.1), abs=1e-12)
    assert paired_p({0: a}, {0: b}, group) == result.p


def test_what_a_metric_does_not_apply_to() -> None:
    bare, sure = stored(["Yes", "No"], ["Yes", "No"]), stored(["Yes", "No"], ["Yes", "No"], [0.9, 0.1])
    with pytest.raises(ValueError, match="auroc does not apply"):
        pair({0: sure}, {0: bare}, AUROC)
    assert paired_p({0: sure}, {0: bare}, AUROC) is None


def test_the_task_is_compared_in_its_own_metric_too(capsys: pytest.CaptureFixture[str]) -> None:
    made = dataclasses.replace(ONE, methods={"zero-shot": 0.4, "sav": 0.9, "hec": 0.6}, shots=(5,))
    folder = write_results(Path("a"), made)
    rewrite(folder / "results.json", lambda c: c["sav_jax"]["tasks"]["colours"].update(metric="auroc"))
    assert run("compare", "a", "--baseline", "sav", "--output", "compare.json") == 0
    output = capsys.readouterr().out
    rows = cells(output)
    assert [(row["method B"], row["metric"]) for row in rows] == [
        ("zero-shot", "acc"),
        ("hec", "acc"),
        ("hec", "auroc"),
    ]
    assert "note: zero-shot: auroc cannot be compared, accuracy alone is (colours, 5 shots)" in output
    assert "paired bootstrap, which resolves no less than 0.0002" in output
    assert "corrected for 3 comparisons" in output
    answers = Results(folder).answers("colours")
    expected = pair({0: answers["sav", 0]}, {0: answers["hec", 0]}, AUROC)
    assert rows[2]["A"] == f"{100 * expected.mean_a:.1f}"
    written = json.loads(Path("compare.json").read_text())["comparisons"]
    assert [row["metric"] for row in written] == ["acc", "acc", "auroc"]
    assert [row["p_corrected"] for row in written] == pytest.approx(holm([row["p"] for row in written]))
    # A metric that this version does not know is said to be left out.
    rewrite(folder / "results.json", lambda c: c["sav_jax"]["tasks"]["colours"].update(metric="f2"))
    assert run("compare", "a", "--baseline", "sav") == 0
    assert "f2 cannot be compared" in capsys.readouterr().out


# What it refuses


def message(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line of a refusal."""
    assert run(*words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"pool": 78}, r" of 60 in a are missing in b, .* of 63 the other way round; were both run with the same data"),
        (
            {"prompt": "What colour?"},
            r"60 of 60 .*their prompts differ; 60 items of the same id differ: 60 in the quest",
        ),
        ({"version": 2, "prompt": "What?"}, r"their versions differ \(1 and 2\); their prompts differ"),
        (
            {"tasks": {"colours": ("red", "green", "cyan")}},
            r"their class lists differ; ([0-9]+) items .*: \1 in the label",
        ),
    ],
)
def test_other_items_are_refused(changes: dict[str, Any], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    one = dataclasses.replace(ONE, shots=(5,))
    write_results(Path("a"), one)
    write_results(Path("b"), dataclasses.replace(one, **changes))
    line = message(capsys, "compare", "a", "b", "--output", "compare.json")
    a, b = (
        {json.loads(row)["doc_hash"] for row in (Path(name) / "samples_colours.jsonl").read_text().splitlines()}
        for name in "ab"
    )
    assert f": {len(a - b)} of {len(a)} in a are missing in b, {len(b - a)} of {len(b)} the other way round" in line
    assert line.startswith("error: task colours, 5 shots, seed 0: the items are not the same: ")
    assert re.search(told, line), line
    assert not Path("compare.json").exists()


def test_questions_without_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    write_results(Path("a"), ONE)
    write_results(Path("b"), dataclasses.replace(ONE, tasks={"shapes": ("disc", "square")}))
    write_results(Path("c"), dataclasses.replace(ONE, methods={"sav": 0.9}, seeds=(4,)))
    assert "one folder: say with --baseline which method" in message(capsys, "compare", "a")
    assert "takes one or two results folders, not 3" in message(capsys, "compare", "a", "a", "a")
    assert "a: no method is called 'svm' (--baseline)" in message(capsys, "compare", "a", "--baseline", "svm")
    assert "c: no method is called 'hec' (--methods)" in message(capsys, "compare", "a", "c", "--methods", "hec")
    assert "nothing to compare: zero-shot, sav, hec: only in b" in message(capsys, "compare", "a", "b")
    assert "sav: no seed in common (colours, 5 shots" in message(capsys, "compare", "a", "c")
    assert "no other method was run" in message(capsys, "compare", "c", "--baseline", "sav")


def rewrite(file: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_damaged_results_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "a: is no folder of results" in message(capsys, "compare", "a", "--baseline", "sav")
    file = write_results(Path("a"), ONE) / "results.json"
    good = file.read_text()
    damages: list[tuple[Callable[[Any], None], str]] = [
        (lambda c: c.pop("sav_jax"), 'has no field "sav_jax"'),
        (lambda c: c["sav_jax"].pop("runs"), 'field "sav_jax.runs" is missing'),
        (lambda c: c["sav_jax"].update(runs=[]), 'field "sav_jax.runs" is empty'),
        (lambda c: c["sav_jax"]["runs"][1].pop("task"), 'field "sav_jax.runs[1].task" is missing'),
        (lambda c: c["sav_jax"]["runs"][1].update(shots="5"), 'field "sav_jax.runs[1].shots" is not a whole number'),
        (lambda c: c["sav_jax"]["runs"][0].update(seeds=["0"]), 'seeds" is no list of whole numbers'),
        (lambda c: c["sav_jax"]["runs"][0].update(key="../x"), "can be no part of a file name"),
        (lambda c: c["sav_jax"]["runs"][0].update(metric="f2"), "lacks 'f2'"),
        (lambda c: c["sav_jax"]["runs"][0]["metrics"]["acc"].update(mean=None), 'metrics.acc.mean" is not a number'),
        (lambda c: c["sav_jax"]["runs"][0]["metrics"]["acc"].update(ci=[1]), 'acc.ci" is neither null nor two numbers'),
        (lambda c: c["sav_jax"]["tasks"].pop("colours"), 'field "sav_jax.tasks.colours" is missing'),
        (lambda c: c["sav_jax"]["splits"].clear(), 'splits.colours_5shot.0.queries" is missing'),
    ]
    for damage, told in damages:
        file.write_text(good)
        rewrite(file, damage)
        line = message(capsys, "compare", "a", "--baseline", "sav")
        assert line.startswith("error: a/results.json: "), line
        assert told in line
    file.write_text(good[:1000])
    assert "a/results.json: is not JSON, perhaps cut short" in message(capsys, "compare", "a", "--baseline", "sav")
    file.unlink()
    assert "a/results.json: does not exist" in message(capsys, "compare", "a", "--baseline", "sav")


def test_damaged_answers_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    file = write_results(Path("a"), dataclasses.replace(ONE, shots=(5,))) / "samples_colours.jsonl"
    lines = file.read_text().splitlines(keepends=True)

    def changed(**fields: Any) -> str:
        return json.dumps(json.loads(lines[61]) | fields) + "\n"

    for row, told in (
        (lines[61][:40] + "\n", "row 62: is not JSON, perhaps cut short"),
        ("[]\n", "row 62: is not an object"),
        (changed(doc_hash=None), 'row 62: field "doc_hash" is not text'),
        (changed(acc=0.5), 'row 62: field "acc" is 0.5, neither 0 nor 1'),
        (changed(acc="1"), 'row 62: field "acc" is not a number'),
        (changed(target="mauve"), "row 62: field \"target\" is 'mauve', which is no label"),
        (changed(filtered_resps=[]), 'row 62: field "filtered_resps" is not one text in a list'),
        (changed(seed=0.5), 'row 62: field "seed" is not a whole number'),
        (changed(probabilities={"red": 1.0}), 'row 62: field "probabilities" is not one number for each label'),
        (changed(probabilities=None), 'method sav, seed 0: only 59 of 60 rows have the field "probabilities"'),
    ):
        file.write_text("".join([*lines[:61], row, *lines[62:]]))
        line = message(capsys, "compare", "a", "--baseline", "sav")
        assert line.startswith("error: a/samples_colours.jsonl"), line
        assert told in line
    # Cut short at the end of a row, all the rows of one method missing included.
    for kept, told in ((100, "holds 40 rows of method sav"), (120, "holds 0 rows of method hec")):
        file.write_text("".join(lines[:kept]))
        assert f"{told}, seed 0, where 60 queries were asked" in message(capsys, "compare", "a", "--baseline", "sav")
    file.write_bytes(b"\xff\xfe")
    assert "is not UTF-8 text" in message(capsys, "compare", "a", "--baseline", "sav")
    file.unlink()
    assert "does not exist; 'sav-jax eval' writes it (--log-samples)" in message(
        capsys, "compare", "a", "--baseline", "sav"
    )


def test_methods_without_predictions_have_nothing_to_compare(capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_results(Path("a"), dataclasses.replace(ONE, shots=(5,)))
    expected = {"mean": 1 / 3, "sd": None, "stderr": None, "ci": None, "per_seed": [1 / 3]}

    def add(content: Any) -> None:
        first = content["sav_jax"]["runs"][0]
        content["sav_jax"]["runs"].append(first | {"method": "chance", "metrics": {"acc": expected}})

    rewrite(folder / "results.json", add)
    assert Results(folder).runs[-1].primary.ci is None
    assert run("compare", "a", "--baseline", "sav") == 0
    assert "note: chance: no single answers in a (colours, 5 shots)" in capsys.readouterr().out
