"""Runs the study and writes its page: see scripts/reproduce.sh."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from sav_jax._compiling import keep_programs
from sav_jax.errors import UserError
from scripts.reproduction import page
from scripts.reproduction.study import MODELS, ROOT, Finding, Study


@dataclass(frozen=True)
class Arguments:
    """Tests the papers' claims on the bundled models."""

    quick: tyro.conf.FlagCreatePairsOff[bool] = False
    """Fewer tasks, seeds, queries and steps; the page is written to the output folder, not to docs/."""

    output: Path | None = None
    """Folder for all that is measured, by default results/reproduction or results/reproduction-quick. What is there is
    not measured again."""

    parts: str = ",".join(page.PARTS)
    """Names separated by commas."""

    models: str = ",".join(MODELS)
    """Names separated by commas."""

    page_only: tyro.conf.FlagCreatePairsOff[bool] = False
    """Measure nothing: write the page from what is there."""


def main(arguments: Arguments) -> None:
    """Measures what is missing, then writes the page."""
    parts, models = arguments.parts.split(","), tuple(arguments.models.split(","))
    for option, given, known in (("--parts", parts, page.PARTS), ("--models", models, MODELS)):
        for name in given:
            if name not in known:
                raise UserError(f"{option}: no {option[2:-1]} is called {name!r}; there are: {', '.join(known)}")
    name = "reproduction-quick" if arguments.quick else "reproduction"
    output = (arguments.output or ROOT / "results" / name).resolve()
    study = Study(
        output,
        models,
        seeds=(0, 1) if arguments.quick else (0, 1, 2),
        quick=arguments.quick,
        pages=output if arguments.quick else ROOT / "docs",
    )
    keep_programs(study.cache)
    for part in parts if not arguments.page_only else ():
        code = page.module(part)
        if code is None:
            study.say(f"{part}: there is no such part yet")
            continue
        for model in models:
            start = time.perf_counter()
            of_model = replace(study, models=(model,))
            found: list[Finding] = []
            for finding in code.measure(of_model):  # what is found first is kept first
                found.append(finding)
                of_model.save(part, found, time.perf_counter() - start)
    print(f"written to {study.shown(page.write(study))}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, description=__doc__))
    except UserError as error:
        sys.exit(f"error: {error}")
