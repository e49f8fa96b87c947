"""What other choices would have answered from the same heads: more and fewer heads and shots, other tasks' heads, other
scores and votes, fewer layers, other prompts. No forward pass but one per prompt.

Axes: S support examples, Q queries, M heads, C classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sav_jax.classifier import SparseAttentionVectors, count_votes
from sav_jax.errors import UserError
from sav_jax.eval.calibration import fit_temperature, probabilities
from sav_jax.eval.methods.sav import vote_scores
from sav_jax.lmm import LMM, find_model
from sav_jax.models.registry import architecture, read_config
from scripts.reproduction.heads import HEADS, Ballots, Draw, Sheet, draws, read_examples, reworded, with_heads
from scripts.reproduction.study import Study

TASKS = (
    "digits",
    "digits-scattered",
    "drawn-glyphs",
    "drawn-textures",
    "drawn-safety",
    "drawn-hallucination",
    "drawn-paired",
    "drawn-multiimage",
)
QUICK_TASKS = ("digits-scattered", "drawn-safety", "drawn-hallucination", "drawn-paired")
SHOTS = 20
NUMBERS = (1, 2, 5, 10, 20, 50)
FEW = 5
RANDOM = 20
"""Sets of random heads that are averaged."""

REWORDINGS: tuple[Callable[[str], str], ...] = (
    lambda question: f"Look at the image. {question}",
    lambda question: f"{question} Answer with one word.",
)
HARD, SOFT, FITTED = "share of the votes", "soft votes", "fitted"
"""Kinds of probabilities: shares of hard votes, means of softmax(cosine / 0.1), and softmax of mean cosines at a
temperature fitted on support examples that were left out."""


def heads_of(study: Study, model: str) -> tuple[int, int]:
    """Layers of a model, and heads in each."""
    raw = read_config(find_model(study.checkpoint(model)))
    text = architecture(raw).config.text
    return text.num_layers, text.num_heads


def tasks_of(study: Study) -> tuple[str, ...]:
    """Those that the study asks."""
    return tuple(study.tasks) or (QUICK_TASKS if study.quick else TASKS)


def rescored(study: Study, model: str) -> dict[str, Any]:
    """Task -> {"sheet" and "shots": answers to the queries that 20 and 50 shots leave (:class:`Sheet`), "heads": way of
    choosing -> heads under each seed, "overlap": share of the examples of two seeds that are the same, "confidence":
    kind -> [right, confidence] under each seed}. Ways of answering:

    - "20 heads": the best 20 by 20 shots; also 1 to 50, "all heads", "layers 6" (the best of the first six layers),
      "random heads" (a mean over sets), "heads of TASK", "other draw" (heads chosen by the next seed's support, without
      what is asked under this one);
    - "5 shots", "5 shots, left out", "left out": heads chosen by resubstitution and by leave-one-out scores;
    - "soft votes"; "heads of rewording 0": heads chosen when the support is asked in other words;
    - in "shots", "1 shots" to "50 shots", as far as there are examples.
    """

    def compute() -> dict[str, Any]:
        lmm = study.load(model)
        ballots: dict[str, list[Ballots]] = {}
        found: dict[str, Any] = {}
        for task in tasks_of(study):
            study.say(f"  {task}")
            found[task], ballots[task] = _of_task(study, lmm, task)
        for task in tasks_of(study):
            _add_transfers(found[task], ballots, task)
        return {
            task: {name: part.content() if isinstance(part, Sheet) else part for name, part in of.items()}
            for task, of in found.items()
        }

    facts = {"tasks": tasks_of(study), "limit": study.limit, "version": 2}
    return dict(study.kept(f"heads/{model}", compute, **facts))


def _of_task(study: Study, lmm: LMM, task: str) -> tuple[dict[str, Any], list[Ballots]]:
    sheet, curve = Sheet(), Sheet()
    cast: list[Ballots] = []
    shown: list[tuple[Draw, np.ndarray]] = []
    heads: dict[str, list[list[int]]] = {}
    confidence: dict[str, list[list[list[float]]]] = {HARD: [], SOFT: [], FITTED: []}
    for draw, support, queries in with_heads(study, lmm, draws(study, task, SHOTS)):
        sheet.start(draw.clusters)
        ballots = Ballots.of(draw, support, queries)
        cast.append(ballots)
        shown.append((draw, support))
        total = len(ballots.order)
        for number in NUMBERS:
            sheet.add(f"{number} heads", ballots.right(ballots.best(number)))
        sheet.add("all heads", ballots.right(ballots.order))
        for depth in range(1, 1 + total // ballots.per_layer):
            sheet.add(f"layers {depth}", ballots.right(ballots.best(depth=depth)))
        rng = np.random.default_rng([draw.seed, 7])
        some = [ballots.right(rng.permutation(total)[:HEADS]) for _ in range(RANDOM)]
        sheet.add("random heads", np.mean(some, axis=0))

        left_out = Ballots.of(draw, support, queries, leave_one_out=True)
        sheet.add("left out", left_out.right(left_out.best()))
        for name, option in ((f"{FEW} shots", False), (f"{FEW} shots, left out", True)):
            few = Ballots.of(draw, support, queries, shots_per_class=FEW, seed=draw.seed, leave_one_out=option)
            sheet.add(name, few.right(few.best()))
        for kind, (right, sure) in _soft(draw, support, queries).items():
            confidence[kind].append([right.astype(float).tolist(), np.round(sure, 4).tolist()])
            if kind == SOFT:
                sheet.add("soft votes", right.astype(np.float64))

        heads.setdefault("chosen", []).append(ballots.best().tolist())
        for number, change in enumerate(REWORDINGS):
            again = read_examples(study, lmm, [reworded(item, change) for item in draw.support])
            fitted = SparseAttentionVectors.fit(again, draw.labels, HEADS, class_names=draw.classes)
            chosen = [layer * ballots.per_layer + head for layer, head in fitted.heads]
            heads.setdefault(f"reworded {number}", []).append(chosen)
            sheet.add(f"heads of rewording {number}", ballots.right(np.array(chosen)))
    for number, ballots in enumerate(cast):  # heads that the next seed's support chose, classes by this one's
        sheet.add("other draw", ballots.right(_without(*shown[(number + 1) % len(shown)], shown[number][0]).best()))
    numbers, drawn = _most_shots(study, task)
    for draw, support, queries in with_heads(study, lmm, drawn):
        curve.start(draw.clusters)
        for shots in numbers:
            ballots = Ballots.of(draw, support, queries, shots_per_class=shots, seed=draw.seed)
            curve.add(f"{shots} shots", ballots.right(ballots.best()))
    overlap = [_overlap(one, other) for (one, _), (other, _) in itertools.combinations(shown, 2)]
    found = {
        "sheet": sheet,
        "shots": curve,
        "heads": heads,
        "confidence": confidence,
        "overlap": float(np.mean(overlap)),
    }
    return found, cast


def _without(draw: Draw, support: np.ndarray, asked: Draw) -> Ballots:
    """Heads that a draw chooses without the examples that another one asks; what they vote is not asked."""
    queries = {id(item) for item in asked.queries}
    rows = [row for row, item in enumerate(draw.support) if id(item) not in queries]
    return Ballots.of(replace(draw, support=tuple(draw.support[row] for row in rows)), support[rows], support[:1])


def _overlap(one: Draw, other: Draw) -> float:
    """Share of the examples of one that the other has, too."""
    return len({id(item) for item in one.support} & {id(item) for item in other.support}) / len(one.support)


def _most_shots(study: Study, task: str) -> tuple[tuple[int, ...], list[Draw]]:
    """Numbers of shots that a task has examples for, and draws of the largest: few tasks have fifty of each class."""
    for place, most in enumerate(reversed(NUMBERS)):
        try:
            return NUMBERS[: len(NUMBERS) - place], draws(study, task, most)
        except UserError:
            if most <= SHOTS:  # which all that is asked needs
                raise
    raise AssertionError(NUMBERS)


def with_shots(found: Mapping[str, Any], number: int) -> list[str]:
    """Tasks that were asked with so many shots."""
    return [task for task, of in found.items() if f"{number} shots" in of["shots"]["values"]]


def _soft(draw: Draw, support: np.ndarray, queries: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Kind of probability -> whether the answer is right, and what probability it was given, [Q] each."""
    soft = SparseAttentionVectors.fit(support, draw.labels, HEADS, class_names=draw.classes, vote="confidence")
    nearest = soft.head_votes(queries)
    counts = count_votes(nearest, len(draw.classes)) / HEADS
    shares = soft.predict_proba(queries)
    temperature = fit_temperature(vote_scores(soft, support, draw.shown_classes), draw.shown_classes)
    fitted = probabilities(vote_scores(soft, queries), temperature)
    found = {}
    for kind, given in ((HARD, counts), (SOFT, shares), (FITTED, fitted)):
        answer = given.argmax(axis=1)
        found[kind] = answer == draw.targets, given[np.arange(len(given)), answer]
    return found


def _add_transfers(of_task: dict[str, Any], ballots: Mapping[str, Sequence[Ballots]], task: str) -> None:
    """What this task's classes answer on the heads that other tasks chose under the same seed."""
    for seed, own in enumerate(ballots[task]):
        for other, theirs in ballots.items():
            of_task["sheet"].add(f"heads of {other}", own.right(theirs[seed].best()))


def jaccard(one: Sequence[int], other: Sequence[int]) -> float:
    """Share of the heads of either set that both hold."""
    return len(set(one) & set(other)) / len(set(one) | set(other))


def agreement(sets: Sequence[Sequence[int]], others: Sequence[Sequence[int]] | None = None) -> float:
    """Mean Jaccard index of all pairs of sets, or of those in the same places of two lists."""
    pairs = itertools.combinations(sets, 2) if others is None else zip(sets, others, strict=True)
    return float(np.mean([jaccard(one, other) for one, other in pairs]))


def by_chance(total: int, number: int = HEADS, samples: int = 2000) -> float:
    """The mean Jaccard index of two random sets of heads."""
    rng = np.random.default_rng(0)
    common = rng.hypergeometric(number, total - number, number, samples)
    return float(np.mean(common / (2 * number - common)))
