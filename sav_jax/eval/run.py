"""Run methods on tasks and write what came out."""

from __future__ import annotations

import dataclasses
import datetime
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sav_jax._files import check_output_folder, write_folder
from sav_jax._processes import by_the_first
from sav_jax._storage import Location, storage_errors
from sav_jax.errors import UserError
from sav_jax.eval.disagreements import disagreements
from sav_jax.eval.features import Features, Reader, Universe
from sav_jax.eval.methods.aim import NO_PROJECTION
from sav_jax.eval.methods.base import Method, Settings
from sav_jax.eval.methods.dual import FAMILIES, no_checkpoint
from sav_jax.eval.plots import head_map
from sav_jax.eval.results import (
    Run,
    Summary,
    chosen_heads,
    make_run,
    results_json,
    summarise,
    table,
)
from sav_jax.eval.samples import samples_jsonl
from sav_jax.eval.sweeps import sweep
from sav_jax.eval.tasks.base import Digests, Item, Split, Task, split_task
from sav_jax.lmm import LMM
from sav_jax.models.processor import image_settings
from sav_jax.task_vectors import Recipe


@dataclass(frozen=True)
class Plan:
    """What a comparison is run with.

    Attributes:
      shots, seeds: every number of shots is run with every seed.
      num_heads, demonstrations, mtv, lora_..., max_new_tokens, batch_size, cache, clip, siglip, aim: see
        :class:`sav_jax.eval.methods.Settings`.
      limit: answer only so many queries of each task; None for all.
      allow_leak: go on when a query also stands in the support.
      data_dir: folder of the benchmarks' files; those of a task are in its sub-folder.
      log_samples: write every single answer.
    """

    shots: tuple[int, ...] = (20,)
    seeds: tuple[int, ...] = (0,)
    num_heads: int = 20
    demonstrations: int = 4
    mtv: Recipe = field(default_factory=Recipe)
    lora_rank: int = 16
    lora_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    lora_steps: tuple[int, ...] = (100,)
    max_new_tokens: int = 32
    limit: int | None = None
    batch_size: int = 8
    cache: str | None = None
    clip: str | None = None
    siglip: str | None = None
    aim: str | None = None
    allow_leak: bool = False
    data_dir: Path = Path("data")
    log_samples: bool = True

    def settings(self, shots: int, seed: int) -> Settings:
        """What a method is run with on one split."""
        return Settings(
            shots=shots,
            seed=seed,
            num_heads=self.num_heads,
            demonstrations=self.demonstrations,
            mtv=self.mtv,
            lora_rank=self.lora_rank,
            lora_rates=self.lora_rates,
            lora_steps=self.lora_steps,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            cache=self.cache,
            clip=self.clip,
            siglip=self.siglip,
            aim=self.aim,
        )


def evaluate(
    load: Callable[[], LMM],
    tasks: Sequence[Task],
    methods: Sequence[Method],
    plan: Plan,
    output: Location,
    groups: Mapping[str, tuple[str, ...]] | None = None,
) -> list[Summary]:
    """Compare methods on tasks; print a table and write ``results.json``, ``samples_KEY.jsonl``, ``heads_KEY.png`` and
    ``images/``.

    Every distinct prompt passes through the model once, however many methods, numbers of shots and seeds look at it,
    and not at all if it is in the feature cache.

    Args:
      load: loads the model; called once, and only if a method needs it.
      tasks: what to answer.
      methods: how.
      plan: the rest.
      output: a folder; earlier results in it are replaced at the end, what else it holds stays.
      groups: benchmarks of several tasks -> names of their tasks.

    Returns:
      One summary per task, number of shots and method, in that order.

    Raises:
      UserError: for bad input; nothing is then written.
    """
    by_the_first(lambda: check_output_folder(output))
    _check(plan, methods, tasks)
    began, start = datetime.datetime.now(datetime.UTC), time.perf_counter()
    reader = Reader(load, plan.batch_size, plan.cache)
    summaries: list[Summary] = []
    files: dict[str, bytes] = {}
    strangest: dict[str, Any] = {}
    # All splits of all tasks before any model runs: a missing file or too small a class is found at once.
    prepared = [(task, *_split(task, plan)) for task in tasks]
    for task, universe_items, splits, digests, numbers in prepared:
        _say(f"{task.name}: {_described(splits)}")
        universe = Universe(
            task, universe_items, next(iter(splits.values())).labels, reader, max_new_tokens=plan.max_new_tokens
        )
        for shots in plan.shots:
            key = task.name if len(plan.shots) == 1 else f"{task.name}_{shots}shot"
            of_key = []
            for method in methods:
                runs = []
                for seed in plan.seeds:
                    features = Features(universe, splits[shots, seed], plan.settings(shots, seed))
                    runs.append(_run(features, method, digests, numbers))
                of_key.append(summarise(key, runs))
                best = of_key[-1].metrics[of_key[-1].primary]
                _say(f"  {key}, {method.name}: {of_key[-1].primary} {best.mean:.4f}")
            summaries += of_key
            if plan.log_samples:
                files[f"samples_{key}.jsonl"] = samples_jsonl(of_key, _model_facts(reader))
            for summary in of_key:
                run = summary.runs[0]
                if summary.method.name == "sav" and run.outcome.classifier is not None:
                    title = f"{task.name}: which attention heads of {Path(reader.lmm.name).name} tell the classes apart"
                    files[f"heads_{key}.png"] = head_map(run.outcome.classifier, title)
                    features = Features(universe, run.split, plan.settings(shots, run.seed))
                    strangest[key], pictures = disagreements(run, features, key)
                    files |= pictures

    timing = {
        "start_time": began.isoformat(timespec="seconds"),
        "end_time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "total_evaluation_time_seconds": round(time.perf_counter() - start, 3),
        "model_time_seconds": round(reader.seconds, 3),
    }
    config = {
        "batch_size": plan.batch_size,
        "limit": plan.limit,
        "random_seed": plan.seeds[0],
        "seeds": plan.seeds,
        "shots": plan.shots,
        "num_heads": plan.num_heads,
        "demonstrations": plan.demonstrations,
        "mtv": dataclasses.asdict(plan.mtv),
        "lora": {"rank": plan.lora_rank, "rates": plan.lora_rates, "steps": plan.lora_steps},
        "max_new_tokens": plan.max_new_tokens,
        "allow_leak": plan.allow_leak,
        "clip": plan.clip,
        "siglip": plan.siglip,
        "aim": plan.aim,
    }
    passes = {"forward": reader.passes, "prompts": len(reader.prompts), "patched": reader.patched_passes}
    if reader.demonstration_passes:
        passes["demonstrations"] = reader.demonstration_passes
    extra = {"passes": passes, "disagreements": strangest}
    files["results.json"] = results_json(summaries, config, _model_facts(reader), timing, extra, groups or {})
    by_the_first(lambda: _write(output, files))
    print(table(summaries))
    for summary in summaries:
        if summary.method.name == "sav":
            print(f"\n{chosen_heads(summary.runs[0])}")
    print(
        f"\nforward passes: {reader.passes} (distinct prompts: {len(reader.prompts)}, of which "
        f"{len(reader.prompts) - reader.passes} were in the cache)"
    )
    if reader.patched_passes:
        print(f"and {reader.patched_passes} with head outputs changed (mtv)")
    if reader.demonstration_passes:
        print(f"and {reader.demonstration_passes} over demonstrations by themselves (aim)")
    kept = [name for name in files if not name.startswith("images/")]
    print(f"written to {output}: {', '.join(kept)}")
    return summaries


def _write(output: Location, files: Mapping[str, bytes]) -> None:
    with storage_errors(output):
        former = [*output.glob("samples_*.jsonl"), *output.glob("heads_*.png")] if output.is_dir() else []
    write_folder(output, files)
    with storage_errors(output):
        for file in former:  # of an earlier run, whose results.json is no more
            if file.name not in files:
                file.unlink(missing_ok=True)


def _model_facts(reader: Reader) -> dict[str, Any]:
    """Of the model, for the files; empty if none was needed."""
    if "lmm" not in vars(reader):
        return {}
    lmm = reader.lmm
    return {
        "name": lmm.name,
        "fingerprint": lmm.fingerprint,
        "dtype": str(lmm.dtype),
        "chat_template": lmm.processor.chat_template,
        "image_processor": image_settings(lmm.processor.image_processor),  # pixel limits among others
    }


def _check(plan: Plan, methods: Sequence[Method], tasks: Sequence[Task]) -> None:
    for what, values in (("--shots", plan.shots), ("--seeds", plan.seeds)):
        if not values:
            raise UserError(f"{what} names no number")
        if len(set(values)) < len(values):
            raise UserError(f"{what} names a number twice")
    if plan.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be at least 1, not {plan.max_new_tokens}")
    if plan.aim is None and any(method.name in ("aim", "aim-likelihood") for method in methods):
        raise UserError(NO_PROJECTION)
    for family in FAMILIES:
        if getattr(plan, family) is None and any(method.name.startswith(f"{family}-") for method in methods):
            raise UserError(no_checkpoint(family))
    if plan.mtv.prompts < 1:
        raise UserError(f"--mtv-prompts must be at least 1, not {plan.mtv.prompts}")
    if plan.lora_rank < 1 or not plan.lora_rates or not plan.lora_steps or min(plan.lora_steps) < 1:
        raise UserError("--lora-rank and --lora-steps must be at least 1, and --lora-rates must name a rate")
    if any(not 0 < rate < float("inf") for rate in plan.lora_rates):
        raise UserError(f"--lora-rates must be above 0, not {', '.join(map(str, plan.lora_rates))}")
    if plan.mtv.steps < 0:
        raise UserError(f"--mtv-steps must be at least 0, not {plan.mtv.steps}")
    free = [task.name for task in tasks if task.generative]
    mute = [method.name for method in methods if not method.generates]
    if free and mute:
        from sav_jax.eval.methods import METHODS

        able = ", ".join(method.name for method in METHODS.values() if method.generates)
        raise UserError(
            f"--methods: {', '.join(mute)} only choose{'s' * (len(mute) == 1)} among classes, and the answers to "
            f"{', '.join(free)} are written freely; methods that write: {able}"
        )


def _split(task: Task, plan: Plan) -> tuple[tuple[Item, ...], dict[tuple[int, int], Split], Digests, dict[int, int]]:
    """All items that any split of a task holds, in the data's order; the splits; digests; and the place of each item
    (by its identity) in the data.
    """
    data = task.load(plan.data_dir / task.name)
    digests = Digests()
    splits = {
        (shots, seed): split_task(task, data, shots, seed, plan.limit, allow_leak=plan.allow_leak, digests=digests)
        for shots in plan.shots
        for seed in plan.seeds
    }
    used = {id(item) for split in splits.values() for item in (*split.support, *split.queries)}
    everything = {id(item): item for item in (*data.pool, *(data.queries or ()))}
    numbers = {name: number for number, name in enumerate(everything)}
    return tuple(item for name, item in everything.items() if name in used), splits, digests, numbers


def _run(features: Features, method: Method, digests: Digests, numbers: Mapping[int, int]) -> Run:
    in_model, start = features.reader.seconds, time.perf_counter()
    outcome = method.run(features)
    seconds = time.perf_counter() - start - (features.reader.seconds - in_model)
    curves = sweep(features, features.settings.num_heads) if method.name == "sav" else None
    names = tuple(digests.whole(item) for item in features.split.queries)
    places = tuple(numbers[id(item)] for item in features.split.queries)
    return make_run(features, method, outcome, names, seconds, curves, places)


def _described(splits: Mapping[tuple[int, int], Split]) -> str:
    first = next(iter(splits.values()))
    support = " or ".join(dict.fromkeys(str(len(split.support)) for split in splits.values()))
    queries = " or ".join(dict.fromkeys(str(len(split.queries)) for split in splits.values()))
    leaked = max(split.leaked for split in splits.values())
    told = f"; {leaked} QUERIES ALSO STAND IN THE SUPPORT" if leaked else ""
    kind = f"{len(first.labels)} classes" if first.labels else "free answers"
    return f"{kind}, {support} labelled examples, {queries} queries{told}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
