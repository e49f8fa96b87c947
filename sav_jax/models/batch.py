"""What a model is given: one batch of prompts with static shapes.

Axes: B batch, T tokens (padded), R positions read, P image tiles of one prompt (padded), S taps of one visual token.
"""

from __future__ import annotations

from typing import TypeAlias

import jax
import numpy as np
from flax import struct

Array: TypeAlias = jax.Array | np.ndarray


@struct.dataclass
class Batch:
    """Right-padded prompts of one bucket, planned on the host (see ``models/processor.py``).

    Attributes:
        token_ids: int32 ``[B, T]``. What stands at image positions does not matter.
        lengths: int32 ``[B]``, real tokens of each row; the rest is padding no real token ever sees.
        read_positions: int32 ``[B, R]``, where head outputs (and "read" logits) are taken. SAVs read the last real
            token, R = 1.
        tiles: float ``[B, P, height, width, 3]`` normalised pixels, or None when no prompt of the batch has an image.
        visual_index: int32 ``[B, T, S]`` rows of the prompt's own visual table, -1 at text positions. Row 0 is the
            newline vector; row ``1 + tile * n + j`` is patch ``j`` of ``tile``, ``n`` being the patches of a tile. None
            when ``tiles`` is.
        visual_weight: float32 ``[B, T, S]``. A visual token is the weighted sum of its taps: S = 1 copies a row, S = 4
            interpolates bilinearly between four (images larger than the token budget).
    """

    token_ids: Array
    lengths: Array
    read_positions: Array
    tiles: Array | None = None
    visual_index: Array | None = None
    visual_weight: Array | None = None
