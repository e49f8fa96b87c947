"""What all parts of the study share: where it is kept, commands that are run once, differences and verdicts.

A part is a module with ``measure(study) -> Iterable[Finding]`` and, where it has them, ``tables(study) ->
list[Table]`` and ``plots(study) -> list[Path]``. Everything slow goes through :meth:`Study.command` or
:meth:`Study.kept`, which do nothing the second time, so that a study that was killed goes on where it was.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

import sav_jax
from sav_jax._files import write_file
from sav_jax.errors import UserError
from sav_jax.eval.statistics import Interval, paired_bootstrap
from sav_jax.eval.stored import Results
from sav_jax.lmm import LMM

ROOT = Path(__file__).parents[2]
MODELS = ("tiny", "tiny-qwen")
OUTPUT = "{output}"
"""Stands in a command for the folder that it writes to."""

HOLDS, FAILS, UNDECIDED, UNTESTED = "holds", "does not hold", "undecided", "not testable"


@dataclass(frozen=True)
class Finding:
    """One row: a claim tested on one model.

    Attributes:
      part: of the study: "savs", "beyond", "aim", "sq".
      claim: one sentence, the same for all models.
      source: paper, table or section.
      model: that it was tested on.
      setting: tasks, shots, and the margin that was subtracted, where the claim has one.
      values: named figures of the row, in %.
      difference: what the claim is about, in points; positive if it is as claimed.
      low, high: its 95 % interval.
      seeds: how many.
      queries: that each seed's figures rest on, of all tasks together; 0 where they are not of queries.
      note: what else one should know; each line is a remark of its own.
    """

    part: str
    claim: str
    source: str
    model: str
    setting: str
    values: dict[str, float]
    difference: float | None
    low: float | None
    high: float | None
    seeds: int
    queries: int = 0
    note: str = ""

    @property
    def verdict(self) -> str:
        """ "holds" if the whole interval is above 0, "does not hold" if it is below, else "undecided";
        "not testable" if a model lacks what the claim is about.
        """
        if self.difference is None:
            return UNTESTED
        if self.low is None or self.high is None:
            return UNDECIDED
        return HOLDS if self.low > 0 else FAILS if self.high < 0 else UNDECIDED


@dataclass(frozen=True)
class Table:
    """Figures behind the findings of a part: a title, column names, rows of text, and what to know about them."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """A model that is not bundled.

    Attributes:
      name: of folders, and on the page.
      path: what :func:`sav_jax.load` takes: an absolute path, or a hub id.
      fingerprint: of its files (:func:`sav_jax.lmm.checkpoint_fingerprint`).
    """

    name: str
    path: str
    fingerprint: str


@dataclass(frozen=True)
class Study:
    """A run of the study.

    Attributes:
      output: folder of everything that is measured.
      models: what is tested: bundled models, and names of ``others``.
      seeds: of the draws of labelled examples.
      quick: fewer queries, tasks and steps; a study to try the scripts, not to quote.
      pages: folder for the page and its pictures.
      say: is told what goes on.
      kept_only: what is not there is an error, not measured.
      others: models that are not bundled.
      tasks: of the first two parts, where they are not the study's own: name -> what ``--tasks`` calls it.
      data_dir: of the tasks' files; None for tasks that have none.
    """

    output: Path
    models: tuple[str, ...] = MODELS
    seeds: tuple[int, ...] = (0, 1, 2)
    quick: bool = False
    pages: Path = ROOT / "docs"
    say: Callable[[str], None] = field(default=lambda text: print(text, file=sys.stderr, flush=True))
    kept_only: bool = False
    others: tuple[Checkpoint, ...] = ()
    tasks: Mapping[str, str] = field(default_factory=dict)
    data_dir: Path | None = None

    @property
    def special(self) -> bool:
        """Whether it is about other models or other tasks than those of docs/reproduction.md."""
        return bool(self.others or self.tasks)

    @property
    def listed(self) -> tuple[str, ...]:
        """Models that have a place on the page."""
        return self.models if self.special else MODELS

    def bundled(self, model: str) -> bool:
        """Whether one knows what a model learned from."""
        return model not in {other.name for other in self.others}

    def checkpoint(self, model: str) -> str:
        """What :func:`sav_jax.load` and ``--model`` take."""
        return next((other.path for other in self.others if other.name == model), model)

    def load(self, model: str) -> LMM:
        """The model itself."""
        return sav_jax.load(self.checkpoint(model))

    def called(self, tasks: Sequence[str]) -> str:
        """What ``--tasks`` calls them."""
        return ",".join(self.tasks.get(task, task) for task in tasks)

    @property
    def options(self) -> str:
        """That make ``scripts/reproduce.sh`` measure this, with a space at the end; "" for the usual study."""
        told: list[str] = []
        if self.special:
            told += ["--models", ",".join(map(self.checkpoint, self.models))]
            told += ["--tasks", self.called(list(self.tasks))] if self.tasks else []
            told += ["--data-dir", str(self.data_dir)] if self.data_dir else []
            told += ["--quick"] if self.quick else []
            told += ["--output", self.shown(self.output)]
        return shlex.join(told) + " " * bool(told)

    @property
    def limit(self) -> int:
        """Queries per task and seed."""
        return 60 if self.quick else 400

    @property
    def cache(self) -> str:
        """Folder of features and compiled programs, for all commands and parts."""
        return str(self.output / "cache")

    @cached_property
    def _weights(self) -> dict[str, str]:
        """SHA-256 of the bundled models: what was measured with others is measured anew."""
        folders = {name: ROOT / "sav_jax" / "models" / name for name in MODELS}
        contents = {
            name: b"".join(file.read_bytes() for file in sorted(folder.glob("*.safetensors")))
            for name, folder in folders.items()
        }
        return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}

    def shown(self, path: Path) -> str:
        """A path as it stands in commands: from the root of the repository, if it is below it."""
        path = path.resolve()
        return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)

    def command(self, name: str, arguments: Sequence[str], *, script: str = "") -> Path:
        """Run ``sav-jax ARGUMENTS`` in a process of its own, unless that was done before.

        A folder that another command left is emptied; what a killed run of the same command left stays, so that
        commands that resume can.

        Args:
          name: of the folder below ``output`` that the command writes to, such as "savs/tiny/methods".
          arguments: of the command; :data:`OUTPUT` in them stands for that folder, and behind ``--model`` a name
            for its checkpoint, wherever that is.
          script: run ``python SCRIPT`` instead of ``sav-jax``, a path from the root of the repository.

        Returns:
          The folder.

        Raises:
          UserError: if the command fails (it names the file that holds what it printed), or would have to be run by a
            study that keeps to what is there.
        """
        folder, record = self.output / name, self.output / f"{name}.json"
        told = [argument.replace(OUTPUT, self.shown(folder)) for argument in arguments]
        told = [self.checkpoint(b) if a == "--model" else b for a, b in itertools.pairwise(["", *told])]
        first_words = ["python", script] if script else ["sav-jax"]
        line = shlex.join([*first_words, *told])
        key = self._key(name, shlex.join([*first_words, *arguments]))  # wherever the folder is
        before = _json(record)
        if before.get("key") == key and before.get("seconds") is not None and folder.exists():
            return folder
        self._may_measure(name)
        if before.get("key") != key and folder.exists():
            shutil.rmtree(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        _write_json(record, {"key": key, "command": line, "seconds": None})
        self.say(f"$ {line}")
        start = time.perf_counter()
        program = [sys.executable, *([script] if script else ["-m", "sav_jax"]), *told]
        log = self.output / f"{name}.log"
        with log.open("wb") as file:
            done = subprocess.run(
                program, cwd=ROOT, env=self._environment(), stdout=file, stderr=subprocess.STDOUT, check=False
            )
        if done.returncode:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise UserError(f"{line}: ended with {done.returncode}: {''.join(last)} (all of it: {log})")
        _write_json(record, {"key": key, "command": line, "seconds": round(time.perf_counter() - start, 1)})
        return folder

    def finished(self, name: str) -> bool:
        """Whether a command (:meth:`command`) has been run to its end."""
        return _json(self.output / f"{name}.json").get("seconds") is not None

    def kept(self, name: str, compute: Callable[[], Any], **facts: Any) -> Any:
        """What ``compute`` gives, computed once and kept as JSON.

        Args:
          name: of the file below ``output``, without its suffix, such as "savs/tiny/curves".
          compute: gives something that JSON can hold (tuples come back as lists).
          facts: everything that the result depends on; if they change it is computed anew. The study's ``quick``,
            ``seeds``, ``data_dir`` and the weights (of the bundled models, or of the other model that ``name`` has
            behind its first slash) always count.
        """
        file = self.output / f"{name}.json"
        key = self._key(name, json.dumps([facts, self.quick, self.seeds], sort_keys=True, default=str))
        before = _json(file)
        if before.get("key") == key:
            return before["value"]
        self._may_measure(name)
        self.say(f"measuring {name}")
        start = time.perf_counter()
        value = compute()
        file.parent.mkdir(parents=True, exist_ok=True)
        _write_json(file, {"key": key, "seconds": round(time.perf_counter() - start, 1), "value": value})
        return json.loads(json.dumps(value))

    def commands(self) -> list[tuple[str, float]]:
        """Commands that were run, with their seconds."""
        records = self._records()
        return [(of["command"], of["seconds"]) for of in records if of.get("command") and of.get("seconds") is not None]

    def hours(self) -> float:
        """Wall-clock time of all commands and measurements that are kept, hours."""
        return sum(float(of.get("seconds") or 0) for of in self._records() if of.get("key")) / 3600

    def minutes(self) -> dict[tuple[str, str], float]:
        """(folder, model) -> wall-clock time of the commands and measurements that are kept there."""
        found: dict[tuple[str, str], float] = {}
        for file in self._files():
            folder, model, *_ = (*file.relative_to(self.output).with_suffix("").parts, "")
            if (of := _json(file)).get("key"):
                found[folder, model] = found.get((folder, model), 0.0) + float(of.get("seconds") or 0) / 60
        return found

    def _files(self) -> list[Path]:
        cache = Path(self.cache)
        return [file for file in sorted(self.output.rglob("*.json")) if not file.is_relative_to(cache)]

    def _records(self) -> list[dict[str, Any]]:
        return [_json(file) for file in self._files()]

    def save(self, part: str, findings: Sequence[Finding], seconds: float, complete: bool = True) -> None:
        """Keep the findings of a part, a file for each model, so that models can be measured by processes of their
        own. Those of a part that is not ``complete`` never take the place of one that is: a killed run loses none.
        """
        folder = self.output / "findings"
        folder.mkdir(parents=True, exist_ok=True)
        for model in self.models:
            rows = [dataclasses.asdict(finding) for finding in findings if finding.model == model]
            if not complete and self.record(part, model).get("complete"):
                continue
            content = {"quick": self.quick, "seconds": round(seconds / len(self.models)), **machine(), "findings": rows}
            content["complete"] = complete
            _write_json(folder / f"{part}-{model}.json", content)

    def record(self, part: str, model: str) -> dict[str, Any]:
        """What :meth:`save` kept of a part and a model; empty if it was not measured."""
        return _json(self.output / "findings" / f"{part}-{model}.json")

    def findings(self, part: str) -> list[Finding]:
        """Those of a part that were kept, claim by claim, models side by side."""
        found = [Finding(**row) for model in self.listed for row in self.record(part, model).get("findings", [])]
        order = list(dict.fromkeys(finding.claim for finding in found))
        return sorted(found, key=lambda finding: order.index(finding.claim))

    def _may_measure(self, name: str) -> None:
        if self.kept_only:
            raise UserError(
                f"{self.shown(self.output / name)}: not there, or of other settings or weights; measure first"
            )

    def _key(self, name: str, text: str) -> str:
        prints = {other.name: other.fingerprint for other in self.others if other.name in name.split("/")[1:2]}
        facts = [text, sav_jax.__version__, prints or self._weights]
        if self.data_dir is not None:
            facts.append(str(self.data_dir))
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _environment(self) -> dict[str, str]:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        return {**os.environ, "SAV_JAX_CACHE": self.cache, "PYTHONPATH": path}


@dataclass(frozen=True)
class Answers:
    """Which queries something got right: for each seed, values [Q] (1, 0, or a share) and the queries' clusters."""

    values: tuple[np.ndarray, ...]
    clusters: tuple[tuple[str, ...], ...]

    @property
    def mean(self) -> float:
        """In %."""
        return 100 * float(np.mean([values.mean() for values in self.values]))


@dataclass(frozen=True)
class Difference(Interval):
    """A difference in points, and how many queries of a seed it rests on, of all tasks together."""

    queries: int = 0


def difference(better: Mapping[str, Answers], worse: Mapping[str, Answers], margin: float = 0.0) -> Difference:
    """How far ``better`` is ahead of ``worse`` on the same queries, in points, plus ``margin``: the mean over tasks.

    Queries (or their groups) are resampled, jointly over seeds and over whatever both sides answered: see
    :func:`sav_jax.eval.statistics.paired_bootstrap`. Every task counts alike.

    Args:
      better, worse: task -> answers, the same tasks, seeds and queries.
      margin: in points: "no more than one point below" is a difference plus 1 that is above 0.
    """
    if better.keys() != worse.keys():
        raise ValueError(f"tasks {sorted(better)} and {sorted(worse)} are not the same")
    a: list[np.ndarray] = []
    b: list[np.ndarray] = []
    clusters: list[list[str]] = []
    for task, of in better.items():
        if of.clusters != worse[task].clusters:
            raise ValueError(f"{task}: the queries are not the same")
        a += worse[task].values
        b += of.values
        clusters += [[f"{task} {name}" for name in names] for names in of.clusters]
    found = paired_bootstrap(a, b, clusters).interval
    ends = (100 * found.low + margin, 100 * found.high + margin)
    queries = sum(len(of.clusters[0]) for of in better.values())
    return Difference(100 * found.mean + margin, 100 * found.stderr, *ends, queries)


def finding(part: str, interval: Interval, **rest: Any) -> Finding:
    """A finding with this difference and its interval."""
    ci = interval.ci
    low, high = (None, None) if ci is None else ci
    queries = interval.queries if isinstance(interval, Difference) else 0
    return Finding(part=part, difference=interval.mean, low=low, high=high, **{"queries": queries, **rest})


def untested(part: str, note: str, **rest: Any) -> Finding:
    """A finding of a claim for which something is missing, and what."""
    nothing: dict[str, Any] = {"values": {}, "difference": None, "low": None, "high": None, "seeds": 0}
    return Finding(part=part, note=note, **nothing, **rest)


def means_of(tasks: Sequence[str]) -> str:
    """In words, for settings."""
    return f"mean of {len(tasks)} tasks" if len(tasks) > 1 else "".join(tasks)


def results_of(folder: Path) -> Results:
    """A folder of ``sav-jax eval``, read once as long as it stays the same."""
    return _results(folder, (folder / "results.json").stat().st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _results(folder: Path, _: int) -> Results:
    return Results(folder)


def answers_of(folder: Path, task: str, method: str, shots: int | None = None) -> Answers:
    """A method's right and wrong answers, from a folder of ``sav-jax eval``.

    Args:
      folder: as :meth:`Study.command` returns it.
      task, method: which.
      shots: which, if there are several.
    """
    results = results_of(folder)
    runs = [run for run in results.runs if run.task == task and run.method == method and shots in (None, run.shots)]
    if len(runs) != 1:
        raise UserError(f"{folder}: {len(runs)} runs of {method} on {task}, not one")
    whole = results.answers(runs[0].key)
    found = [whole[method, seed] for seed in runs[0].seeds]
    return Answers(
        tuple(of.scores for of in found), tuple(tuple(query.cluster for query in of.queries) for of in found)
    )


def machine() -> dict[str, str]:
    """What the study runs on, in words, and which versions of what."""
    import platform
    from importlib.metadata import version

    import jax

    device = jax.devices()[0]
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")  # of Linux
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    where = f"{os.cpu_count()} cores of {processor}"
    if device.platform != "cpu":
        where = f"{jax.device_count()} x {device.device_kind}, {where}"
    libraries = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "numpy", "scikit-learn"))
    versions = f"sav_jax {sav_jax.__version__}, Python {platform.python_version()}, {libraries}"
    return {"machine": f"{where}, {platform.system()}", "versions": versions}


def _json(file: Path) -> dict[str, Any]:
    """What a file holds; nothing if there is none, or it was cut short."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    write_file(file, (json.dumps(content, indent=1) + "\n").encode())
