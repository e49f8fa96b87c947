"""Runs the study and writes its page: see scripts/reproduce.sh."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
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
    """Measure nothing: write the page from what is there, or say what is missing."""


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
        kept_only=arguments.page_only,
        pages=output if arguments.quick else ROOT / "docs",
    )
    if arguments.page_only:
        pass
    elif study.quick and len(models) > 1:
        side_by_side(arguments, models, output)
    else:
        measure(study, parts)
    print(f"written to {study.shown(page.write(study))}")


def measure(study: Study, parts: Sequence[str]) -> None:
    """What is missing of the parts, in this process."""
    keep_programs(study.cache)
    for part in parts:
        code = page.module(part)
        if code is None:
            study.say(f"{part}: there is no such part yet")
            continue
        for model in study.models:
            start = time.perf_counter()
            of_model = replace(study, models=(model,))
            found: list[Finding] = []
            for finding in code.measure(of_model):  # what is found first is kept first
                found.append(finding)
                of_model.save(part, found, time.perf_counter() - start)


def side_by_side(arguments: Arguments, models: Sequence[str], output: Path) -> None:
    """A process for each model: short runs mostly compile, which one core does (measured: two thirds of the time). Not
    for runs whose times are quoted.
    """
    command = [
        sys.executable,
        "-m",
        "scripts.reproduction",
        "--quick",
        "--output",
        str(output),
        "--parts",
        arguments.parts,
    ]
    running = [subprocess.Popen([*command, "--models", model], cwd=ROOT) for model in models]
    try:
        failed = [model for model, process in zip(models, running, strict=True) if process.wait()]
    finally:
        for process in running:
            process.terminate()
    if failed:
        raise UserError(f"the study of {' and of '.join(failed)} failed")


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, description=__doc__))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
