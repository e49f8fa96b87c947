"""Prompts -> batches of static shapes.

Prompts are grouped by bucket (token length, tiles, taps), each group is cut into batches, and short last batches are
padded with copies of their first row. The number of compiled programs is bounded by the number of buckets, not by the
data. The grouping depends only on the prompts and their order, so a resumed run makes the same batches and therefore
the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sav_jax.models.batch import Batch
from sav_jax.models.processor import Prompt


@dataclass(frozen=True)
class Bucket:
    """Static shape of a batch: T tokens, P tiles, S taps, R positions read."""

    tokens: int
    tiles: int
    taps: int
    reads: int = 1


@dataclass(frozen=True)
class BatchPlan:
    """Which prompts run together: ``rows`` index the prompts; ``size`` >= len(rows) is the padded batch size."""

    bucket: Bucket
    rows: tuple[int, ...]
    size: int


def round_tokens(length: int) -> int:
    """Up to a multiple of 32 below 256, of 64 below 1,024, of 128 below 4,096, of 512 from there: at most about an
    eighth is padding.
    """
    step = 32 if length <= 256 else 64 if length <= 1024 else 128 if length <= 4096 else 512
    return -(-length // step) * step


def round_tiles(tiles: int) -> int:
    """Every count up to 10 (anyres_max_9 with its base view), then multiples of 4."""
    return tiles if tiles <= 10 else -(-tiles // 4) * 4


def plan_batches(
    prompts: Sequence[Prompt], batch_size: int, multiple: int = 1, reads: Sequence[int] | None = None
) -> list[BatchPlan]:
    """Group prompts into batches.

    Args:
        prompts: in any order.
        batch_size: rows of a full batch; rounded up to ``multiple``.
        multiple: every batch size is a multiple of it (the data axis of the mesh).
        reads: positions read per prompt; one each if not given.

    Returns:
        Batches, longest bucket first, so that running out of memory happens at once and not at the end.
    """
    groups: dict[Bucket, list[int]] = {}
    for row, prompt in enumerate(prompts):
        bucket = Bucket(
            round_tokens(len(prompt.token_ids)),
            round_tiles(prompt.num_tiles),
            prompt.visual_index.shape[1],
            1 if reads is None else reads[row],
        )
        groups.setdefault(bucket, []).append(row)
    full = -(-batch_size // multiple) * multiple
    plans = []
    for bucket in sorted(groups, key=lambda b: (-b.tokens, -b.tiles, -b.taps, -b.reads)):
        rows = groups[bucket]
        for start in range(0, len(rows), full):
            chunk = tuple(rows[start : start + full])
            plans.append(BatchPlan(bucket, chunk, min(full, _next_size(len(chunk), multiple))))
    return plans


def _next_size(rows: int, multiple: int) -> int:
    """The smallest multiple * 2^k >= rows: a lone long prompt does not pay for a full batch, and sizes stay few."""
    size = multiple
    while size < rows:
        size *= 2
    return size


def assemble(
    plan: BatchPlan, prompts: Sequence[Prompt], tiles: Sequence[np.ndarray], reads: Sequence[np.ndarray] | None = None
) -> Batch:
    """Stack the prompts of a plan into a padded :class:`Batch` of host arrays.

    Args:
        plan: the batch.
        prompts: all prompts ``plan.rows`` index.
        tiles: pixels of the plan's prompts, in the plan's order, each ``[P_i, height, width, 3]``.
        reads: positions read of the plan's prompts, each ``[R]``; by default the last token.
    """
    b = plan.bucket
    token_ids = np.zeros((plan.size, b.tokens), np.int32)
    lengths = np.ones(plan.size, np.int32)
    read_positions = np.zeros((plan.size, b.reads), np.int32)
    index = np.full((plan.size, b.tokens, b.taps), -1, np.int32)
    weight = np.zeros((plan.size, b.tokens, b.taps), np.float32)
    pixels = np.zeros((plan.size, b.tiles, *tiles[0].shape[1:]), np.float32)
    for i in range(plan.size):
        source = i if i < len(plan.rows) else 0
        prompt = prompts[plan.rows[source]]
        length = len(prompt.token_ids)
        token_ids[i, :length] = prompt.token_ids
        lengths[i] = length
        read_positions[i] = length - 1 if reads is None else reads[source]
        index[i, :length], weight[i, :length] = prompt.visual_index, prompt.visual_weight
        pixels[i, : prompt.num_tiles] = tiles[source]
    if b.tiles == 0:
        return Batch(token_ids, lengths, read_positions)
    return Batch(token_ids, lengths, read_positions, pixels, index, weight)
