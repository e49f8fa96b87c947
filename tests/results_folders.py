"""Results folders as ``sav-jax eval`` writes them, with made-up answers: the same items for the same arguments."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image


@dataclass(frozen=True)
class Made:
    """What a results folder is made of.

    Attributes:
      methods: name -> probability of a right answer to a query of middling difficulty.
      tasks: name -> class names.
      pool: items of each task, of which shots x classes are taken by the support.
      group: items of one group, 1 for none.
      bare: methods that have no probabilities.
      heads: layers and heads per layer of the model, None for no "sav" in the results.
      prompt: the question.
      version: of every task.
      model: its name.
      images: whether disagreements have pictures.
    """

    methods: Mapping[str, float]
    tasks: Mapping[str, Sequence[str]] = field(default_factory=lambda: {"colours": ("red", "green", "blue")})
    shots: tuple[int, ...] = (5,)
    seeds: tuple[int, ...] = (0,)
    pool: int = 75
    group: int = 1
    bare: tuple[str, ...] = ("zero-shot",)
    heads: tuple[int, int] | None = (4, 6)
    prompt: str = "Which is it?"
    version: int = 1
    model: str = "tiny"
    images: bool = True


def write_results(folder: Path, made: Made) -> Path:
    """Write the folder and return it."""
    folder.mkdir(parents=True)
    keys, ours = _content(made)
    results: dict[str, Any] = {key: {"alias": key} for key in keys}
    for run in ours["runs"]:
        for name, values in run["metrics"].items():
            results[run["key"]][f"{name},{run['method']}"] = values["mean"]
            stderr = "N/A" if values["stderr"] is None else values["stderr"]
            results[run["key"]][f"{name}_stderr,{run['method']}"] = stderr
    lower = ("brier", "ece")
    content = {
        "results": results,
        "group_subtasks": {},
        "configs": {key: {"task": task, "num_fewshot": shots} for key, (task, shots) in keys.items()},
        "versions": dict.fromkeys(keys, made.version),
        "n-shot": {key: shots for key, (_, shots) in keys.items()},
        "higher_is_better": {key: {name: name not in lower for name in ("acc", "macro_f1", *lower)} for key in keys},
        "n-samples": {key: {"original": made.pool, "effective": made.pool} for key in keys},
        "config": {
            "model": "sav_jax",
            "model_args": {"name": made.model, "fingerprint": "f" * 64, "dtype": "float32"},
            "batch_size": 8,
            "limit": None,
            "num_heads": 3,
            "seeds": list(made.seeds),
            "shots": list(made.shots),
        },
        "task_hashes": dict.fromkeys(keys, "0" * 64),
        "model_source": "sav_jax",
        "model_name": made.model,
        "start_time": "2026-11-24T10:00:00+00:00",
        "end_time": "2026-11-24T10:01:05+00:00",
        "total_evaluation_time_seconds": 65.0,
        "sav_jax": ours,
    }
    for key, rows in ours.pop("samples").items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"samples_{key}.jsonl").write_text(text, encoding="utf-8")
    for name, picture in ours.pop("pictures").items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(picture)
    (folder / "results.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return folder


def _content(made: Made) -> tuple[dict[str, tuple[str, int]], dict[str, Any]]:
    ours: dict[str, Any] = {
        "runs": [],
        "tasks": {
            task: {
                "description": f"made-up {task}",
                "labels": list(labels),
                "metric": "acc",
                "version": made.version,
                "source": "drawn at random",
                "prompt": made.prompt,
            }
            for task, labels in made.tasks.items()
        },
        "splits": {},
        "heads": {},
        "curves": {},
        "disagreements": {},
        "passes": {"forward": made.pool, "prompts": made.pool},
        "versions": {"python": "3.11.9", "sav-jax": "0.1.0", "jax": "0.10.2"},
        "samples": {},
        "pictures": {},
    }
    keys = {}
    for task, labels in made.tasks.items():
        for shots in made.shots:
            key = task if len(made.shots) == 1 else f"{task}_{shots}shot"
            keys[key] = task, shots
            _task(made, task, list(labels), shots, key, ours)
    return keys, ours


def _task(made: Made, task: str, labels: list[str], shots: int, key: str, ours: dict[str, Any]) -> None:
    support = shots * len(labels)
    rows: list[dict[str, Any]] = []
    asked: dict[int, np.ndarray] = {}
    for seed in made.seeds:
        order = _rng(task, seed).permutation(made.pool // made.group)
        taken = set(order[: -(-support // made.group)].tolist())
        asked[seed] = np.array([i for i in range(made.pool) if i // made.group not in taken])
        ours["splits"].setdefault(key, {})[str(seed)] = {
            "digest": hashlib.sha256(f"{task} {seed}".encode()).hexdigest(),
            "support": support,
            "queries": len(asked[seed]),
            "available": len(asked[seed]),
            "leaked": 0,
        }
    for method, skill in made.methods.items():
        per_seed: dict[str, list[float]] = {}
        for seed in made.seeds:
            of_seed = [
                _row(made, task, labels, shots, method, skill, seed, place, i) for place, i in enumerate(asked[seed])
            ]
            for name, value in _metrics(of_seed).items():
                per_seed.setdefault(name, []).append(value)
            rows += of_seed
        n = len(asked[made.seeds[0]])
        ours["runs"].append(
            {
                "task": task,
                "key": key,
                "method": method,
                "shots": shots,
                "seeds": list(made.seeds),
                "metric": "acc",
                "uses_support": not method.startswith("zero-shot"),
                "metrics": {name: _estimate(values, n) for name, values in per_seed.items()},
                "subsets": {},
                "seconds": 0.25,
                "temperature": None,
                "facts": {},
            }
        )
    ours["samples"][key] = rows
    if made.heads is not None and "sav" in made.methods:
        _heads(made, key, len(labels), support, made.methods["sav"], ours)
        _disagreements(made, key, labels, [row for row in rows if row["filter"] == "sav"][:3], ours)


def _row(
    made: Made, task: str, labels: list[str], shots: int, method: str, skill: float, seed: int, place: int, item: int
) -> dict[str, Any]:
    target = labels[item % len(labels)]
    difficulty = _rng(task, item).uniform(-0.15, 0.15)
    rng = _rng(task, shots, method, seed, item)
    gain = 0.0 if method.startswith("zero-shot") else 0.03 * np.log2(shots / 5 + 1)
    sure = float(np.clip(skill + gain + difficulty, 0, 1))
    prediction = target
    if rng.random() >= sure:
        prediction = labels[(item + 1 + int(rng.integers(len(labels) - 1))) % len(labels)]
    row: dict[str, Any] = {
        "doc_id": place,
        "seed": seed,
        "shots": shots,
        "filter": method,
        "doc": {
            "id": f"{task}-{item}",
            "source": f"{task}.jsonl row {item}",
            "group": f"g{item // made.group}" if made.group > 1 else "",
            "role": "",
            "subset": "",
        },
        "input": made.prompt,
        "target": target,
        "resps": [[prediction]],
        "filtered_resps": [prediction],
        "doc_hash": hashlib.sha256(f"{made.prompt} {task} {item} {target}".encode()).hexdigest(),
        "acc": float(prediction == target),
    }
    if method not in made.bare:
        shares = np.full(len(labels), 0.0)
        shares[labels.index(prediction)] = np.clip(rng.normal(sure, 0.1), 1 / len(labels), 0.999)
        others = np.ones(len(labels))
        others[labels.index(prediction)] = 0
        shares += others / others.sum() * (1 - shares.sum())
        row["probabilities"] = {label: round(float(p), 6) for label, p in zip(labels, shares, strict=True)}
    return row


def _metrics(rows: list[dict[str, Any]]) -> dict[str, float]:
    right = np.array([row["acc"] for row in rows])
    found = {"acc": float(right.mean()), "macro_f1": float(right.mean())}
    if "probabilities" in rows[0]:
        sure = np.array([max(row["probabilities"].values()) for row in rows])
        found |= {"brier": float(((right - sure) ** 2).mean()), "ece": abs(float((right - sure).mean()))}
    return found


def _estimate(per_seed: list[float], count: int) -> dict[str, Any]:
    mean = float(np.mean(per_seed))
    stderr = float(np.sqrt(max(mean * (1 - mean), 0) / count))
    return {
        "mean": mean,
        "sd": float(np.std(per_seed, ddof=1)) if len(per_seed) > 1 else None,
        "stderr": stderr,
        "ci": [mean - 2 * stderr, mean + 2 * stderr],
        "per_seed": per_seed,
    }


def _heads(made: Made, key: str, classes: int, support: int, skill: float, ours: dict[str, Any]) -> None:
    assert made.heads is not None
    layers, per_layer = made.heads
    for seed in made.seeds:
        rng = _rng(key, seed, "heads")
        depth = np.linspace(0.2, 1, layers)[:, None]
        share = 1 / classes + (1 - 1 / classes) * skill * depth * rng.beta(3, 2, (layers, per_layer))
        scores = np.rint(share * support).astype(int)
        order = np.argsort(-scores, axis=None, kind="stable")[: min(20, scores.size // 4)]
        ours["heads"].setdefault(key, {}).setdefault("sav", {})[str(seed)] = {
            "heads": [[int(i) // per_layer, int(i) % per_layer] for i in order],
            "head_scores": scores.tolist(),
            "support": support,
        }
    numbers = [n for n in (1, 2, 5, 10, 20, 50, 100, 200) if n < layers * per_layer]
    depths = list(range(1, layers + 1))

    def rising(x: list[int], seed: int) -> list[float]:
        noise = _rng(key, seed, len(x)).normal(0, 0.01, len(x))
        return [float(np.clip(skill * (1 - 0.5 * 0.7**i) + e, 0, 1)) for i, e in enumerate(noise)]

    ours["curves"][key] = {
        "sav": {
            "heads": {"x": numbers, "per_seed": [rising(numbers, seed) for seed in made.seeds]},
            "depth": {"x": depths, "per_seed": [rising(depths, seed) for seed in made.seeds]},
        }
    }


def _disagreements(made: Made, key: str, labels: list[str], rows: list[dict[str, Any]], ours: dict[str, Any]) -> None:
    for row in rows:
        name = f"images/{key}_{row['doc_id']}_0.png"
        if made.images:
            buffer = io.BytesIO()
            pixels = _rng(key, row["doc_id"]).integers(0, 255, (8, 10, 3)).astype(np.uint8)
            image = PIL.Image.fromarray(pixels).resize((160, 128), PIL.Image.Resampling.NEAREST)
            image.save(buffer, "PNG")
            ours["pictures"][name] = buffer.getvalue()
        wrong = next(label for label in labels if label != row["target"])
        ours["disagreements"].setdefault(key, []).append(
            {
                "seed": row["seed"],
                "doc_id": row["doc_id"],
                "doc_hash": row["doc_hash"],
                "question": row["input"],
                "target": row["target"],
                "prediction": row["filtered_resps"][0],
                "votes": {row["target"]: 11, wrong: 9},
                "images": [name] if made.images else [],
            }
        )


def _rng(*facts: object) -> np.random.Generator:
    digest = hashlib.sha256(repr(facts).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))
