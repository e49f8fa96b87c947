"""Runs the study and writes its page: see scripts/reproduce.sh."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from sav_jax._compiling import keep_programs
from sav_jax.errors import UserError
from sav_jax.eval.tasks import default_data_dir
from scripts.reproduction import page
from scripts.reproduction.study import MODELS, ROOT, Finding, Study
from scripts.reproduction.subjects import check_data, find_models, find_tasks_called, folder_name


@dataclass(frozen=True)
class Arguments:
    """Tests the papers' claims, on the bundled models or on others."""

    quick: tyro.conf.FlagCreatePairsOff[bool] = False
    """Fewer tasks, seeds, queries and steps; the page is written to the output folder, not to docs/."""

    output: Path | None = None
    """Folder for all that is measured, by default results/reproduction, with -quick, -of-MODELS and -on-TASKS behind it
    where these are not the usual ones. What is there is not measured again."""

    parts: str = ",".join(page.PARTS)
    """Names separated by commas."""

    models: str = ",".join(MODELS)
    """What 'sav-jax eval --model' takes, separated by commas: bundled models, directories in Hugging Face layout, hub
    ids. The page about others is written to the output folder, not to docs/."""

    tasks: str | None = None
    """What 'sav-jax eval --tasks' takes, tasks with classes to choose among, instead of the drawn ones and digits; the
    parts aim and sq have tasks of their own. The page is written to the output folder."""

    data_dir: Path | None = None
    """Where benchmarks that must be fetched by hand are looked for, each in a sub-folder of its name, by default
    $SAV_JAX_DATA or ~/.cache/sav_jax/data. Of --tasks."""

    page_only: tyro.conf.FlagCreatePairsOff[bool] = False
    """Measure nothing: write the page from what is there, or say what is missing."""


def main(arguments: Arguments) -> None:
    """Measures what is missing, then writes the page."""
    parts = arguments.parts.split(",")
    for name in parts:
        if name not in page.PARTS:
            raise UserError(f"--parts: no part is called {name!r}; there are: {', '.join(page.PARTS)}")
    tasks = {} if arguments.tasks is None else find_tasks_called(arguments.tasks)
    if arguments.data_dir is not None and not tasks:
        raise UserError("--data-dir is of --tasks: the usual ones have no files")
    models, others = find_models(arguments.models)
    results = ROOT / "results"
    output = arguments.output or results / folder_name(models, bool(others), tuple(tasks), arguments.quick)
    output = output.resolve()
    if (others or tasks) and output in [results / folder_name((), False, (), quick) for quick in (False, True)]:
        raise UserError(f"--output: {output} is for the bundled models and their usual tasks")
    if arguments.quick and not others:
        # Half of a short run of models of this size is compiling, most of that is making fast what then runs briefly
        # (measured: a training of a few steps takes 0.7 times as long). Not on others, which may be large.
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    study = Study(
        output,
        models,
        seeds=(0, 1) if arguments.quick else (0, 1, 2),
        quick=arguments.quick,
        kept_only=arguments.page_only,
        pages=output if arguments.quick or others or tasks else ROOT / "docs",
        others=others,
        tasks=tasks,
        data_dir=(arguments.data_dir or default_data_dir()).expanduser().resolve() if tasks else None,
    )
    if arguments.page_only:
        if not any(study.record(part, model) for part in page.PARTS for model in study.listed):
            raise UserError(f"{study.shown(output)}: nothing was measured there; run it without --page-only")
    elif study.quick and len(models) > 1 and not study.special:
        side_by_side(arguments, models, output)
    else:
        measure(study, parts)
    print(f"written to {study.shown(page.write(study))}")


def measure(study: Study, parts: Sequence[str]) -> None:
    """What is missing of the parts, in this process."""
    if study.special:
        check_data(study)
        # While this process has no accelerator yet, which the commands need to themselves.
        for part in parts:
            prepare = getattr(page.module(part), "prepare", None)
            if prepare is not None:
                prepare(study)
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
                of_model.save(part, found, time.perf_counter() - start, complete=False)
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
        while any(process.poll() is None for process in running) and not any(process.poll() for process in running):
            time.sleep(0.2)
        failed = [model for model, process in zip(models, running, strict=True) if process.poll()]
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    if failed:
        raise UserError(f"the study of {' and of '.join(failed)} failed")


def stop(*_: object) -> None:
    """Of a signal: what this process has started ends with it."""
    sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    try:
        main(tyro.cli(Arguments, description=__doc__))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
