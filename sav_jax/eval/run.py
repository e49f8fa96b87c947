"""Run methods on tasks and write what came out."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sav_jax._files import check_output_folder, write_folder
from sav_jax.eval.methods import Features, Method, Settings
from sav_jax.eval.results import Run, chosen_heads, results_json, samples_jsonl, table
from sav_jax.eval.tasks import Task, split_task
from sav_jax.lmm import LMM


def evaluate(
    load: Callable[[], LMM], tasks: Sequence[Task], methods: Sequence[Method], settings: Settings, output: Path
) -> list[Run]:
    """Compare methods on tasks; print a table and write ``results.json``, ``samples_TASK.jsonl`` and
    ``heads_TASK.png``.

    Every example passes through the model once for its heads, however many methods read them, and not at all if they
    are in the feature cache.

    Args:
      load: loads the model; called once, and only if a method needs it.
      tasks: what to answer.
      methods: how.
      settings: the rest.
      output: a folder; earlier results of the same name in it are replaced at the end, others stay.

    Returns:
      One run per task and method, in that order.

    Raises:
      UserError: for bad input; nothing is then written.
    """
    from sav_jax.eval.plots import head_map

    check_output_folder(output)
    began, start = datetime.datetime.now(datetime.UTC), time.perf_counter()
    loaded: list[LMM] = []

    def load_once() -> LMM:
        if not loaded:
            loaded.append(load())
        return loaded[0]

    runs: list[Run] = []
    in_model = 0.0
    files: dict[str, bytes] = {}
    for task in tasks:
        split = split_task(task, settings.shots, settings.seed, settings.limit)
        print(
            f"{task.name}: {len(split.labels)} classes, {len(split.support)} labelled examples, "
            f"{len(split.queries)} queries",
            file=sys.stderr,
        )
        features = Features(load_once, split, settings)
        for method in methods:
            method_start = time.perf_counter() - features.seconds
            outcome = method.run(features)
            seconds = time.perf_counter() - features.seconds - method_start  # without the model's
            runs.append(Run(task, method, split, outcome, round(seconds, 3)))
        in_model += features.seconds
        of_task = [run for run in runs if run.task is task]
        files[f"samples_{task.name}.jsonl"] = samples_jsonl(of_task)
        for run in of_task:
            if run.method.name == "sav" and run.outcome.classifier is not None:
                title = f"{task.name}: which attention heads of {Path(load_once().name).name} tell the classes apart"
                files[f"heads_{task.name}.png"] = head_map(run.outcome.classifier, title)

    model: dict[str, Any] = {}
    if loaded:
        model = {"name": loaded[0].name, "fingerprint": loaded[0].fingerprint, "dtype": str(loaded[0].dtype)}
    ended = datetime.datetime.now(datetime.UTC)
    timing = {
        "start_time": began.isoformat(timespec="seconds"),
        "end_time": ended.isoformat(timespec="seconds"),
        "total_evaluation_time_seconds": round(time.perf_counter() - start, 3),
        "model_time_seconds": round(in_model, 3),
    }
    files["results.json"] = results_json(runs, settings, model, timing)
    write_folder(output, files)
    print(table(runs, settings.shots))
    for run in runs:
        if run.method.name == "sav":
            print(f"\n{chosen_heads(run)}")
    print(f"\nwritten to {output}: {', '.join(files)}")
    return runs
