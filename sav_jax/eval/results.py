"""Results: what was measured, as a table and as files in the shape of lmms-eval's, with the method in the place of its
filter.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sav_jax.eval.calibration import fit_temperature, probabilities
from sav_jax.eval.features import Features
from sav_jax.eval.methods.base import Method, Outcome
from sav_jax.eval.metrics import Answers, Metric, Units
from sav_jax.eval.statistics import Interval, cluster_interval, resampled_interval
from sav_jax.eval.sweeps import Sweep
from sav_jax.eval.tables import aligned
from sav_jax.eval.tasks.base import Split, Task

PACKAGES = ("sav-jax", "jax", "flax", "transformers", "numpy", "pillow", "scikit-learn", "scipy")
_RESAMPLES = 200  # of metrics that are no means: each is computed anew


@dataclass(frozen=True)
class Run:
    """One method on one split of one task.

    Attributes:
      task, method, split, outcome: what was asked, how, and what came out.
      shots, seed: of the split.
      answers: what metrics are computed from; None if the method has no predictions.
      temperature: that made probabilities of its scores, if it has scores.
      seconds: without those spent in models, whose features all methods share.
      names: a digest of each query.
      numbers: place of each query in the task's data.
      sweep: curves, of the method "sav".
    """

    task: Task
    method: Method
    split: Split
    outcome: Outcome
    shots: int
    seed: int
    answers: Answers | None
    temperature: float | None
    seconds: float
    names: tuple[str, ...]
    numbers: tuple[int, ...]
    sweep: Sweep | None = None


def make_run(
    features: Features,
    method: Method,
    outcome: Outcome,
    names: tuple[str, ...],
    seconds: float,
    sweep: Sweep | None,
    numbers: tuple[int, ...] | None = None,
) -> Run:
    """Turn a method's scores into probabilities and gather what results are made of (see :class:`Run`)."""
    split, settings = features.split, features.settings
    temperature, shares, answers = None, None, None
    if outcome.scores is not None:
        temperature = 1.0
        if outcome.support_scores is not None:
            temperature = fit_temperature(outcome.support_scores, features.targets)
        shares = probabilities(outcome.scores, temperature)
    if outcome.predictions is not None:
        answers = Answers(
            split.queries, split.labels, outcome.predictions, outcome.scores, shares, outcome.texts, names, split.corpus
        )
    return Run(
        task=features.task,
        method=method,
        split=split,
        outcome=outcome,
        shots=settings.shots,
        seed=settings.seed,
        answers=answers,
        temperature=temperature,
        seconds=seconds,
        names=names,
        numbers=numbers or tuple(range(len(names))),
        sweep=sweep,
    )


@dataclass(frozen=True)
class Estimate:
    """A metric over all seeds.

    Attributes:
      mean: over the seeds.
      sd: sample standard deviation between seeds, None with one seed.
      stderr, ci: of the mean, by resampling queries; None where they were not computed.
      per_seed: the values.
    """

    mean: float
    sd: float | None
    stderr: float | None
    ci: tuple[float, float] | None
    per_seed: tuple[float, ...]


@dataclass(frozen=True)
class Summary:
    """A method on a task with one number of shots, over all seeds."""

    key: str
    runs: tuple[Run, ...]
    metrics: Mapping[str, Estimate]
    subsets: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def task(self) -> Task:
        return self.runs[0].task

    @property
    def method(self) -> Method:
        return self.runs[0].method

    @property
    def shots(self) -> int:
        return self.runs[0].shots

    @property
    def primary(self) -> str:
        """The metric to look at: the task's, or accuracy where the method does not have it (no probabilities)."""
        return self.task.metric if self.task.metric in self.metrics else "acc"


def summarise(key: str, runs: Sequence[Run]) -> Summary:
    """Compute every metric of the runs of one method on one task with one number of shots."""
    runs = tuple(runs)
    task = runs[0].task
    if runs[0].answers is None:
        values = tuple(float(run.outcome.accuracy) for run in runs if run.outcome.accuracy is not None)
        return Summary(key, runs, {"acc": _estimate(values, None)})
    answers = [run.answers for run in runs if run.answers is not None]
    metrics = {}
    for metric in task.all_metrics:
        estimate = _measure(metric, answers, primary=metric.name == task.metric)
        if estimate is not None:
            metrics[metric.name] = estimate
    return Summary(key, runs, metrics, _subsets(task, answers))


def _measure(metric: Metric, answers: Sequence[Answers], *, primary: bool) -> Estimate | None:
    values = [metric.compute(part) for part in answers]
    units = [value for value in values if isinstance(value, Units)]
    if len(units) == len(values):
        per_seed = tuple(float(part.values.mean()) for part in units)
        return _estimate(per_seed, cluster_interval([u.values for u in units], [u.clusters for u in units]))
    numbers = tuple(value for value in values if isinstance(value, float))
    if len(numbers) < len(values):
        return None
    return _estimate(numbers, _whole_interval(metric, answers) if primary else None)


def _whole_interval(metric: Metric, answers: Sequence[Answers]) -> Interval:
    """Of a metric that is no mean: resample clusters of queries and compute it anew."""
    starts = np.cumsum([0, *(len(part.items) for part in answers)])
    seeds = np.repeat(np.arange(len(answers)), np.diff(starts))

    def compute(index: np.ndarray) -> float:
        """On queries of one seed, numbered through over all seeds."""
        seed = seeds[index[0]]
        value = metric.compute(answers[seed].take(index - starts[seed]))
        return value if isinstance(value, float) else float("nan")

    clusters = [name for part in answers for name in part.clusters]
    return resampled_interval(compute, len(seeds), clusters=clusters, seeds=seeds.tolist(), resamples=_RESAMPLES)


def _estimate(per_seed: tuple[float, ...], interval: Interval | None) -> Estimate:
    sd = float(np.std(per_seed, ddof=1)) if len(per_seed) > 1 else None
    if interval is None or np.isnan(interval.stderr):
        return Estimate(float(np.mean(per_seed)), sd, None, None, per_seed)
    return Estimate(float(np.mean(per_seed)), sd, interval.stderr, interval.ci, per_seed)


def _subsets(task: Task, answers: Sequence[Answers]) -> dict[str, dict[str, float]]:
    """Means over the seeds of every metric on each named part of the data."""
    found: dict[str, dict[str, float]] = {}
    for subset in sorted({item.subset for part in answers for item in part.items if item.subset}):
        parts = [part.take(np.flatnonzero([item.subset == subset for item in part.items])) for part in answers]
        for metric in task.all_metrics:
            values = [metric.compute(part) for part in parts if part.items]
            numbers = [float(v.values.mean()) if isinstance(v, Units) else v for v in values if v is not None]
            if numbers:
                found.setdefault(subset, {})[metric.name] = float(np.mean(numbers))
    return found


# The table


def table(summaries: Sequence[Summary]) -> str:
    """A Markdown table, aligned so that it also reads as plain text.

    A method that sees no labelled examples has one row for all numbers of shots, unless they leave it other queries.
    """
    several = any(len(summary.runs) > 1 for summary in summaries)
    head = ["task", "method", "shots", "metric", "value", "stderr", "95 % interval"]
    head += ["sd of seeds"] * several + ["queries"]
    rows: list[list[str]] = []
    free: dict[tuple[str, str], dict[tuple[str, ...], None]] = {}  # queries of methods without support
    for summary in summaries:
        if not summary.method.uses_support:
            asked = free.setdefault((summary.task.name, summary.method.name), {})
            asked[_asked(summary)] = None
    told: set[tuple[str, str, tuple[str, ...]]] = set()
    note = ""
    for summary in summaries:
        name = summary.primary
        estimate = summary.metrics[name]
        shots = str(summary.shots)
        if not summary.method.uses_support:
            row = (summary.task.name, summary.method.name, _asked(summary))
            if row in told:
                continue
            told.add(row)
            shots = "0" if len(free[row[:2]]) == 1 else f"0 ({summary.shots})"
            if len(free[row[:2]]) > 1:
                note = f"0 ({summary.shots}): no labelled example seen, queries as {summary.shots} per class leave them"
        rows.append(
            [
                summary.task.name,
                summary.method.name,
                shots,
                name,
                f"{estimate.mean:.4f}",
                "" if estimate.stderr is None else f"{estimate.stderr:.4f}",
                "" if estimate.ci is None else f"{estimate.ci[0]:.3f} - {estimate.ci[1]:.3f}",
                *(["" if estimate.sd is None else f"{estimate.sd:.4f}"] * several),
                str(len(summary.runs[0].split.queries)),
            ]
        )
    text = aligned(head, rows, {0, 1, 3})
    return f"{text}\n\n{note}" if note else text


def _asked(summary: Summary) -> tuple[str, ...]:
    """What tells the queries of one number of shots from those of another."""
    return tuple(name for run in summary.runs for name in run.names)


def chosen_heads(run: Run) -> str:
    """The heads that a run chose, best first, in one line."""
    classifier = run.outcome.classifier
    assert classifier is not None
    heads = [f"{layer}.{head} ({classifier.scores[layer, head]})" for layer, head in classifier.heads]
    return (
        f"{run.task.name}, {run.method.name}, {run.shots} shots, seed {run.seed}: layer.head (of "
        f"{len(run.split.support)} examples right), best first: " + ", ".join(heads)
    )


# The files


def results_json(
    summaries: Sequence[Summary],
    config: Mapping[str, Any],
    model: Mapping[str, Any],
    timing: Mapping[str, Any],
    extra: Mapping[str, Any],
    groups: Mapping[str, tuple[str, ...]],
) -> bytes:
    """Make ``results.json``: lmms-eval's keys, ``"acc,METHOD"`` being its ``"acc,FILTER"``; ours under ``sav_jax``.

    Args:
      summaries: what was measured.
      config: what the command was asked for.
      model: name, fingerprint and the like; empty if no model was needed.
      timing: start, end, seconds.
      extra: further entries of ``sav_jax``.
      groups: benchmarks of several tasks -> names of tasks.
    """
    first = {summary.key: summary for summary in reversed(summaries)}
    keys = list(dict.fromkeys(summary.key for summary in summaries))
    results: dict[str, dict[str, Any]] = {
        key: {"alias": first[key].task.name if key == first[key].task.name else f"{first[key].task.name} "
              f"({first[key].shots} shots)"}
        for key in keys
    }  # fmt: skip
    for summary in summaries:
        for name, estimate in summary.metrics.items():
            results[summary.key][f"{name},{summary.method.name}"] = estimate.mean
            results[summary.key][f"{name}_stderr,{summary.method.name}"] = (
                "N/A" if estimate.stderr is None else estimate.stderr
            )
    run = {first[key].task.name for key in keys}
    subtasks = {
        group: [key for key in keys if first[key].task.name in names]
        for group, names in groups.items()
        if run.issuperset(names)  # the mean over a part of a benchmark is not its score
    }
    means = _groups_json(summaries, subtasks)
    for group, scores in means.items():
        results[group] = {"alias": group} | {f"mean,{name}": score["mean"] for name, score in scores.items()}
    of_task = {key: {metric.name: metric.higher_is_better for metric in first[key].task.all_metrics} for key in keys}
    content = {
        "results": results,
        "groups": {group: results[group] for group in means},
        "group_subtasks": subtasks,
        "configs": {key: _task_config(first[key]) for key in keys},
        "versions": {key: first[key].task.version for key in keys},
        "n-shot": {key: first[key].shots for key in keys},
        "higher_is_better": of_task,
        "n-samples": {
            key: {
                "original": first[key].runs[0].split.available,
                "effective": len(first[key].runs[0].split.queries),
            }
            for key in keys
        },
        "config": {"model": "sav_jax", "model_args": dict(model), **config},
        "task_hashes": {key: first[key].runs[0].split.digest for key in keys},
        "model_source": "sav_jax",
        "model_name": model.get("name"),
        **timing,
        "sav_jax": {
            "runs": [_summary_json(summary) for summary in summaries],
            "tasks": {first[key].task.name: _task_json(first[key].task, first[key].runs[0].split) for key in keys},
            "splits": {key: {str(run.seed): _split_json(run.split) for run in first[key].runs} for key in keys},
            "heads": _by_key(summaries, _heads_json),
            "curves": _by_key(summaries, _curves_json),
            "groups": means,
            **extra,
            "versions": {"python": platform.python_version()}
            | {package: importlib.metadata.version(package) for package in PACKAGES},
        },
    }
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _task_config(summary: Summary) -> dict[str, Any]:
    task, split = summary.task, summary.runs[0].split
    return {
        "task": task.name,
        "description": task.description,
        "output_type": "generate_until" if task.generative else "multiple_choice",
        **({} if task.generative else {"doc_to_choice": split.labels}),
        "doc_to_text": sorted({item.example.question for item in split.queries})[:10],
        "num_fewshot": summary.shots,
        "metric_list": [
            {"metric": metric.name, "aggregation": "mean", "higher_is_better": metric.higher_is_better}
            for metric in task.all_metrics
            if metric.name in summary.metrics
        ],
        "metadata": {"version": task.version},
    }


def _task_json(task: Task, split: Split) -> dict[str, Any]:
    return {
        "description": task.description,
        "kind": task.kind,
        "labels": split.labels,
        "metric": task.metric,
        "version": task.version,
        "source": task.source,
        "prompt": task.prompt,
    }


def _split_json(split: Split) -> dict[str, Any]:
    return {
        "digest": split.digest,
        "support": len(split.support),
        "queries": len(split.queries),
        "available": split.available,
        "leaked": split.leaked,
    }


def _summary_json(summary: Summary) -> dict[str, Any]:
    temperatures = [run.temperature for run in summary.runs]
    return {
        "task": summary.task.name,
        "key": summary.key,
        "method": summary.method.name,
        "shots": summary.shots,
        "seeds": [run.seed for run in summary.runs],
        "metric": summary.primary,
        "uses_support": summary.method.uses_support,
        "metrics": {name: dataclasses.asdict(estimate) for name, estimate in summary.metrics.items()},
        "subsets": summary.subsets,
        "seconds": round(sum(run.seconds for run in summary.runs), 3),
        "temperature": None if None in temperatures else temperatures,
        "facts": {str(run.seed): run.outcome.facts for run in summary.runs if run.outcome.facts},
    }


def _by_key(summaries: Sequence[Summary], make: Any) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for summary in summaries:
        content = make(summary)
        if content:
            found.setdefault(summary.key, {})[summary.method.name] = content
    return found


def _heads_json(summary: Summary) -> dict[str, Any]:
    return {
        str(run.seed): {
            "heads": run.outcome.classifier.heads,
            "head_scores": run.outcome.classifier.scores.tolist(),
            "support": len(run.split.support),
        }
        for run in summary.runs
        if run.outcome.classifier is not None
    }


def _curves_json(summary: Summary) -> dict[str, Any]:
    sweeps = [run.sweep for run in summary.runs if run.sweep is not None]
    if not sweeps:
        return {}
    return {
        "heads": {"x": sweeps[0].numbers, "per_seed": [sweep.by_number for sweep in sweeps]},
        "depth": {"x": sweeps[0].depths, "per_seed": [sweep.by_depth for sweep in sweeps]},
    }


def _groups_json(summaries: Sequence[Summary], subtasks: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The mean over the tasks of each benchmark of several, by shots and method."""
    found: dict[str, Any] = {}
    for group, keys in subtasks.items():
        means: dict[str, list[float]] = {}
        for summary in summaries:
            if summary.key in keys:
                name = f"{summary.shots} shots, {summary.method.name}"
                means.setdefault(name, []).append(summary.metrics[summary.primary].mean)
        if means:
            found[group] = {name: {"mean": float(np.mean(v)), "tasks": len(v)} for name, v in means.items()}
    return found
