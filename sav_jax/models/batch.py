"""What a model is given: one batch of prompts with static shapes.

Axes: B batch, T tokens (padded), R positions read, P rows of pixels of one prompt (padded), S taps of one visual token,
M virtual tokens of one prompt (padded), D width of the decoder, X rows of a pool, J deepstack layers.
"""

from __future__ import annotations

from collections.abc import Mapping
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
        pixels: float ``[B, P, ...]`` normalised pixels, or None when no prompt of the batch has an image. A row is what
            the family's tower takes: a tile ``[height, width, 3]`` (LLaVA), a patch ``[C]`` (Qwen-VL).
        vision: further host plans of the family's tower, each ``[B, P, ...]`` beside the pixels.
        visual_index: int32 ``[B, T, S]`` rows of the prompt's own visual table, -1 at text positions. Row 0 is the
            newline vector (zero in families without one), the tower's output follows. None when ``pixels`` is.
        visual_weight: float32 ``[B, T, S]``. A visual token is the weighted sum of its taps: S = 1 copies a row, S = 4
            interpolates bilinearly between four (images larger than the token budget).
        positions: int32 ``[B, T]`` or ``[B, T, 3]`` rotary positions (time, height, width); None counts tokens.
        virtual_tokens: float ``[B, M, D]`` vectors that stand in for embeddings of tokens, or None.
        virtual_index: int32 ``[B, T]`` which of them stands at each position, -1 where a real token does; None if
            ``virtual_tokens`` is.
        segments: int32 ``[B, T]`` of rows that hold several prompts with the same beginning: 0 there and from 1 on in
            what follows. A token sees the beginning and its own segment. None: rows are one prompt each.
        visual_pool: ``[1 + J, X, D]`` visual tables of many images in one, and those of the deepstack, or None. If it
            is given, ``visual_index`` speaks of its rows, and there are no pixels.
    """

    token_ids: Array
    lengths: Array
    read_positions: Array
    pixels: Array | None = None
    vision: Mapping[str, Array] | None = None
    visual_index: Array | None = None
    visual_weight: Array | None = None
    positions: Array | None = None
    virtual_tokens: Array | None = None
    virtual_index: Array | None = None
    segments: Array | None = None
    visual_pool: Array | None = None
