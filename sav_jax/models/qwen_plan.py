"""Which patch and which visual token stands where in the Qwen-VL families: host plans, as integer index arrays.

An image is resized to whole blocks of M x M patches (M = 2 in all releases), about as large as it is, and stored block
by block; each block becomes one visual token. A video is a pile of frames of one size, two of which make one patch in
time. (Qwen2-VL, arXiv 2409.12191, section 2; Qwen2.5-VL, arXiv 2502.13923, section 2.1; Qwen3-VL, arXiv 2511.21631,
section 2.)

Sizes are (height, width) throughout, grids are (frames, height, width) in visual tokens. P patches, V = P / M^2 visual
tokens, T tokens of the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from einops import rearrange

from sav_jax.errors import UserError
from sav_jax.models.anyres import VisualPlan

MAX_ASPECT_RATIO = 200


def fitted_size(
    size: tuple[int, int], multiple: int, min_pixels: int, max_pixels: int, frames: int = 1, group: int = 2
) -> tuple[int, int]:
    """The size an image is resized to: sides are multiples of ``multiple``, the area lies between the bounds (unless
    rounding forbids it), the shape is kept as well as that allows.

    Args:
        size: (height, width).
        multiple: pixels along a side of a visual token.
        min_pixels, max_pixels: bounds of the area, of all frames together.
        frames: of a video whose frames share the bounds (Qwen3-VL); 1 for an image, or a frame with bounds of its own.
        group: frames that make one patch in time.

    Raises:
        UserError: one side is more than 200 times the other, which these models refuse.
    """
    height, width = size
    if frames > 1 and min(size) < multiple:
        enlarge = max(multiple / height, multiple / width)
        height, width = int(height * enlarge), int(width * enlarge)
    if max(size) > MAX_ASPECT_RATIO * min(size):
        what = "image" if frames == 1 else "video"
        raise UserError(f"{what} of {size[0]} x {size[1]}: one side is more than {MAX_ASPECT_RATIO} times the other")
    rows, columns = round(height / multiple), round(width / multiple)
    # Not rounded up to whole patches, as the frames are later on: the reference compares with this.
    counted = frames if frames == 1 else group * round(frames / group)
    if counted * rows * columns * multiple**2 > max_pixels:
        shrink = math.sqrt(frames * height * width / max_pixels)
        rows = max(1, math.floor(height / shrink / multiple))
        columns = max(1, math.floor(width / shrink / multiple))
    elif counted * rows * columns * multiple**2 < min_pixels:
        grow = math.sqrt(min_pixels / (frames * height * width))
        rows, columns = math.ceil(height * grow / multiple), math.ceil(width * grow / multiple)
    return rows * multiple, columns * multiple


def patch_places(grid: tuple[int, int, int], merge: int) -> np.ndarray:
    """Row and column of every patch of its frame, in stored order (block by block), int32 ``[P, 2]``."""
    frames, rows, columns = grid
    places = np.indices((rows * merge, columns * merge), np.int32)
    stored = rearrange(places, "a (i m) (j n) -> (i j m n) a", m=merge, n=merge)
    return np.tile(stored, (frames, 1))


def window_ids(grid: tuple[int, int, int], side: int) -> np.ndarray:
    """Which window of ``side`` x ``side`` visual tokens each visual token lies in, counted row by row and frame by
    frame, int32 ``[V]``. Windows at the right and lower edges may be smaller.
    """
    frame, row, column = np.indices(grid, np.int32)
    down, across = -(-grid[1] // side), -(-grid[2] // side)
    return ((frame * down + row // side) * across + column // side).reshape(-1)


def position_taps(grid: tuple[int, int, int], merge: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Four rows of a learned table of ``side`` x ``side`` positions and their weights for every patch: the table
    stretched bilinearly over each frame, corner on corner.

    Returns:
        int32 ``[P, 4]`` and float32 ``[P, 4]``.
    """
    places = patch_places(grid, merge)
    taps, weights = [], []
    for axis, length in enumerate((grid[1] * merge, grid[2] * merge)):
        # float32, step by step like the reference, so that the weights are the same bits.
        position = places[:, axis].astype(np.float32) * np.float32(side - 1) / np.float32(max(length - 1, 1))
        low = np.floor(position)
        both = np.stack([low, low + 1], -1)
        taps.append(np.minimum(both.astype(np.int32), side - 1))
        weights.append(np.float32(1) - np.abs(position[:, None] - both))
    index = taps[0][:, :, None] * side + taps[1][:, None, :]
    weight = weights[0][:, :, None] * weights[1][:, None, :]
    return index.reshape(-1, 4), weight.reshape(-1, 4)


def plan_visual(
    grid: tuple[int, int, int],
    *,
    merge: int,
    first_patch: int = 0,
    window_side: int | None = None,
    position_side: int | None = None,
    frame_step: float = 1.0,
) -> VisualPlan:
    """Plan one image or video.

    Args:
        grid: frames (pairs of frames of a video; 1 for an image), rows and columns of its visual tokens.
        merge: M, patches along a side of a visual token.
        first_patch: how many patches of the prompt come before.
        window_side: visual tokens along a side of an attention window, in towers that have windows.
        position_side: side of the table of learned positions, in towers that have one.
        frame_step: see :class:`VisualPlan`.

    Returns:
        A plan whose ``vision`` holds what :class:`sav_jax.models.qwen_vision.QwenVision` is given.
    """
    tokens, unit = math.prod(grid), merge * merge
    frame = grid[1] * grid[2] * unit
    order = np.arange(tokens, dtype=np.int32)
    # Segments and windows are called by the place of their first patch, counted from 1: 0 is padding.
    vision = {
        "segments": 1 + first_patch + np.repeat(np.arange(grid[0], dtype=np.int32) * frame, frame),
        "places": patch_places(grid, merge),
    }
    if window_side is not None:
        # The tower computes in an order in which every window is contiguous; only "order" itself speaks of the stored
        # one.
        windows = window_ids(grid, window_side)
        order = np.argsort(windows, kind="stable").astype(np.int32)
        patches = rearrange(order[:, None] * unit + np.arange(unit, dtype=np.int32), "v u -> (v u)")
        vision = {name: values[patches] for name, values in vision.items()}
        vision["order"] = first_patch + patches
        windows = windows[order]
        first = np.searchsorted(windows, windows).astype(np.int32)
        vision["windows"] = 1 + first_patch + np.repeat(first * unit, unit)
    if position_side is not None:
        vision["taps"], vision["tap_weights"] = position_taps(grid, merge, position_side)
    index = 1 + first_patch // unit + np.argsort(order).astype(np.int32)
    return VisualPlan(
        num_rows=tokens * unit,
        index=index[:, None],
        weight=np.ones((tokens, 1), np.float32),
        vision=vision,
        grid=grid,
        frame_step=frame_step,
    )


def rope_positions(is_visual: np.ndarray, plans: Sequence[VisualPlan]) -> np.ndarray:
    """Rotary positions of a prompt (M-RoPE): text advances all three axes together; a visual token stands where the
    text before it ended, plus its frame, row and column; the text after goes on behind its longer side.

    Args:
        is_visual: bool ``[T]``, the places of visual tokens in an expanded prompt.
        plans: its images and videos, in order.

    Returns:
        int32 ``[T, 3]`` (time, height, width).
    """
    pieces = []
    place, position = 0, 0
    for plan in plans:
        assert plan.grid is not None
        text = int(np.argmax(is_visual[place:]))
        pieces.append(np.repeat(position + np.arange(text, dtype=np.int32)[:, None], 3, axis=1))
        position += text
        visual = np.indices(plan.grid, np.int32).reshape(3, -1).T
        # float32 like the reference: times are cut off, not rounded.
        visual[:, 0] = (visual[:, 0].astype(np.float32) * np.float32(plan.frame_step)).astype(np.int32)
        pieces.append(position + visual)
        position += max(plan.grid[1:])
        place += text + len(visual)
    pieces.append(np.repeat(position + np.arange(len(is_visual) - place, dtype=np.int32)[:, None], 3, axis=1))
    return np.concatenate(pieces)
