"""``scripts/reproduction/aim.py``: tasks it draws, intervals, rows from made cells, and what prompts cost."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import sem, t

import sav_jax
from sav_jax.aim import Aim, DemonstrationBank, Layout
from sav_jax.models.fusion import FusionConfig, initial_params
from scripts.reproduction import aim, aim_measured, trained
from scripts.reproduction.study import Answers, Study, difference


def test_tasks_have_enough_of_every_label_and_share_no_picture() -> None:
    for number, (meant, kinds) in enumerate(aim_measured.UNSAID["digits"]):
        data = aim_measured.make_task(meant, kinds, 30, number).load(Path())
        assert data.queries is not None
        counts = Counter(item.label for item in data.pool)
        assert min(counts.values()) >= aim_measured.SHOTS
        assert {item.label for item in data.queries} <= set(counts)
        pixels = [np.asarray(item.example.images[0]).tobytes() for item in (*data.pool, *data.queries)]
        assert len(set(pixels)) == len(pixels)
        assert {item.example.question for item in data.queries} == {aim_measured.QUESTION}


def made(rng: np.random.Generator, chance: float, seeds: int = 3, queries: int = 40) -> Answers:
    values = tuple((rng.random(queries) < chance).astype(float) for _ in range(seeds))
    return Answers(values, (tuple(map(str, range(queries))),) * seeds)


def test_intervals_hold_seeds_and_queries() -> None:
    rng = np.random.default_rng(0)
    better, worse = ({task: made(rng, chance) for task in ("a", "b")} for chance in (0.8, 0.4))
    found = trained.over_both(better, worse)
    by_hand = [
        100 * np.mean([better[task].values[s].mean() - worse[task].values[s].mean() for task in ("a", "b")])
        for s in range(3)
    ]
    np.testing.assert_allclose(trained.by_seed(better, worse), by_hand, rtol=1e-12)
    low, high = t.interval(0.95, 2, np.mean(by_hand), sem(by_hand))
    queries = difference(better, worse)
    np.testing.assert_allclose(found.mean, np.mean(by_hand), rtol=1e-12)
    np.testing.assert_allclose([found.low, found.high], [min(low, queries.low), max(high, queries.high)], rtol=1e-12)
    # A seed that goes another way makes no row certain, however many queries there are.
    values = tuple(np.full(4000, x) for x in (1.0, 1.0, 0.0))
    sure = {"a": Answers(values, (tuple(map(str, range(4000))),) * 3)}
    none = {"a": Answers((np.zeros(4000),) * 3, sure["a"].clusters)}
    assert trained.over_both(sure, none).low < 0
    assert trained.of_seeds([100.0, 100.0]).ci == (100.0, 100.0)


def cell(rng: np.random.Generator, chances: dict[str, float], tasks: list[str]) -> aim_measured.Cell:
    cost = {"zero-shot": 50.0, "icl": 200.0, "aim": 100.0, "icl-turns": 200.0, "icl-none": 50.0}
    return {
        method: {
            task: {
                "values": made(rng, chance).values[0].tolist(),
                "clusters": [str(i) for i in range(40)],
                "facts": {"prompt_tokens": cost[method], "cache_bytes": 10 * cost[method]},
            }
            for task in tasks
        }
        for method, chance in chances.items()
    }


def test_rows_are_oriented_as_the_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    unsaid = {group: [f"{group} {meant}" for meant, _ in rows] for group, rows in aim_measured.UNSAID.items()}
    tasks = [name for names in unsaid.values() for name in names]
    others = [*aim_measured.ASKED, aim_measured.DESCRIBED]
    chances = {"icl": 0.1, "aim": 0.9, "icl-turns": 0.1, "icl-none": 0.1}
    numbers, times = aim_measured.FULL.numbers, (("icl", 2.0), ("aim", 1.0))
    costs: dict[str, Any] = {
        "seconds": {method: {str(n): [each * n] * 4 + [each * n * 1.01] for n in numbers} for method, each in times},
        "tokens": {m: {str(n): 50.0 + c * n for n in numbers} for m, c in (("icl", 30), ("aim", 6))},
        "text_tokens": 5.0,
        "passes": [8, 0, 0],
    }
    same = [cell(rng, chances, tasks) for _ in range(3)]  # whatever the number of demonstrations
    found = aim_measured.Measured(
        unsaid,
        cell(rng, {"zero-shot": 0.5}, tasks),
        dict.fromkeys(numbers, same),
        [cell(rng, {"zero-shot": 0.5, **chances}, others) for _ in range(3)],
        [costs] * 3,
    )
    rows = aim.rows_of(Study(tmp_path), "tiny", found)
    assert len({row.claim for row in rows}) == len(rows)
    verdicts = {row.claim: row.verdict for row in rows}
    assert verdicts.pop("More demonstrations help fused tokens") == "undecided"
    controls = {claim for claim, verdict in verdicts.items() if verdict != "holds"}
    assert len(controls) == 2  # turns of a conversation are not better than none here
    assert all(claim.startswith("Turns of a conversation teach") for claim in controls)
    costly = {row.claim: row.difference for row in rows if "need less memory" in row.claim or "bank" in row.claim}
    assert list(costly.values()) == [50.0, 100.0]

    monkeypatch.setattr(aim, "measured", lambda *_: found)
    study = Study(tmp_path, models=("tiny",), pages=tmp_path)
    for table in aim.tables(study):
        assert {len(line) for line in table.rows} == {len(table.head)}
    (picture,) = aim.plots(study)
    assert "icl" in picture.read_text()

    # The same with methods exchanged: what was claimed does not hold.
    def exchanged(of: list[aim_measured.Cell]) -> list[aim_measured.Cell]:
        return [{**c, "icl": c["aim"], "icl-turns": c["aim"], "aim": c["icl"]} for c in of]

    cells = {n: exchanged(of) for n, of in found.cells.items()}
    swapped = aim_measured.Measured(unsaid, found.without, cells, exchanged(found.others), [costs] * 3)
    failed = [row.claim for row in aim.rows_of(Study(tmp_path), "tiny", swapped) if row.verdict == "does not hold"]
    assert len(failed) == 17  # all but "more demonstrations", tokens, time and the bank


@pytest.fixture(scope="module")
def lmm() -> sav_jax.LMM:
    return sav_jax.load("tiny")


def test_costs_are_those_of_prompts(lmm: sav_jax.LMM, tmp_path: Path) -> None:
    config = FusionConfig(lmm.config.text.hidden_size)
    start = Aim(Layout(layer=1), config, initial_params(config, 0, "identity", 0.1), lmm.fingerprint, "tiny")
    task = aim_measured.make_task("color", (aim_measured.DIGITS,), 8, 0)
    size = aim_measured.Size(numbers=(1, 2), queries=8)
    found = aim_measured.costs(lmm, start, task, 0, size, tmp_path / "bank")
    assert found["passes"] == [2, 0, 0]
    lengths = found["tokens"]
    # Real demonstrations bring their pictures along; virtual ones their text and what separates them.
    assert lengths["aim"]["2"] - lengths["aim"]["1"] <= found["text_tokens"] + 2
    assert lengths["icl"]["2"] - lengths["icl"]["1"] > found["text_tokens"] + 10
    assert {len(of) for times in found["seconds"].values() for of in times.values()} == {5}


def test_answers_are_read_and_scored_as_by_the_evaluation(lmm: sav_jax.LMM, monkeypatch: pytest.MonkeyPatch) -> None:
    config = FusionConfig(lmm.config.text.hidden_size)
    start = Aim(Layout(layer=1), config, initial_params(config, 0, "identity", 0.1), lmm.fingerprint, "tiny")
    task, asked = aim_measured.make_task("color", (aim_measured.DIGITS,), 6, 0), []

    def generate(_: sav_jax.LMM, examples: list[sav_jax.Example], *__: Any, **___: Any) -> list[sav_jax.Generation]:
        asked.append(examples)
        return [sav_jax.Generation(" Red ", ()) for _ in examples]

    monkeypatch.setattr(sav_jax, "generate", generate)
    bank = DemonstrationBank(lmm, start)
    found = aim_measured.answered(lmm, [task], ("zero-shot", "icl", "aim"), 2, 0, bank, aim_measured.QUICK)
    queries = task.load(Path()).queries
    assert queries is not None
    for method, of_method in zip(("zero-shot", "icl", "aim"), asked, strict=True):
        one = found[method][task.name]
        assert one["values"] == [float(item.label == "red") for item in queries]
        assert one["clusters"] == [item.example.id for item in queries]
        assert [len(example.images) for example in of_method] == [3 if method == "icl" else 1] * len(queries)
        assert {len(example.virtual) for example in of_method} == {2 if method == "aim" else 0}
    tokens = [found[method][task.name]["facts"]["prompt_tokens"] for method in found]
    assert tokens[0] < tokens[2] < tokens[1]
