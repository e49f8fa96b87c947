"""Summaries over seeds, the table, the files and the picture of heads."""

from __future__ import annotations

import dataclasses
import io
import json
from typing import Any

import numpy as np
import PIL.Image
import pytest
from eval_made import grey_items, grey_split, grey_task, made_features

from sav_jax import SparseAttentionVectors
from sav_jax.eval.disagreements import disagreements
from sav_jax.eval.methods import METHODS, Outcome
from sav_jax.eval.metrics import Answers, Metric, Units
from sav_jax.eval.plots import head_map
from sav_jax.eval.results import Run, Summary, make_run, results_json, summarise, table
from sav_jax.eval.samples import samples_jsonl
from sav_jax.eval.tasks import Task


def run_of(method: str, seed: int = 0, wrong: int = 0, task: Task | None = None, **options: Any) -> Run:
    """A run whose first ``wrong`` answers are wrong."""
    split = dataclasses.replace(grey_split(seed=seed), leaked=0)
    truth = [item.label for item in split.queries]
    others = {"dark": "middle", "middle": "bright", "bright": "dark"}
    predictions = tuple(others[label] for label in truth[:wrong]) + tuple(truth[wrong:])
    outcome = Outcome(None, accuracy=1 / 3) if method == "chance" else Outcome(predictions, **options)
    features = made_features(split, task=task, settings=None)
    features.settings = dataclasses.replace(features.settings, seed=seed)
    names = tuple(item.example.id for item in split.queries)
    return make_run(features, METHODS[method], outcome, names, 0.5, None)


def summary_of(method: str, wrong: tuple[int, ...] = (0,), **options: Any) -> Summary:
    return summarise("grey", [run_of(method, seed, count, **options) for seed, count in enumerate(wrong)])


def test_table_of_one_seed() -> None:
    text = table([summary_of("chance"), summary_of("sav"), summary_of("pixels", (8,))]).splitlines()
    assert [line.split("|")[1:6] for line in text] == [
        [" task ", " method ", " shots ", " metric ", "  value "],
        [" ---- ", " ------ ", " ----: ", " ------ ", " -----: "],
        [" grey ", " chance ", "     0 ", " acc    ", " 0.3333 "],
        [" grey ", " sav    ", "     2 ", " acc    ", " 1.0000 "],
        [" grey ", " pixels ", "     2 ", " acc    ", " 0.3333 "],
    ]
    # sqrt(1/3 * 2/3 * 12/11 / 12) = sqrt(2/99), the standard error that lmms-eval prints
    assert text[4].split("|")[6] == " 0.1421 "
    assert text[2].split("|")[6:8] == [" " * 8, " " * 15]
    assert "sd of seeds" not in text[0]


def test_methods_without_support_are_told_apart_only_where_their_queries_differ() -> None:
    def at(shots: int, method: str, queries: int) -> Summary:
        run = run_of(method)
        return summarise(f"grey_{shots}", [dataclasses.replace(run, shots=shots, names=run.names[:queries])])

    same = table([at(2, "chance", 9), at(2, "sav", 9), at(4, "chance", 9), at(4, "sav", 9)])
    cells = [[cell.strip() for cell in line.split("|")[2:4]] for line in same.splitlines()[2:]]
    assert cells == [["chance", "0"], ["sav", "2"], ["sav", "4"]]
    other = table([at(2, "chance", 9), at(2, "sav", 9), at(4, "chance", 8), at(4, "sav", 8)])
    lines = other.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[2:4]] for line in lines[2:6]]
    assert cells == [["chance", "0 (2)"], ["sav", "2"], ["chance", "0 (4)"], ["sav", "4"]]
    assert lines[-1] == "0 (4): no labelled example seen, queries as 4 per class leave them"


def test_means_over_seeds() -> None:
    summary = summary_of("sav", (0, 6))
    estimate = summary.metrics["acc"]
    assert estimate.per_seed == (1.0, 0.5)
    assert estimate.mean == 0.75
    np.testing.assert_allclose(estimate.sd or 0, np.std([1, 0.5], ddof=1))
    assert estimate.ci is not None
    low, high = estimate.ci
    assert low < 0.75 < high
    row = table([summary]).splitlines()[2].split("|")
    assert row[5] == " 0.7500 "
    assert row[8].strip() == "0.3536"


def test_scores_become_probabilities_by_the_left_out_support() -> None:
    split = grey_split()
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((len(split.queries), 3))
    support_scores = rng.standard_normal((len(split.support), 3))
    run = run_of("sav", scores=scores, support_scores=support_scores)
    assert run.temperature is not None
    assert run.answers is not None
    expected = np.exp(scores / run.temperature)
    expected /= expected.sum(axis=1, keepdims=True)
    assert run.answers.probabilities is not None
    np.testing.assert_allclose(run.answers.probabilities, expected, rtol=0, atol=1e-12)
    assert run_of("sav", scores=scores).temperature == 1.0
    assert run_of("sav").temperature is None
    metrics = summarise("grey", [run]).metrics
    assert {"acc", "macro_f1", "auroc", "ece", "brier", "log_loss", "aurc"} == set(metrics)


def test_a_task_may_have_metrics_and_a_primary_one_of_its_own() -> None:
    def pairs(answers: Answers) -> Units:
        return Units(np.array([0.0, 1.0]), ("a", "b"))

    def yes(answers: Answers) -> float:
        return float(np.mean([prediction == "dark" for prediction in answers.predictions]))

    own = (Metric("pairs", "", pairs), Metric("dark_ratio", "", yes))
    items = tuple(dataclasses.replace(item, subset=item.label) for item in grey_items())
    task = dataclasses.replace(grey_task(), metrics=own, metric="dark_ratio")
    del items
    summary = summary_of("sav", (0, 0), task=task)
    assert summary.primary == "dark_ratio"
    assert summary.metrics["pairs"].mean == 0.5
    estimate = summary.metrics["dark_ratio"]
    np.testing.assert_allclose(estimate.mean, 1 / 3)
    assert estimate.ci is not None, "the metric that is looked at has an interval, mean or not"
    assert estimate.ci[0] < 1 / 3 < estimate.ci[1]
    assert summary.metrics["macro_f1"].ci is None
    auroc = dataclasses.replace(grey_task(), metric="auroc")
    assert summary_of("sav", task=auroc).primary == "acc", "the method has no probabilities"


def test_subsets() -> None:
    run = run_of("sav", wrong=3)
    assert run.answers is not None
    items = tuple(dataclasses.replace(item, subset=item.label) for item in run.answers.items)
    run = dataclasses.replace(run, answers=dataclasses.replace(run.answers, items=items))
    subsets = summarise("grey", [run]).subsets
    assert list(subsets) == ["bright", "dark", "middle"]
    # Each class has four queries, and of the first three queries one is of each class.
    assert {name: values["acc"] for name, values in subsets.items()} == dict.fromkeys(subsets, 0.75)


def test_samples() -> None:
    scores = np.log(np.tile([0.5, 0.25, 0.25], (12, 1)))
    summaries = [summary_of("chance"), summary_of("sav", (0, 2), scores=scores), summary_of("pixels", (8,))]
    rows = [json.loads(line) for line in samples_jsonl(summaries).splitlines()]
    assert [(row["filter"], row["seed"]) for row in rows] == [("sav", 0)] * 12 + [("sav", 1)] * 12 + [
        ("pixels", 0)
    ] * 12
    first = rows[0]
    assert first["doc_id"] == 0
    assert first["shots"] == 2
    assert first["target"] == first["filtered_resps"][0] == first["resps"][0][0]
    assert first["acc"] == 1.0
    assert first["probabilities"] == {"bright": 0.5, "dark": 0.25, "middle": 0.25}
    assert "probabilities" not in rows[-1]
    assert [sum(row["acc"] for row in part) for part in (rows[:12], rows[12:24], rows[24:])] == [12, 10, 4]
    assert len({row["doc_hash"] for row in rows[:12]}) == 12
    texts = tuple(f"said {i}" for i in range(12))
    said = [json.loads(line) for line in samples_jsonl([summary_of("zero-shot", texts=texts)]).splitlines()]
    assert [row["resps"] for row in said] == [[[text]] for text in texts]
    assert "demonstrations" not in said[0]
    (run,) = summary_of("icl", texts=texts).runs
    shown = dataclasses.replace(run, outcome=dataclasses.replace(run.outcome, facts={"demonstrations": ["a-3", "b-0"]}))
    rows = [json.loads(line) for line in samples_jsonl([summarise("grey", [shown])]).splitlines()]
    assert all(row["demonstrations"] == ["a-3", "b-0"] for row in rows)


def test_results_json_has_lmms_evals_keys() -> None:
    summaries = [summary_of("chance"), summary_of("sav", (0, 6))]
    content = json.loads(
        results_json(
            summaries, {"limit": None}, {"name": "m"}, {"start_time": "now"}, {"passes": {}}, {"all": ("grey",)}
        )
    )
    assert content["results"]["grey"]["alias"] == "grey"
    assert content["results"]["grey"]["acc,sav"] == 0.75
    assert content["results"]["grey"]["acc_stderr,chance"] == "N/A"
    for name in ("configs", "versions", "n-shot", "higher_is_better", "n-samples", "task_hashes"):
        assert set(content[name]) == {"grey"}
    assert content["n-samples"]["grey"] == {"original": 12, "effective": 12}
    assert content["config"]["model_args"] == {"name": "m"}
    assert content["group_subtasks"] == {"all": ["grey"]}
    ours = content["sav_jax"]
    assert ours["groups"] == {
        "all": {"2 shots, chance": {"mean": 1 / 3, "tasks": 1}, "2 shots, sav": {"mean": 0.75, "tasks": 1}}
    }
    assert [run["method"] for run in ours["runs"]] == ["chance", "sav"]
    assert ours["runs"][1]["metrics"]["acc"]["per_seed"] == [1.0, 0.5]
    assert ours["splits"]["grey"]["0"]["support"] == 6
    assert set(ours["versions"]) >= {"python", "jax", "transformers"}


def test_disagreements_are_the_queries_with_the_most_divided_votes() -> None:
    split = grey_split(per_class=20)
    rng = np.random.default_rng(0)
    labels = [split.labels.index(item.label) for item in (*split.support, *split.queries)]
    heads = rng.standard_normal((3, 2, 3, 8)).astype(np.float32)[labels]  # every head is always right,
    noisy = [len(split.support) + i for i in (3, 7, 11)]  # but on these queries, where each has its own opinion
    heads[noisy] = rng.standard_normal(heads[noisy].shape)
    features = made_features(split, heads)
    outcome = METHODS["sav"].run(features)
    names = tuple(item.example.id for item in split.queries)
    run = make_run(features, METHODS["sav"], outcome, names, 0.0, None)
    rows, pictures = disagreements(run, features, "grey")
    assert {row["doc_id"] for row in rows[:3]} == {3, 7, 11}
    assert outcome.classifier is not None
    votes = outcome.classifier.votes(features.heads[1].whole())
    for row in rows:
        assert sum(row["votes"].values()) == 4
        assert row["votes"] == {
            label: votes[row["doc_id"], i] for i, label in enumerate(split.labels) if votes[row["doc_id"], i]
        }
        (name,) = row["images"]
        image = PIL.Image.open(io.BytesIO(pictures[name]))
        assert image.size == (160, 160), "8 pixels, shown as squares of 20"
        small = np.asarray(image)[::20, ::20]
        np.testing.assert_array_equal(small, np.asarray(split.queries[row["doc_id"]].example.images[0]))
    assert [len(row["votes"]) for row in rows] == sorted((len(row["votes"]) for row in rows), reverse=True)


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
