"""What the sections of ``bench_gpu.py`` share: a report, timing in turns, our compiled program."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

GIB = 2**30


@dataclass
class Run:
    """What a section is given.

    Attributes:
        small: tiny sizes.
        repeats: how often each side is timed, at least.
        batch_sizes: of the prefill sections.
        output: where the rows go as JSON after each; None for nowhere.
        rows: what has been reported.
    """

    small: bool
    repeats: int
    batch_sizes: tuple[int, ...]
    output: Path | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    start: float = field(default_factory=time.perf_counter)

    @property
    def device(self) -> str:
        import jax

        return "cpu" if jax.default_backend() == "cpu" else "cuda"

    def report(self, section: str, what: str, **values: Any) -> None:
        """Prints a row at once, and keeps it."""
        row = {"section": section, "what": what, **values, "at": round(time.perf_counter() - self.start, 1)}
        self.rows.append(row)
        text = "  ".join(f"{key}={_shown(value)}" for key, value in row.items() if key not in ("section", "what"))
        print(f"[{section}] {what}: {text}", flush=True)
        if self.output is not None:
            self.output.write_text(json.dumps(self.rows, indent=1))


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


FAILURES: list[str] = []


@contextlib.contextmanager
def attempt() -> Iterator[None]:
    """What fails inside is printed and counted; the run goes on."""
    try:
        yield
    except Exception as error:
        print(traceback.format_exc(), flush=True)
        FAILURES.append(str(error))


def alternate(sides: dict[str, Callable[[], Any]], repeats: int, seconds: float = 12.0) -> dict[str, list[float]]:
    """Seconds of each side, in turns: ``repeats`` times, or fewer (at least three) when ``seconds`` have passed."""
    for run in sides.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in sides}
    start = time.perf_counter()
    for i in range(repeats):
        if i >= 3 and time.perf_counter() - start > seconds:
            break
        for name, run in sides.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    return times


def spread(times: Sequence[float]) -> dict[str, float]:
    return {"median_ms": 1e3 * statistics.median(times), "min_ms": 1e3 * min(times), "max_ms": 1e3 * max(times)}


def ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """Of neighbours in time."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return {"ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def blocking(program: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """A side in JAX that returns when the device is done."""
    return lambda: program(*arguments).block_until_ready()


def synchronized(device: str, run: Callable[[], Any]) -> Callable[[], Any]:
    """A side in PyTorch that returns when the device is done."""
    import torch

    def timed() -> Any:
        result = run()
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return timed


def compiled_step(lmm: Any, batch: Any, backend: str | None = None) -> tuple[Any, float]:
    """Our program for a batch, compiled, and the seconds that took; with another attention back end on request."""
    from sav_jax.extract import heads_step
    from sav_jax.models.attention import OVERRIDE

    before = os.environ.pop(OVERRIDE, None)
    if backend is not None:
        os.environ[OVERRIDE] = backend
    heads_step.cache_clear()  # a function traced with another back end would be used again
    start = time.perf_counter()
    try:
        step: Any = heads_step(lmm.module)
        compiled = step.lower(lmm.params, batch).compile()
    finally:
        os.environ.pop(OVERRIDE, None)
        if before is not None:
            os.environ[OVERRIDE] = before
        heads_step.cache_clear()
    return compiled, time.perf_counter() - start


def needs(compiled: Any) -> float:
    """GiB a program needs besides its weights: what it is given but them is small and left out."""
    stats = compiled.memory_analysis()
    return (stats.temp_size_in_bytes + stats.output_size_in_bytes) / GIB if stats is not None else float("nan")


def relative(ours: Any, theirs: Any) -> float:
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
