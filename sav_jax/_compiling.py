"""Compiled programs: kept from run to run, and counted."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import jax

FOLDER = "compiled"
"""Of the cache folder: where programs are kept."""


def keep_programs(cache: str | None) -> None:
    """Keep compiled programs in a folder beside the features, unless JAX has been told where (by
    ``JAX_COMPILATION_CACHE_DIR``, which may be empty for nowhere).

    Args:
        cache: the cache folder; None keeps nothing.
    """
    if cache is not None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", f"{cache.rstrip('/')}/{FOLDER}")


@contextlib.contextmanager
def counted() -> Iterator[None]:
    """Say on stderr, at the end, how many programs were compiled, in what time, and how many were there already."""
    seconds: list[float] = []
    found = 0

    def on_duration(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration_secs)

    def on_event(event: str, **_: str | int) -> None:
        nonlocal found
        found += event == "/jax/compilation_cache/cache_hits"

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    jax.monitoring.register_event_listener(on_event)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(on_duration)
        jax.monitoring.unregister_event_listener(on_event)
    if seconds and jax.process_index() == 0:
        kept = f", {found} of them read from the cache" if found else ""
        programs = "1 program" if len(seconds) == 1 else f"{len(seconds)} programs"
        print(f"{programs} compiled in {sum(seconds):.1f} s{kept}", file=sys.stderr)
