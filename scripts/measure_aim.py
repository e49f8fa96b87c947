#!/usr/bin/env python
"""Measures AIM on the bundled model: no demonstrations, real ones in the prompt, and the same as virtual tokens.

    sav-jax train aim --model tiny --preset tiny --output runs/aim
    python scripts/measure_aim.py --aim runs/aim --output results/aim

The question ("what is it?") does not say whether the name, the colour or something else of the thing is meant; only the
demonstrations do. Scenes are held out; digits, which no document of the training shows, are reported apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from numpy.typing import NDArray

import sav_jax
from sav_jax._files import write_file
from sav_jax.eval.methods import METHODS
from sav_jax.eval.results import Run
from sav_jax.eval.run import Plan, evaluate
from sav_jax.eval.statistics import student_interval
from sav_jax.eval.tasks.base import Data, Item, Task
from sav_jax.train.documents import drawn_pairs

QUESTION = "what is it?"
# (what is meant, kinds of scene): of what the training's documents show, and of digits, which they never do.
SHAPES, LETTERS, DIGITS = ("shape", "shape"), ("glyph", "letter"), ("glyph", "digit")
TASKS = {
    "shapes, letters": (
        ("name", (SHAPES, LETTERS)),
        ("category", (SHAPES, LETTERS)),
        ("color", (SHAPES,)),
        ("background", (SHAPES,)),
        ("size", (SHAPES,)),
        ("texture", (SHAPES,)),
        ("place", (SHAPES,)),
    ),
    "digits": (("name", (DIGITS,)), ("color", (DIGITS,)), ("background", (DIGITS,))),
}
FIRST = 80 * 10**9  # seeds far beyond those of the training's documents
SHOTS = 4  # labelled examples of each class, of which the demonstrations are drawn


@dataclass(frozen=True)
class Arguments:
    """Measures accuracy, prompt tokens, memory and time by the number of demonstrations."""

    aim: Annotated[Path, tyro.conf.arg(help="folder of a 'sav-jax train aim' run")]
    output: Annotated[Path, tyro.conf.arg(help="folder for the results, and for table.md")]
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(help="of the demonstrations")] = (0, 1, 2)
    demonstrations: Annotated[tuple[int, ...], tyro.conf.arg(help="numbers of them")] = (1, 2, 4, 8)
    queries: Annotated[int, tyro.conf.arg(help="per task")] = 100


def make_task(meant: str, kinds: Sequence[tuple[str, str]], queries: int, number: int) -> Task:
    """Scenes of which the same is meant; labels that are too rare are left out."""
    first = FIRST + number * 10**8
    pool = drawn_pairs(meant, kinds, 800, first, QUESTION, held_out=True)
    asked = drawn_pairs(meant, kinds, queries, first + 10**7, QUESTION, held_out=True)
    counts = Counter(pair.label for pair in pool)
    kept = {label for label, count in counts.items() if count >= SHOTS} & {pair.label for pair in asked}
    pool, asked = (tuple(pair for pair in pairs if pair.label in kept) for pairs in (pool, asked))
    name = f"unsaid-{'-'.join(category for _, category in kinds)}-{meant}"
    return Task(
        name,
        f"{meant}, which the question does not say",
        lambda _: Data(tuple(map(Item, pool)), tuple(map(Item, asked))),
        # What is written counts as it stands: no list of answers tells "red" from "star".
        parse=lambda text, _: text.strip().casefold(),
    )


def right(runs: Sequence[Run]) -> NDArray[np.float64]:
    """Which queries were answered rightly, [seeds, queries]."""
    return np.array(
        [
            [p == item.label for p, item in zip(run.outcome.predictions or (), run.split.queries, strict=True)]
            for run in runs
        ],
        np.float64,
    )


def interval(parts: Sequence[NDArray[np.float64]]) -> str:
    """Mean over tasks of the mean over seeds, and its 95 % interval from resampling queries within each task."""
    rng = np.random.default_rng(0)
    means = [part.mean(axis=0) for part in parts]
    draws = np.mean([m[rng.integers(len(m), size=(2000, len(m)))].mean(axis=1) for m in means], axis=0)
    low, high = np.quantile(draws, (0.025, 0.975))
    return f"{100 * np.mean([m.mean() for m in means]):.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def over_seeds(parts: Sequence[NDArray[np.float64]]) -> str:
    """Student's 95 % interval of the mean over tasks, from its value under each seed."""
    ends = student_interval([float(np.mean([part[seed].mean() for part in parts])) for seed in range(len(parts[0]))]).ci
    return "" if ends is None else f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}"


def main(arguments: Arguments) -> None:
    """Measures and writes."""
    tasks = {
        group: [make_task(meant, kinds, arguments.queries, 10 * i + j) for j, (meant, kinds) in enumerate(rows)]
        for i, (group, rows) in enumerate(TASKS.items())
    }
    lmm = sav_jax.load("tiny")
    every = [task for members in tasks.values() for task in members]
    lines = [
        "| scenes | demonstrations | method | accuracy, % | over seeds | prompt tokens | cache, kB | ms per query |",
        "|---|---|---|---|---|---|---|---|",
    ]
    details = []
    unshown: dict[str, list[NDArray[np.float64]]] = {}
    for number in (0, *arguments.demonstrations):
        methods = [METHODS["zero-shot"]] if number == 0 else [METHODS["icl"], METHODS["aim"]]
        plan = Plan(
            shots=(SHOTS,),
            seeds=arguments.seeds if number else arguments.seeds[:1],
            demonstrations=number or 1,
            max_new_tokens=4,
            batch_size=25,
            aim=str(arguments.aim),
        )
        summaries = evaluate(lambda: lmm, every, methods, plan, arguments.output / f"{number}-demonstrations")
        for group, members in tasks.items():
            found = {}
            for method in methods:
                of = [s.runs for s in summaries if s.runs[0].method is method and s.runs[0].task in members]
                found[method.name] = [right(runs) for runs in of]
                facts = [run.outcome.facts for runs in of for run in runs]
                told = ["", "", ""]
                if number:
                    tokens = np.mean([fact["prompt_tokens"] for fact in facts])
                    memory = np.mean([fact["cache_bytes"] for fact in facts])
                    # The median: a few runs compile.
                    seconds = np.median([fact["query_seconds"] / fact["query_passes"] for fact in facts])
                    told = [f"{tokens:.0f}", f"{memory / 1000:.0f}", f"{1000 * seconds:.1f}"]
                of_method = found[method.name]
                cells = [group, str(number), method.name, interval(of_method), over_seeds(of_method), *told]
                lines.append(f"| {' | '.join(cells)} |")
                details += [
                    f"| {runs[0].task.name} | {number} | {method.name} | {100 * right(runs).mean():.1f} |"
                    for runs in of
                ]
            if not number:
                unshown[group] = found["zero-shot"]
                continue
            for name, base in (("icl", found["icl"]), ("zero-shot", unshown[group])):
                less = [a - b for a, b in zip(found["aim"], base, strict=True)]
                lines.append(f"| {group} | {number} | aim - {name} | {interval(less)} | {over_seeds(less)} | | | |")
    heading = ["", "| task | demonstrations | method | accuracy, % |", "|---|---|---|---|"]
    text = "\n".join([*lines, *heading, *details]) + "\n"
    write_file(arguments.output / "table.md", text.encode())
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
