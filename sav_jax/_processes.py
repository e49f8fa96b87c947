"""What several processes that run the same program must do together, or only one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from sav_jax.errors import UserError

_LONGEST = 2000  # bytes of a message


def start(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Join the other processes, before JAX looks for devices; nothing if that is done.

    Args:
        coordinator, num_processes, process_id: see ``jax.distributed.initialize``; None where the cluster says.

    Raises:
        UserError: they cannot be found.
    """
    if jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (RuntimeError, ValueError) as error:  # nothing was found, or nobody answered
        raise UserError(
            f"the other processes cannot be joined ({' '.join(str(error).split())[:300]}); --coordinator, "
            "--num-processes and --process-id say where they are"
        ) from None


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


def share(number: int) -> slice:
    """Which of so many pieces of work, that any process could do, this one does."""
    return slice(
        jax.process_index() * number // jax.process_count(), (jax.process_index() + 1) * number // jax.process_count()
    )


def wait_for_all(moment: str) -> None:
    """Until every process has come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(moment)


def gathered(tree: Any) -> Any:
    """Arrays that may be spread over processes -> whole arrays on every host."""

    def whole(x: Any) -> np.ndarray:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(whole, tree)
