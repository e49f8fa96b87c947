"""Questions that the papers leave open: scores, votes, calibration, depth, and how stable the choice of heads is."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sav_jax.eval.statistics import Interval, paired_resampling, student_interval
from sav_jax.eval.tasks import find_tasks
from sav_jax.eval.tasks.base import default_data_dir
from sav_jax.extract import plan_prompts
from scripts.reproduction.drawing import Line, curves, reliability
from scripts.reproduction.heads import HEADS, per_task
from scripts.reproduction.rescoring import (
    FEW,
    FITTED,
    HARD,
    REWORDINGS,
    SHOTS,
    SOFT,
    agreement,
    by_chance,
    heads_of,
    rescored,
    tasks_of,
)
from scripts.reproduction.rivals import asked, mean, methods_of
from scripts.reproduction.savs import MARGIN
from scripts.reproduction.study import (
    Answers,
    Difference,
    Finding,
    Study,
    Table,
    finding,
    means_of,
    untested,
)
from scripts.reproduction.trained import hull, over_both
from scripts.reproduction.variants import WRONG, varied

OURS = "beyond the papers"
NOISE_MARGIN = 2.0
"""Points that wrong labels may cost."""
BINS = 15
NORMAL = 1.96  # standard deviations to either side hold 95 %

HEADLINES = (
    f"Scoring heads on examples left out of their class mean chooses better ones ({SHOTS} shots).",
    "Soft votes beat one vote per head.",
)
"""Claims for the README."""

_DEPTH = (
    "The curve rises to the last layers: a decoder of twelve layers has none to spare, where models of seven billion "
    "parameters have 28 or 32."
)

REASONS: dict[str, str] = {
    f"Scoring heads on examples left out of their class mean chooses better ones ({SHOTS} shots).": (
        "With five examples they do (where that row holds), with twenty the help that an example gives itself is "
        "small; which of the heads that the two scores dispute are better then depends on the draw."
    ),
    f"Scoring heads on examples left out of their class mean chooses better ones ({FEW} shots).": (
        "Five examples of a class give many heads the same score, whichever way it is counted: ties decide."
    ),
    **{
        f"Wrong labels on {share} % of the examples cost no more than {NOISE_MARGIN:g} points.": (
            f"Of twenty examples of a class, {share // 5} pull its mean, and the scores that choose heads, elsewhere."
        )
        for share in WRONG[:2]
    },
    "Gaussian head ensembles (HEC-V) beat SAVs.": (
        "What they gain on claims, pairs and digits they lose on `drawn-safety`, where forty examples have to give a "
        "precision matrix."
    ),
    "The heads of the first 6 of 12 layers suffice: no more than 1 point below all.": _DEPTH,
    "The heads of the first 9 of 12 layers suffice: no more than 1 point below all.": _DEPTH,
}
"""What one thinks of claims that do not hold."""


def measure(study: Study) -> list[Finding]:
    """All findings, model by model."""
    return [one for model in study.models for one in _of_model(study, model)]


def _of_model(study: Study, model: str) -> list[Finding]:
    found: list[Finding] = []
    tasks, heads = tasks_of(study), rescored(study, model)
    many = f"{means_of(tasks)}, {SHOTS} shots"

    def add(claim: str, source: str, setting: str, interval: Interval, values: dict[str, float], **rest: Any) -> None:
        known = {"claim": claim, "source": source, "model": model, "setting": setting, "values": values}
        found.append(finding("beyond", interval, **known, **{"seeds": len(study.seeds), **rest}))

    def paired(
        claim: str, setting: str, better: Mapping[str, Answers], worse: Mapping[str, Answers], names: Sequence[str]
    ) -> None:
        add(claim, OURS, setting, over_both(better, worse), dict(zip(names, (mean(better), mean(worse)), strict=True)))

    published = per_task(heads, f"{HEADS} heads")
    names = "left out", "with themselves"
    for shots, one, other in (
        (SHOTS, per_task(heads, "left out"), published),
        (FEW, per_task(heads, f"{FEW} shots, left out"), per_task(heads, f"{FEW} shots")),
    ):
        claim = f"Scoring heads on examples left out of their class mean chooses better ones ({shots} shots)."
        paired(claim, means_of(tasks), one, other, names)
    soft = per_task(heads, "soft votes")
    paired("Soft votes beat one vote per head.", many, soft, published, ("soft", "hard"))

    noisy = {share: per_task(varied(study, model), f"{share} % wrong") for share in WRONG}
    for share in WRONG[:2]:
        add(
            f"Wrong labels on {share} % of the examples cost no more than {NOISE_MARGIN:g} points.",
            OURS,
            f"{many}; {NOISE_MARGIN:g} points added",
            over_both(noisy[share], published, NOISE_MARGIN),
            {"right labels": mean(published), **{f"{s} % wrong": mean(of) for s, of in noisy.items()}},
        )

    folder = asked(study, model)
    hec, sav = methods_of(folder, "hec", tasks), methods_of(folder, "sav", tasks)
    add(
        "Gaussian head ensembles (HEC-V) beat SAVs.",
        "arXiv 2603.24181",
        many,
        over_both(hec, sav),
        {"hec": mean(hec), "sav": mean(sav)},
    )

    errors = {kind: 100 * float(np.mean([_mean_error(heads[task], kind) for task in tasks])) for kind in KINDS}
    for worse, claim in (
        (HARD, "Probabilities fitted on left-out examples are better calibrated than shares of the votes."),
        (SOFT, "Probabilities fitted on left-out examples are better calibrated than soft votes."),
    ):
        interval = calibration_difference(heads, tasks, FITTED, worse)
        add(
            claim,
            OURS,
            f"{many}; expected calibration error, {BINS} bins",
            interval,
            {f"ECE of {k}": e for k, e in errors.items()},
            note="Resamples have larger calibration errors than all queries: the interval is a normal one "
            "about the estimate, with their standard deviation.",
        )

    layers, _ = heads_of(study, model)
    by_depth = {depth: per_task(heads, f"layers {depth}") for depth in range(1, layers + 1)}
    compute = compute_shares(study, model)
    for depth in sorted({layers // 2, 3 * layers // 4} - {0}):
        add(
            f"The heads of the first {depth} of {layers} layers suffice: no more than {MARGIN:g} point below all.",
            f"{OURS}; early exit in arXiv 2603.10781",
            f"{many}; {MARGIN:g} point added",
            over_both(by_depth[depth], by_depth[layers], MARGIN),
            {
                f"{depth} layers": mean(by_depth[depth]),
                "all layers": mean(by_depth[layers]),
                "arithmetic": 100 * compute[depth - 1],
            },
        )

    found_by = _jaccards(heads, tasks)
    chance = 100 * by_chance(int(np.prod(heads_of(study, model))))
    for name, claim in (
        ("other draws", "Other examples of a task choose more of the same heads than other tasks do."),
        ("other words", "Other words of the question choose more of the same heads than other tasks do."),
    ):
        if len(tasks) < 2:
            found.append(
                untested("beyond", "there is one task only.", claim=claim, source=OURS, model=model, setting=many)
            )
            continue
        between = float(np.mean(found_by["other tasks"]))
        values = {name: float(np.mean(found_by[name])), "other tasks": between, "by chance": chance}
        over_tasks = student_interval(
            [one - two for one, two in zip(found_by[name], found_by["other tasks"], strict=True)]
        )
        setting = f"{len(tasks)} tasks, {SHOTS} shots; Jaccard index of the {HEADS} heads"
        note = "The interval is Student's over tasks."
        if name == "other draws":
            shared = [(task, heads[task]["overlap"]) for task in tasks if heads[task]["overlap"] > 0.05]
            told = ", ".join(f"`{task}` {100 * share:.0f} %" for task, share in shared)
            note += f" Draws from small pools share examples: {told}." if told else ""
        add(claim, OURS, setting, over_tasks, values, note=note)
    other, random = per_task(heads, "other draw"), per_task(heads, "random heads")
    add(
        f"Heads that another draw of examples chose serve as well: no more than {MARGIN:g} point below one's own.",
        OURS,
        f"{many}; {MARGIN:g} point added",
        over_both(other, published, MARGIN),
        {"another draw's": mean(other), "own": mean(published), "random": mean(random)},
    )
    return found


KINDS = HARD, SOFT, FITTED


def calibration_error(right: np.ndarray, sure: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Expected calibration error (Guo et al. 2017) of resamples, float [R].

    Args:
      right, sure: whether each answer is right, and its confidence, [Q].
      weights: how often each was drawn, [R, Q].
    """
    place = np.clip(np.ceil(sure * BINS).astype(int) - 1, 0, BINS - 1)
    of_bin = np.eye(BINS)[place] * (right - sure)[:, None]
    return np.abs(weights @ of_bin).sum(axis=1) / np.maximum(weights.sum(axis=1), 1)


def _mean_error(of_task: Mapping[str, Any], kind: str) -> float:
    parts = [(np.array(right), np.array(sure)) for right, sure in of_task["confidence"][kind]]
    return float(np.mean([calibration_error(right, sure, np.ones((1, len(sure))))[0] for right, sure in parts]))


def calibration_difference(heads: Mapping[str, Any], tasks: Sequence[str], better: str, worse: str) -> Difference:
    """By how much the calibration error of ``better`` is lower, in points: the mean over tasks and seeds.

    Calibration errors are never negative, and a resample's are larger than those of what it is drawn from: their
    percentiles lie to one side of the estimate. The interval is a normal one about the estimate, with the resamples'
    standard deviation (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.2).
    """
    parts: list[tuple[np.ndarray, ...]] = []
    clusters: list[list[str]] = []
    for task in tasks:
        both = zip(heads[task]["confidence"][better], heads[task]["confidence"][worse], strict=True)
        for (one, other), names in zip(both, heads[task]["sheet"]["clusters"], strict=True):
            parts.append(tuple(np.array(of) for of in (*one, *other)))
            clusters.append([f"{task} {name}" for name in names])

    def lower_by(place: int, draws: np.ndarray) -> np.ndarray:
        right, sure, other_right, other_sure = parts[place]
        return calibration_error(other_right, other_sure, draws) - calibration_error(right, sure, draws)

    found = paired_resampling(lower_by, clusters, resamples=2000).interval
    low, high = (100 * (found.mean + side * NORMAL * found.stderr) for side in (-1, 1))
    queries = sum(len(heads[task]["sheet"]["clusters"][0]) for task in tasks)
    seeds = len(heads[tasks[0]]["confidence"][better])
    of_parts = [float(lower_by(place, np.ones((1, len(of[0]))))[0]) for place, of in enumerate(parts)]
    by_seed = [100 * float(np.mean(of_parts[seed::seeds])) for seed in range(seeds)]
    return hull(Difference(100 * found.mean, 100 * found.stderr, low, high, queries), by_seed)


def _jaccards(heads: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, list[float]]:
    """How much chosen heads have in common, in %, for each task: with other draws of its examples, with its question in
    other words, and with other tasks under the same seed.
    """
    found: dict[str, list[float]] = {"other draws": [], "other words": [], "other tasks": []}
    for task in tasks:
        own = heads[task]["heads"]["chosen"]
        found["other draws"].append(100 * agreement(own))
        again = [heads[task]["heads"][f"reworded {number}"] for number in range(len(REWORDINGS))]
        found["other words"].append(100 * float(np.mean([agreement(own, sets) for sets in again])))
        rest = [heads[other]["heads"]["chosen"] for other in tasks if other != task]
        if rest:
            found["other tasks"].append(100 * float(np.mean([agreement(own, sets) for sets in rest])))
    return found


def compute_shares(study: Study, model: str) -> list[float]:
    """Share of a query's arithmetic that is left if it runs through the first 1, 2 ... layers only: products of
    matrices in the tower and the decoder, for the prompt of a digit.
    """

    def compute() -> list[float]:
        lmm = study.load(model)
        (task,) = find_tasks("digits-scattered")
        example = task.load(default_data_dir() / task.name).pool[0].example
        (prompt,) = plan_prompts(lmm, [example])
        decoder, vision = lmm.config.text, lmm.config.vision
        tokens, size = len(prompt.token_ids), decoder.hidden_size
        of_row = getattr(vision, "num_tokens", getattr(vision, "patches_per_side", 1) ** 2)
        patches = prompt.num_rows * of_row  # rows are tiles, whole images, or patches
        seen = {name: part for name, part in lmm.params.items() if name != "language_model"}
        tower = 2 * patches * sum(leaf.size for leaf in jax.tree.leaves(seen))
        weights = sum(leaf.size for leaf in jax.tree.leaves(lmm.params["language_model"]["layers"])) / lmm.num_layers
        layer = 2 * tokens * weights + 4 * tokens**2 * size
        return [(tower + depth * layer) / (tower + lmm.num_layers * layer) for depth in range(1, lmm.num_layers + 1)]

    return list(study.kept(f"compute/{model}", compute, version=1))


def tables(study: Study) -> list[Table]:
    """Where the heads are, depth, and agreement, by task."""
    found = []
    tasks = tasks_of(study)
    for model in study.models:
        heads, shares = rescored(study, model), compute_shares(study, model)
        layers, per_layer = heads_of(study, model)
        rows = []
        agreements = {name: of for name, of in _jaccards(heads, tasks).items() if of}
        for place, task in enumerate(tasks):
            chosen = np.array(heads[task]["heads"]["chosen"]) // per_layer
            thirds = [100 * np.mean((chosen >= a) & (chosen < b)) for a, b in _thirds(layers)]
            jaccards = [of[place] for of in agreements.values()]
            errors = [100 * _mean_error(heads[task], kind) for kind in KINDS]
            rows.append((task, *(f"{value:.0f}" for value in (*thirds, *jaccards)), *(f"{e:.1f}" for e in errors)))
        head = (
            "task",
            *(f"in layers {a} to {b - 1}" for a, b in _thirds(layers)),
            *(f"as {name}" for name in agreements),
            *(f"ECE of {kind}" for kind in KINDS),
        )
        note = (
            f"Of the {HEADS} chosen heads: the share in each third of the layers; the Jaccard index with those chosen "
            "by other draws of the examples, by the question in other words, and on other tasks. Calibration errors. "
            "All in %."
        )
        found.append(Table(f"Chosen heads and calibration of `{model}`", head, tuple(rows), note))
        depths = range(1, layers + 1)
        accuracies = [f"{mean(per_task(heads, f'layers {depth}')):.1f}" for depth in depths]
        found.append(
            Table(
                f"Accuracy of `{model}` against depth",
                ("first layers", *map(str, depths)),
                (
                    ("accuracy, %", *accuracies),
                    ("arithmetic of a query, %", *(f"{100 * share:.0f}" for share in shares)),
                ),
                "The tower is a large part of so small a model: of one of seven billion parameters, half the "
                "layers are about half of the arithmetic."
                if study.bundled(model)
                else "",
            )
        )
    return found


def _thirds(layers: int) -> list[tuple[int, int]]:
    ends = [round(part * layers / 3) for part in range(4)]
    return [(a, b) for a, b in itertools.pairwise(ends) if a < b]


def plots(study: Study) -> list[Path]:
    """Accuracy against depth; confidence against accuracy."""
    by_depth, sure = [], []
    for model in study.models:
        heads, (layers, _) = rescored(study, model), heads_of(study, model)
        at = list(range(1, layers + 1))
        lines = [Line(task, at, [per_task(heads, f"layers {d}", [task])[task].mean for d in at]) for task in heads]
        by_depth.append(
            (model, [*lines, Line("mean", at, np.mean([of.values for of in lines], axis=0).tolist(), thick=True)])
        )
        kinds = []
        for kind in KINDS:
            parts = [part for task in heads.values() for part in task["confidence"][kind]]
            right, given = (np.concatenate([np.array(part[i]) for part in parts]) for i in (0, 1))
            kinds.append((kind, right, given))
        sure.append((model, kinds))
    return [
        curves(
            study.pages / "reproduction-depth.svg",
            by_depth,
            "first layers of the decoder that are run",
            logarithmic=False,
        ),
        reliability(study.pages / "reproduction-calibration.svg", sure),
    ]
