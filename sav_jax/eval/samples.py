"""``samples_KEY.jsonl``: every single answer, in lmms-eval's shape, with the method in the place of its filter."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sav_jax.eval.metrics import Answers, Units
from sav_jax.eval.results import PACKAGES, Run, Summary
from sav_jax.eval.tasks.base import Task

_PIXEL_LIMITS = ("size", "crop_size", "min_pixels", "max_pixels", "image_grid_pinpoints")


def samples_jsonl(summaries: Sequence[Summary], model: Mapping[str, Any] | None = None) -> bytes:
    """One row per seed, method and query, in lmms-eval's shape; the summaries are of one key.

    Every row says what it depends on: prompt (with the ids of the demonstrations shown before it), split, version of
    the task, versions of the libraries, pixel limits, and the model's fingerprint, which covers its weights, tokenizer,
    chat template and all settings of its processor.

    Args:
      summaries: of one key.
      model: its facts in ``results.json``, or None if no model was needed.
    """
    model = model or {}
    settings = model.get("image_processor", {})
    facts = {
        "model_fingerprint": model.get("fingerprint"),
        "pixel_limits": {name: settings[name] for name in _PIXEL_LIMITS if name in settings},
        "sav_jax_version": importlib.metadata.version("sav-jax"),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
    }
    runs = [run for summary in summaries for run in summary.runs if run.answers is not None]
    return b"".join(_samples(run, facts) for run in runs)


def _samples(run: Run, facts: Mapping[str, Any]) -> bytes:
    answers, lines = run.answers, []
    assert answers is not None
    graded = _graded(run.task, answers)
    shown = run.outcome.facts.get("demonstrations")
    for index, (item, prediction) in enumerate(zip(answers.items, answers.predictions, strict=True)):
        said = prediction if answers.texts is None else answers.texts[index]
        line: dict[str, Any] = {
            "doc_id": run.numbers[index],
            "seed": run.seed,
            "shots": run.shots,
            "filter": run.method.name,
            "doc": {
                "id": item.example.id,
                "source": item.example.source,
                "group": item.group,
                "role": item.role,
                "subset": item.subset,
            },
            "input": item.example.question,
            "target": item.example.label,
            **({"demonstrations": shown} if shown is not None else {}),
            "resps": [[said]],
            "filtered_resps": [prediction],
            "doc_hash": run.names[index],
            "split_hash": run.split.digest,
            "task_version": run.task.version,
            **facts,
        }
        if run.task.generative:
            line["references"] = item.references
            line |= {name: float(values[index]) for name, values in graded.items()}
        else:
            line["acc"] = float(prediction == item.example.label)
        if answers.probabilities is not None:
            shares = zip(answers.labels, answers.probabilities[index], strict=True)
            line["probabilities"] = {label: float(f"{p:.9g}") for label, p in shares}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


def _graded(task: Task, answers: Answers) -> dict[str, np.ndarray]:
    """What each answer to a generative task's queries scores, metric -> float [Q]."""
    found = {metric.name: metric.compute(answers) for metric in task.metrics if task.generative}
    return {name: value.values for name, value in found.items() if isinstance(value, Units)}
