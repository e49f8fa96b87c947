#!/usr/bin/env python
"""Measures few-shot LoRA on the bundled model: is a handwritten digit even?

    python scripts/measure_lora.py --output results/lora
    sav-jax compare results/lora --baseline zero-shot-likelihood

``tiny`` can read the digits, but was never asked this: the labelled examples alone say what is meant.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

import sav_jax
from sav_jax.eval.methods import METHODS
from sav_jax.eval.run import Plan, evaluate
from sav_jax.eval.tasks import find_tasks
from sav_jax.eval.tasks.base import Data, Item, Task

QUESTION = "Is the digit even?"


@dataclass(frozen=True)
class Arguments:
    """Runs methods of 'sav-jax eval' on the task."""

    output: Annotated[Path, tyro.conf.arg(help="folder for the results, as those of 'sav-jax eval'")]
    methods: Annotated[tuple[str, ...], tyro.conf.arg(help="of 'sav-jax eval'")] = (
        "zero-shot",
        "zero-shot-likelihood",
        "lora",
        "lora-likelihood",
        "sav",
    )
    shots: Annotated[tuple[int, ...], tyro.conf.arg(help="labelled examples of each of the two classes")] = (20,)
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(help="of the draw of labelled examples")] = (0, 1, 2)
    rates: Annotated[tuple[float, ...], tyro.conf.arg(help="that are tried")] = Plan.lora_rates
    steps: Annotated[tuple[int, ...], tyro.conf.arg(help="of training, that are tried")] = Plan.lora_steps
    limit: Annotated[int | None, tyro.conf.arg(help="answer so many queries only")] = None
    cache: Annotated[str | None, tyro.conf.arg(help="folder in which tuned models and features are kept")] = None


def parity_task() -> Task:
    """The digits of scikit-learn, labelled odd or even; the answer is yes or no."""
    (digits,) = find_tasks("digits")

    def load(folder: Path) -> Data:
        pool = digits.load(folder).pool
        labels = [("even", "odd")[int(item.label) % 2] for item in pool]
        examples = [
            replace(item.example, question=QUESTION, label=label) for item, label in zip(pool, labels, strict=True)
        ]
        return Data(tuple(map(Item, examples)))

    return Task(
        "digits-parity",
        "is a handwritten digit even?",
        load,
        source=digits.source,
        prompt=QUESTION,
        answers={"even": "yes", "odd": "no"},
    )


def main(arguments: Arguments) -> None:
    """Measures."""
    plan = Plan(
        shots=arguments.shots,
        seeds=arguments.seeds,
        lora_rates=arguments.rates,
        lora_steps=arguments.steps,
        max_new_tokens=4,
        limit=arguments.limit,
        cache=arguments.cache,
    )
    methods = [METHODS[name] for name in arguments.methods]
    evaluate(lambda: sav_jax.load("tiny"), [parity_task()], methods, plan, arguments.output)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
