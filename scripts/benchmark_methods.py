#!/usr/bin/env python
"""Time and memory of every method that reads head features alone, on made features of a 7B model's size.

    python scripts/benchmark_methods.py

Each method runs in a process of its own on two cores, which loads the features and nothing else. Fitting is what
happens before the first query is looked at, the scores of left-out support examples included; predicting is the rest.
Both include what JAX compiles. Memory is the process's largest resident set (VmHWM; Linux), features included.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import numpy as np
import tyro

if TYPE_CHECKING:
    from sav_jax.eval.features import Features

_BLOCK = 128  # rows made at a time


@dataclass(frozen=True)
class Arguments:
    """Times every method that reads head features alone, and measures its memory."""

    examples: Annotated[int, tyro.conf.arg(help="examples in all")] = 10_000
    layers: Annotated[int, tyro.conf.arg(help="layers of the model")] = 28
    heads: Annotated[int, tyro.conf.arg(help="heads per layer")] = 28
    width: Annotated[int, tyro.conf.arg(help="width of a head")] = 128
    classes: Annotated[int, tyro.conf.arg(help="classes, equally many examples of each")] = 10
    shots: Annotated[
        int, tyro.conf.arg(help="labelled examples per class; the others are queries. If none are left, all are both")
    ] = 20
    num_heads: Annotated[int, tyro.conf.arg(help="heads that vote, where a method chooses some")] = 20
    methods: Annotated[tuple[str, ...], tyro.conf.arg(help="which; by default all that read only heads")] = ()
    features: Annotated[Path | None, tyro.conf.arg(help="file to keep the features in, or to find them in")] = None
    one: Annotated[str | None, tyro.conf.arg(help="run this method only, in this process; prints JSON")] = None


def main(arguments: Arguments) -> None:
    """Makes the features, runs the methods, prints the table."""
    if arguments.one is not None:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
        print(json.dumps(measure(arguments, arguments.one)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.features or Path(folder) / "heads.npy"
        if not path.exists():
            make(arguments, path)
        print(f"features: {path.stat().st_size / 2**30:.2f} GiB\n")
        print("| method | fit, s | predict, s | peak memory, GiB | accuracy |")
        print("| --- | ---: | ---: | ---: | ---: |")
        for name in arguments.methods or head_methods():
            command = [sys.executable, __file__, *_options(arguments), "--features", str(path), "--one", name]
            result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if result.returncode:
                print(f"| {name} | failed ({result.returncode}) | | | |", flush=True)
                continue
            told = json.loads(result.stdout.splitlines()[-1])
            print(
                f"| {name} | {told['fit']:.1f} | {told['predict']:.1f} | {told['peak'] / 2**30:.2f} | "
                f"{told['accuracy']:.3f} |",
                flush=True,
            )


def head_methods() -> list[str]:
    """Names of the methods that read head features alone."""
    from sav_jax.eval.methods import centroid, hec, knn, probes, sav

    return sorted(
        method.name
        for module in (centroid, hec, knn, probes, sav)
        for method in module.METHODS
        if method.name != "sav-random"  # as sav, on other features
    )


def make(arguments: Arguments, path: Path) -> None:
    """Draws features, float32 [E, L, N, H]: example i is of class i modulo C, and one head in ten tells."""
    shape = (arguments.layers, arguments.heads, arguments.width)
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((arguments.classes, *shape), np.float32)
    centres *= rng.choice([0.02, 0.5], (*shape[:2], 1), p=[0.9, 0.1]).astype(np.float32)
    array = np.lib.format.open_memmap(path, "w+", np.float32, (arguments.examples, *shape))
    for start in range(0, arguments.examples, _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, arguments.examples))
        array[rows] = centres[rows % arguments.classes] + rng.standard_normal((len(rows), *shape), np.float32)
    array.flush()


def measure(arguments: Arguments, name: str) -> dict[str, float]:
    """Runs one method in this process."""
    from sav_jax.eval.methods import METHODS

    assert arguments.features is not None
    features, clock = _features(arguments, np.load(arguments.features))
    start = time.perf_counter()
    outcome = METHODS[name].run(features)
    end = time.perf_counter()
    assert outcome.predictions is not None
    right = [told == query.label for told, query in zip(outcome.predictions, features.split.queries, strict=True)]
    return {
        "fit": clock[0] - start,
        "predict": end - clock[0],
        "peak": peak_memory(),
        "accuracy": float(np.mean(right)),
    }


def peak_memory() -> int:
    """Largest resident set of this process so far, in bytes.

    Not ``getrusage``, whose maximum a process inherits from the one that started it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def _features(arguments: Arguments, array: np.ndarray) -> tuple[Features, list[float]]:
    """Features of a split without a model, and a list that gets the time at which queries were first looked at."""
    from sav_jax.eval.features import Features, Heads, Reader, Universe
    from sav_jax.eval.methods import Settings
    from sav_jax.eval.tasks.base import Data, Item, Split, Task
    from sav_jax.examples import Example
    from sav_jax.lmm import LMM
    from sav_jax.reading import Readings

    clock: list[float] = []

    class Watched(np.ndarray):
        """Tells when rows were first taken out of it."""

        def __getitem__(self, index: Any) -> Any:
            first = index[0] if isinstance(index, tuple) else index
            if not isinstance(first, np.ndarray):
                return super().__getitem__(index)
            if not clock:
                clock.append(time.perf_counter())
            return np.asarray(super().__getitem__(index))

    class Texts(Reader):
        """Takes the first examples' heads for those of texts."""

        @functools.cached_property
        def lmm(self) -> LMM:
            return None  # type: ignore[return-value]

        def read(self, lmm: LMM, examples: Sequence[Example], *_: Any, **__: Any) -> Readings:
            none = np.zeros((len(examples), 0), np.float32)
            return Readings(("",) * len(examples), array[: len(examples)], none, (), 0)

    names = tuple(f"class {column}" for column in range(arguments.classes))
    items = tuple(Item(Example("What?", label=names[row % len(names)])) for row in range(len(array)))
    number = min(arguments.shots * arguments.classes, len(items))
    support, queries = items[:number], items[number:] or items
    split = Split(support, queries, names, len(queries), 0, "")
    universe = Universe(Task("made", "made", lambda _: Data(items)), items, names, Texts(_no_model))
    universe.readings = Readings(("",) * len(items), array, np.zeros((len(items), 0), np.float32), (), 0)
    features = Features(universe, split, Settings(num_heads=arguments.num_heads))
    of_support, of_queries = features.heads
    features.heads = of_support, Heads(of_queries.array.view(Watched), of_queries.rows)
    return features, clock


def _options(arguments: Arguments) -> Iterator[str]:
    for field in dataclasses.fields(arguments):
        value = getattr(arguments, field.name)
        if isinstance(value, int):
            yield from (f"--{field.name.replace('_', '-')}", str(value))


def _no_model() -> NoReturn:
    raise AssertionError("the model is not needed here")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
