"""What several processes that run the same program must do together, or only one of them."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import hashlib
import io
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sav_jax.errors import UserError

_LONGEST = 2000  # bytes of a message
_LOST = ("Gloo", "Connection closed", "Connection reset", "UNAVAILABLE", "heartbeat", "coordination service")
_AGAIN = "what is stored is kept: run all of them again"
_GRACE = 5.0  # seconds in which a process may fail by itself before it is ended
_runs = itertools.count()


def start(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Join the other processes, before JAX looks for devices; nothing if that is done.

    Args:
        coordinator, num_processes, process_id: see ``jax.distributed.initialize``; None where the cluster says.

    Raises:
        UserError: they cannot be found.
    """
    if jax.distributed.is_initialized():
        return
    _keep_stdout()
    _speak_when_aborted()
    # Its handler of SIGTERM notes the signal for programs that ask for it, and ends nothing.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (RuntimeError, ValueError) as error:  # nothing was found, or nobody answered
        raise UserError(
            f"the other processes cannot be joined ({' '.join(str(error).split())[:300]}); --coordinator, "
            "--num-processes and --process-id say where they are"
        ) from None


def _keep_stdout() -> None:
    """Leave the stdout of this process to Python: what libraries of other languages print there (Gloo, the network of
    several processes on CPUs, says who is connected) goes to stderr, and does not stand between results.
    """
    former = sys.stdout
    if not isinstance(former, io.TextIOWrapper) or former is not sys.__stdout__:  # a test's, say
        return
    with contextlib.suppress(OSError, ValueError):  # there is no file behind it
        former.flush()
        own = os.dup(former.fileno())
        os.dup2(sys.stderr.fileno(), former.fileno())
        sys.stdout = os.fdopen(own, "w", encoding=former.encoding, errors=former.errors)
        sys.stdout.reconfigure(line_buffering=former.line_buffering, write_through=former.write_through)


def by_the_first(work: Callable[[], object]) -> None:
    """Have process 0 do something while the others wait for it.

    Raises:
        UserError: what process 0 raised, in every process.
    """
    if jax.process_count() == 1:
        work()
        return
    from jax.experimental import multihost_utils

    message = np.zeros(_LONGEST, np.uint8)
    if jax.process_index() == 0:
        try:
            work()
        except UserError as error:
            said = str(error).encode()[:_LONGEST]
            message[: len(said)] = np.frombuffer(said, np.uint8)
    told = np.asarray(multihost_utils.broadcast_one_to_all(message)).astype(np.uint8)
    if told.any():
        raise UserError(told.tobytes().rstrip(b"\0").decode(errors="ignore"))


def known_by_all(places: Sequence[int], number: int) -> list[int]:
    """What process 0 has found among 0 ... ``number`` - 1, in every process: each has looked at a moment of its own."""
    if jax.process_count() == 1:
        return list(places)
    from jax.experimental import multihost_utils

    found = np.zeros(number, bool)
    found[list(places)] = True
    return np.flatnonzero(np.asarray(multihost_utils.broadcast_one_to_all(found))).tolist()


def check_same(facts: Mapping[str, str]) -> None:
    """Compare what every process must know alike. All of them call this.

    Args:
        facts: what it is, as an error says it -> a text that tells it from others.

    Raises:
        UserError: they differ; in every process.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    own = np.array([list(hashlib.sha256(of.encode()).digest()) for of in facts.values()], np.uint8)
    every = np.asarray(multihost_utils.process_allgather(own)).reshape(jax.process_count(), *own.shape)
    for what, of in zip(facts, np.moveaxis(every, 1, 0), strict=True):
        unlike = np.flatnonzero((of != of[0]).any(axis=1))
        if len(unlike):
            raise UserError(
                f"process {unlike[0]} has {what} than process 0: every process must be given the same files"
            )


def share(number: int) -> slice:
    """Which of so many pieces of work, that any process could do, this one does."""
    this, of = jax.process_index(), jax.process_count()
    return slice(this * number // of, (this + 1) * number // of)


def shared_out(number: int, work: Callable[[int], Any]) -> list[Any]:
    """``[work(0), ..., work(number - 1)]``, of which each process does its share; each of them something that JSON
    holds (and tuples become lists, with several processes).
    """
    this = share(number)
    own = [work(i) for i in range(this.start, this.stop)]
    if jax.process_count() == 1:
        return own
    from jax.experimental import multihost_utils

    told = np.frombuffer(json.dumps(own).encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.array(told.size, np.int32))).reshape(-1)
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: told.size] = told
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
    parts = [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]
    return [found for part in parts for found in part]


def wait_for_all(moment: str) -> None:
    """Until every process has come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(moment)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(number: int) -> None:
    line = f"JAX has given up (its words are above): another process has ended, or cannot be reached; {_AGAIN}"
    os.write(2, f"error: {line}\n".encode())
    os._exit(2)


def _speak_when_aborted() -> None:
    """One line and status 2 instead of a crash where JAX ends this process because the first one is gone, which keeps
    what they know of each other: it aborts in a thread of its own, out of reach of any exception.
    """
    # Python's own signal module would wait for the main thread, which is not asked.
    ctypes.CDLL(None).signal(int(signal.SIGABRT), _aborted)


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """What one process raises ends the others, too, which would wait for it in the next collective for ever.

    They say which process failed and why, and exit with status 2, unless they fail by themselves within seconds (what
    all of them find out, such as a bad row). A process that was killed says nothing: the others find that they cannot
    reach it, and say so. Processes enter this in the same order.

    Raises:
        UserError: another process cannot be reached.
    """
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        yield
        return
    from jax._src.distributed import global_state  # JAX has no public way to its key-value store

    _speak_when_aborted()
    client: Any = global_state.client
    run = f"sav_jax/run{next(_runs)}"
    over = threading.Event()

    def end(status: int) -> None:
        if jax.process_index() == 0:
            time.sleep(2)  # without the first, which has the store, the others would crash
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def watch() -> None:
        while not over.is_set():
            try:
                message = client.blocking_key_value_get(f"{run}/failed", 200)  # milliseconds
            except Exception:  # nothing yet
                over.wait(0.05)
                continue
            if not over.wait(_GRACE):
                print(f"error: {message}", file=sys.stderr, flush=True)
                client.key_value_set(f"{run}/ended/{jax.process_index()}", "")
                end(2)
            return

    def leave(status: int) -> None:
        """Without waiting for processes that have been ended or killed, as JAX would at exit."""
        until = time.monotonic() + _GRACE + 2
        while time.monotonic() < until:
            if client.key_value_dir_get(f"{run}/ended"):
                break
            time.sleep(0.1)
        end(status)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        over.set()
        interrupted = isinstance(error, KeyboardInterrupt)
        said = "interrupted" if interrupted else " ".join(str(error).split())[:_LONGEST] or type(error).__name__
        client.key_value_set(f"{run}/failed", f"process {jax.process_index()}: {said}", allow_overwrite=True)
        lost = isinstance(error, jax.errors.JaxRuntimeError) and any(word in said for word in _LOST)
        atexit.register(leave, 130 if interrupted else 2 if lost or isinstance(error, UserError) else 1)
        if lost:
            raise UserError(f"another process has ended, or cannot be reached ({said[:200]}); {_AGAIN}") from error
        raise
    finally:
        over.set()
        watcher.join()  # a thread in the store's code when Python ends would end the process, with an abort


def gathered(tree: Any) -> Any:
    """Arrays that may be spread over processes -> whole arrays on every host."""

    def whole(x: Any) -> np.ndarray:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(whole, tree)
