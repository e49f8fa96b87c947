"""Where the time of extraction goes: how long the device had nothing to do, and a trace of its first batches."""

from __future__ import annotations

import contextlib
import contextvars
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax

from sav_jax.errors import UserError

TRACED_BATCHES = 20
"""A trace of more is large, and shows the same again."""


@dataclass
class Profile:
    """Times in seconds of one process, added up over the passes over prompts that ran while it was current.

    Attributes:
        batches, examples, tokens: how many were run; ``tokens`` counts padding, too.
        total: from asking for a pass's first batch to its last result.
        busy: the device was computing, or receiving what it was to compute on.
        waiting: no batch was ready to be dispatched: pictures were being decoded and resized.
        dispatching: tracing and compiling programs, or reading compiled ones, and calling them.
        tracing: whether a trace is being taken.
    """

    batches: int = 0
    examples: int = 0
    tokens: int = 0
    total: float = 0.0
    busy: float = 0.0
    waiting: float = 0.0
    dispatching: float = 0.0
    tracing: bool = False

    def summary(self) -> str:
        """One line for people."""
        idle = max(0.0, 1 - self.busy / self.total) if self.total else 0.0
        rate = self.tokens / self.total if self.total else 0.0
        batches = "1 batch" if self.batches == 1 else f"{self.batches} batches"
        return (
            f"profile: {self.examples} prompts in {batches}, {self.total:.2f} s; device idle {idle:.1%} "
            f"of the time; waiting for pictures {self.waiting:.2f} s, compiling and dispatching {self.dispatching:.2f} "
            f"s; {rate:,.0f} tokens/s with padding"
        )

    def stop_trace(self) -> None:
        """End the trace, if that has not been done."""
        if self.tracing:
            self.tracing = False
            jax.profiler.stop_trace()


_current: contextvars.ContextVar[Profile | None] = contextvars.ContextVar("profile", default=None)


@contextlib.contextmanager
def profiled(folder: str | Path) -> Iterator[Profile]:
    """Profile every pass over prompts that runs meanwhile, and say on stderr what was found.

    Args:
        folder: a trace of the first batches is written into it, for TensorBoard's profile page or Perfetto.

    Raises:
        UserError: there can be no such folder.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--profile {folder}: {error.strerror or error}") from None
    profile = Profile()
    token = _current.set(profile)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every call of every function: minutes to write
    jax.profiler.start_trace(folder, profiler_options=options)
    profile.tracing = True
    try:
        yield profile
    finally:
        _current.reset(token)
        profile.stop_trace()
        if jax.process_index() == 0:
            print(f"{profile.summary()}; trace in {folder}", file=sys.stderr)


class Stopwatch:
    """Takes the times of one pass for the current :class:`Profile`; without one, does nothing.

    A device runs one program after the other. It is busy with one from its dispatch, or from the end of the one before
    if that is later, to its end, which a thread sees that waits for the result.
    """

    def __init__(self) -> None:
        self._profile = _current.get()
        self._start = time.perf_counter()
        self._watching = None if self._profile is None else ThreadPoolExecutor(1)
        self._ends: list[tuple[float, Future[float]]] = []

    @contextlib.contextmanager
    def taking(self, what: Literal["waiting", "dispatching"]) -> Iterator[None]:
        """Around waiting for a batch, or the call of a program."""
        since = time.perf_counter()
        yield
        if self._profile is not None:
            setattr(self._profile, what, getattr(self._profile, what) + time.perf_counter() - since)

    def dispatched(self, result: Any, examples: int, tokens: int) -> None:
        """After it: what it returned, and how many prompts and tokens it runs over."""
        if self._profile is None or self._watching is None:
            return
        self._profile.batches += 1
        self._profile.examples += examples
        self._profile.tokens += tokens
        self._ends.append((time.perf_counter(), self._watching.submit(_end_of, result)))
        if self._profile.batches == TRACED_BATCHES:
            jax.block_until_ready(result)
            since = time.perf_counter()
            self._profile.stop_trace()
            self._profile.total -= time.perf_counter() - since  # would not have been, without the profile

    def stop(self) -> None:
        """At the end of the pass."""
        if self._profile is None or self._watching is None:
            return
        self._watching.shutdown()
        before = self._start
        for began, future in self._ends:
            if future.exception() is None:
                ended = future.result()
                self._profile.busy += max(0.0, ended - max(began, before))
                before = max(before, ended)
        self._profile.total += time.perf_counter() - self._start


def _end_of(result: Any) -> float:
    jax.block_until_ready(result)
    return time.perf_counter()
