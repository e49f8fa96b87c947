"""Which visual token stands where: the host plan of LLaVA's images and videos, as integer index arrays.

An image is shown as a base view (the whole image at tile size) and, where the family wants it ("anyres"), cut into a
grid of tiles of its best fitting resolution; the grid's feature map is cropped to the image ("unpadding"), reduced
bilinearly when it exceeds the token budget of a family that has one, and every row of it ends with a newline vector
(LLaVA-NeXT; LLaVA-OneVision, arXiv 2408.03326, section 3). A frame of a video is a base view reduced to half its side.

Sizes are (height, width) throughout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class VisualPlan:
    """The visual tokens of one image, or of one video or a part of it.

    Attributes:
        num_rows: rows of pixels (tiles) it contributes.
        index: int32 ``[V, S]`` rows of the prompt's visual table (``models/batch.py``), V visual tokens, S = 1 or 4
            taps.
        weight: float32 ``[V, S]``.
        vision: the family's further plans of these rows, each ``[num_rows, ...]``.
        grid: (frames, height, width) in visual tokens, in families whose rotary positions follow it.
        frame_step: how far apart in rotary time two frames of the grid stand.
    """

    num_rows: int
    index: np.ndarray
    weight: np.ndarray
    vision: Mapping[str, np.ndarray] = field(default_factory=dict)
    grid: tuple[int, int, int] | None = None
    frame_step: float = 1.0


def best_resolution(size: tuple[int, int], resolutions: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The resolution that keeps most of the image's pixels, then wastes least; the first of equals."""
    height, width = size

    def merit(resolution: tuple[int, int]) -> tuple[int, int]:
        scale = min(resolution[1] / width, resolution[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - resolution[0] * resolution[1]

    return max(resolutions, key=merit)


def unpadded(size: tuple[int, int], grid: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of a feature map of ``grid`` that an image of ``size``, fitted and centred, covers."""
    height, width = size
    rows, columns = grid
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return slice(padding, rows - padding), slice(0, columns)
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return slice(0, rows), slice(padding, columns - padding)


def bilinear_taps(before: int, after: int) -> tuple[np.ndarray, np.ndarray]:
    """Two source positions and weights for each of ``after`` points on a line of ``before`` (half-pixel centres, as
    PyTorch resizes).

    Returns:
        int32 ``[after, 2]`` and float32 ``[after, 2]``.
    """
    # float32 like the reference, so that a source position on the edge between two pixels falls to the same side.
    scale = np.float32(before) / np.float32(after)
    position = np.maximum(
        (np.arange(after, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5), np.float32(0)
    )
    low = np.minimum(position.astype(np.int32), before - 1)
    high = np.minimum(low + 1, before - 1)
    fraction = position - low.astype(np.float32)
    return np.stack([low, high], -1), np.stack([np.float32(1) - fraction, fraction], -1).astype(np.float32)


def plan_base_view(first_tile: int, tokens: int, newline: bool) -> VisualPlan:
    """Plan an image that is shown as its base view alone.

    Args:
        first_tile: how many tiles of the prompt come before it.
        tokens: visual tokens of a tile.
        newline: a newline vector follows.
    """
    index = 1 + first_tile * tokens + np.arange(tokens, dtype=np.int32)
    if newline:
        index = np.append(index, np.int32(0))
    return VisualPlan(1, index[:, None], np.ones((len(index), 1), np.float32))


def plan_frames(frames: int, *, first_tile: int, patches_per_side: int) -> VisualPlan:
    """Plan a video: every frame is a base view reduced bilinearly to half its side (rounded up), and a newline vector
    follows the last.

    Args:
        frames: how many are shown.
        first_tile: how many tiles of the prompt come before them.
        patches_per_side: patches along a side of a tile.
    """
    side = patches_per_side
    taps, weights = bilinear_taps(side, -(-side // 2))
    table = 1 + first_tile * side**2 + np.arange(frames * side**2, dtype=np.int32).reshape(frames, side, side)
    index = table[:, taps[:, None, :, None], taps[None, :, None, :]].reshape(-1, 4)
    weight = np.tile((weights[:, None, :, None] * weights[None, :, None, :]).reshape(-1, 4), (frames, 1))
    newline = np.eye(1, 4, dtype=np.float32)  # row 0 with weight 1
    return VisualPlan(frames, np.pad(index, ((0, 1), (0, 0))).astype(np.int32), np.concatenate([weight, newline]))


def plan_anyres(
    size: tuple[int, int],
    *,
    first_tile: int,
    tile_size: int,
    patches_per_side: int,
    pinpoints: Sequence[tuple[int, int]],
    max_tiles: int | None,
) -> VisualPlan:
    """Plan an image that is shown as its base view and a grid of tiles.

    Args:
        size: (height, width) in pixels.
        first_tile: how many tiles of the prompt come before this image's.
        tile_size: side of a tile in pixels.
        patches_per_side: patches along a side of a tile.
        pinpoints: resolutions an image may be fitted to.
        max_tiles: token budget of the grid, in tiles; None for none.
    """
    side = patches_per_side
    base = 1 + first_tile * side * side + np.arange(side * side, dtype=np.int32)
    height, width = best_resolution(size, pinpoints)
    grid = height // tile_size, width // tile_size
    # Row of the visual table at each place of the grid's feature map: tiles are stored row by row, patches row by row
    # within a tile.
    stored = np.arange(grid[0] * grid[1] * side * side, dtype=np.int32).reshape(grid[0], grid[1], side, side)
    map_shape = grid[0] * side, grid[1] * side
    table = 1 + (first_tile + 1) * side * side + stored.transpose(0, 2, 1, 3).reshape(map_shape)
    table = table[unpadded(size, map_shape)]
    rows, columns = table.shape[0], table.shape[1]
    ratio = 0.0 if max_tiles is None else math.sqrt(rows * columns / (max_tiles * side**2))
    if ratio > 1.1:
        row_taps, row_weights = bilinear_taps(rows, int(rows // ratio))
        column_taps, column_weights = bilinear_taps(columns, int(columns // ratio))
        index = table[row_taps[:, None, :, None], column_taps[None, :, None, :]]
        weight = row_weights[:, None, :, None] * column_weights[None, :, None, :]
        index, weight = index.reshape(*index.shape[:2], 4), weight.reshape(*weight.shape[:2], 4)
    else:
        index, weight = table[:, :, None], np.ones((rows, columns, 1), np.float32)
    taps = index.shape[2]
    only_first = np.eye(1, taps, dtype=np.float32)
    index = np.pad(index, ((0, 0), (0, 1), (0, 0))).reshape(-1, taps)
    weight = np.concatenate([weight, np.broadcast_to(only_first, (weight.shape[0], 1, taps))], 1).reshape(-1, taps)
    base = np.pad(base[:, None], ((0, 0), (0, taps - 1)))
    return VisualPlan(
        1 + grid[0] * grid[1],
        np.concatenate([base, index]).astype(np.int32),
        np.concatenate([np.broadcast_to(only_first, base.shape), weight]).astype(np.float32),
    )
