"""What several processes that run the same program must do together, or only one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sav_jax.errors import UserError

_LONGEST = 2000  # bytes of a message


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


def gathered(tree: Any) -> Any:
    """Arrays that may be spread over processes -> whole arrays on every host."""

    def whole(x: Any) -> np.ndarray:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(whole, tree)
