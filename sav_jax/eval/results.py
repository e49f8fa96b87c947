"""Results as a table and as files in the shape of lmms-eval's, with the method in the place of its filter."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sav_jax.eval.methods import Method, Outcome, Settings
from sav_jax.eval.tasks import Split, Task, example_digest

_PACKAGES = ("sav-jax", "jax", "flax", "transformers", "numpy", "pillow", "scikit-learn")


@dataclass(frozen=True)
class Run:
    """One method on one task."""

    task: Task
    method: Method
    split: Split
    outcome: Outcome
    seconds: float  # without those spent in the model, whose features all methods share

    @property
    def right(self) -> np.ndarray | None:
        """Whether each query was answered correctly, bool [N]; None without predictions."""
        if self.outcome.predictions is None:
            return None
        return np.array(self.outcome.predictions) == np.array([query.label for query in self.split.queries])

    @property
    def accuracy(self) -> float:
        if self.right is None:
            assert self.outcome.accuracy is not None
            return self.outcome.accuracy
        return float(self.right.mean())

    @property
    def standard_error(self) -> float | None:
        """Of the accuracy, as lmms-eval takes it: sample standard deviation / sqrt(N)."""
        if self.right is None or len(self.right) < 2:
            return None
        return float(self.right.std(ddof=1) / np.sqrt(len(self.right)))


def table(runs: Sequence[Run], shots: int) -> str:
    """A Markdown table, aligned so that it also reads as plain text."""
    head = ["task", "method", "shots", "accuracy", "stderr", "queries"]
    rows = []
    for run in runs:
        error = run.standard_error
        rows.append(
            [
                run.task.name,
                run.method.name,
                str(shots if run.method.uses_support else 0),
                f"{run.accuracy:.4f}",
                "" if error is None else f"{error:.4f}",
                str(len(run.split.queries)),
            ]
        )
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    text, number = (lambda cell, width: cell.ljust(width)), (lambda cell, width: cell.rjust(width))
    align = [text, text, number, number, number, number]
    rule = [("-" * width) if pad is text else "-" * (width - 1) + ":" for pad, width in zip(align, widths, strict=True)]
    lines = [head, rule, *rows]
    return "\n".join(
        "| " + " | ".join(pad(cell, width) for pad, cell, width in zip(align, line, widths, strict=True)) + " |"
        for line in lines
    )


def chosen_heads(run: Run) -> str:
    """The heads that a run chose, best first, in one line."""
    classifier = run.outcome.classifier
    assert classifier is not None
    heads = [f"{layer}.{head} ({classifier.scores[layer, head]})" for layer, head in classifier.heads]
    return (
        f"{run.task.name}, {run.method.name}: layer.head (of {len(run.split.support)} examples right), best first: "
        + ", ".join(heads)
    )


def results_json(runs: Sequence[Run], settings: Settings, model: dict[str, Any], timing: dict[str, Any]) -> bytes:
    """Make ``results.json``: lmms-eval's keys, ``"acc,METHOD"`` being its ``"acc,FILTER"``; ours under ``sav_jax``."""
    tasks = {run.task.name: run for run in runs}
    results: dict[str, dict[str, Any]] = {name: {"alias": name} for name in tasks}
    heads: dict[str, dict[str, Any]] = {}
    for run in runs:
        entry = results[run.task.name]
        entry[f"acc,{run.method.name}"] = run.accuracy
        entry[f"acc_stderr,{run.method.name}"] = "N/A" if run.standard_error is None else run.standard_error
        if classifier := run.outcome.classifier:
            heads.setdefault(run.task.name, {})[run.method.name] = {
                "heads": classifier.heads,
                "head_scores": classifier.scores.tolist(),
            }
    content = {
        "results": results,
        "group_subtasks": {},
        "configs": {
            name: {
                "task": name,
                "description": run.task.description,
                "output_type": "multiple_choice",
                "doc_to_choice": run.split.labels,
                "doc_to_text": sorted({example.question for example in run.split.queries})[:10],
                "num_fewshot": settings.shots,
                "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
                "metadata": {"version": run.task.version},
            }
            for name, run in tasks.items()
        },
        "versions": {name: run.task.version for name, run in tasks.items()},
        "n-shot": dict.fromkeys(tasks, settings.shots),
        "higher_is_better": {name: {"acc": True} for name in tasks},
        "n-samples": {
            name: {"original": run.split.available, "effective": len(run.split.queries)} for name, run in tasks.items()
        },
        "config": {
            "model": "sav_jax",
            "model_args": model,
            "batch_size": settings.batch_size,
            "limit": settings.limit,
            "random_seed": settings.seed,
            "num_heads": settings.num_heads,
        },
        "task_hashes": {name: run.split.digest for name, run in tasks.items()},
        "model_source": "sav_jax",
        "model_name": model.get("name"),
        **timing,
        "sav_jax": {
            "heads": heads,
            "seconds": {
                name: {run.method.name: run.seconds for run in runs if run.task.name == name} for name in tasks
            },
            "versions": {"python": platform.python_version()}
            | {package: importlib.metadata.version(package) for package in _PACKAGES},
        },
    }
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def samples_jsonl(runs: Sequence[Run]) -> bytes:
    """``samples_TASK.jsonl``: one row per query and method, in lmms-eval's shape; the runs are of one task."""
    digests = [example_digest(query) for query in runs[0].split.queries]
    lines = []
    for run in runs:
        if run.outcome.predictions is None:
            continue
        for index, (query, prediction) in enumerate(zip(run.split.queries, run.outcome.predictions, strict=True)):
            line: dict[str, Any] = {
                "doc_id": index,
                "filter": run.method.name,
                "doc": {"id": query.id, "source": query.source},
                "input": query.question,
                "target": query.label,
                "resps": [[prediction]],
                "filtered_resps": [prediction],
                "doc_hash": digests[index],
                "acc": float(prediction == query.label),
            }
            if run.outcome.probabilities is not None:
                row = run.outcome.probabilities[index]
                line["probabilities"] = {
                    name: round(float(p), 6) for name, p in zip(run.split.labels, row, strict=True)
                }
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines).encode()
