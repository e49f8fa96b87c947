"""Prompts -> batches of static shapes.

Prompts are grouped by bucket (token length, rows of pixels, taps) and each group is cut into batches. The last batch of
a group, if short, takes in prompts of smaller buckets, so that a few examples of many sizes do not compile many
programs; what is still empty repeats its first prompt. The number of compiled programs is bounded by the number of
buckets, not by the data. The grouping depends only on the prompts and their order, so a resumed run makes the same
batches and therefore the same bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sav_jax.errors import UserError
from sav_jax.models.batch import Batch
from sav_jax.models.processor import Prompt


@dataclass(frozen=True)
class Bucket:
    """Static shape of a batch: T tokens, P rows of pixels, S taps, M virtual tokens, R prompts in one sequence."""

    tokens: int
    rows: int
    taps: int
    virtual: int = 0
    reads: int = 1

    def takes_in(self, other: Bucket) -> bool:
        """Whether a prompt of ``other`` may run in this shape: it fits, at no more than twice its own work."""
        fits = (
            other.tokens <= self.tokens
            and other.rows <= self.rows
            and other.taps <= self.taps
            and other.virtual <= self.virtual
            and other.reads <= self.reads
            and (other.reads > 1) == (self.reads > 1)
        )
        return fits and self.tokens <= 2 * other.tokens and self.rows <= 2 * other.rows


@dataclass(frozen=True)
class BatchPlan:
    """Which prompts run together: ``rows`` index the prompts; ``size`` >= len(rows) is the padded batch size."""

    bucket: Bucket
    rows: tuple[int, ...]
    size: int


def round_tokens(length: int) -> int:
    """Up to a multiple of 32 below 512, of 64 below 1,024, of 128 below 4,096, of 512 from there: at most about an
    eighth is padding.
    """
    step = 32 if length <= 512 else 64 if length <= 1024 else 128 if length <= 4096 else 512
    return -(-length // step) * step


def round_rows(rows: int) -> int:
    """Rows of pixels: every count up to 10 (anyres_max_9 with its base view), multiples of 4 up to 40 (tiles), and at
    most an eighth of padding beyond (patches).
    """
    if rows <= 10:
        return rows
    step = 4 if rows <= 40 else 2 ** max(2, rows.bit_length() - 4)
    return -(-rows // step) * step


def plan_batches(
    prompts: Sequence[Prompt], batch_size: int, multiple: int = 1, *, count_reads: bool = False
) -> list[BatchPlan]:
    """Group prompts into batches.

    Args:
        prompts: in any order.
        batch_size: rows of a full batch; rounded up to ``multiple``.
        multiple: every batch size is a multiple of it (the data axis of the mesh).
        count_reads: a sequence of R prompts takes the room of R.

    Returns:
        Batches, longest bucket first, so that running out of memory happens at once and not at the end.

    Raises:
        UserError: ``batch_size`` is not positive.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, not {batch_size}")
    groups: dict[Bucket, deque[int]] = {}
    for row, prompt in enumerate(prompts):
        bucket = Bucket(
            round_tokens(len(prompt.token_ids)),
            round_rows(prompt.num_rows),
            prompt.visual_index.shape[1],
            round_tokens(prompt.num_virtual),
            next_size(max(1, len(prompt.reads)), 1),
        )
        groups.setdefault(bucket, deque()).append(row)
    plans = []
    order = sorted(groups, key=lambda b: (-b.tokens, -b.rows, -b.taps, -b.virtual))
    for i, bucket in enumerate(order):
        full = -(-max(1, batch_size // (bucket.reads if count_reads else 1)) // multiple) * multiple
        while groups[bucket]:
            chunk: list[int] = []
            for source in (bucket, *(other for other in order[i + 1 :] if bucket.takes_in(other))):
                while groups[source] and len(chunk) < full:
                    chunk.append(groups[source].popleft())
            plans.append(BatchPlan(bucket, tuple(chunk), min(full, next_size(len(chunk), multiple))))
    return plans


def next_size(rows: int, multiple: int) -> int:
    """The smallest multiple * 2^k >= rows: a lone long prompt does not pay for a full batch, and sizes stay few."""
    size = multiple
    while size < rows:
        size *= 2
    return size


def assemble(
    plan: BatchPlan,
    prompts: Sequence[Prompt] | Mapping[int, Prompt],
    pixels: Sequence[np.ndarray] | None,
    virtual: Sequence[np.ndarray | None] = (),
) -> Batch:
    """Stack the prompts of a plan into a padded :class:`Batch` of host arrays that reads the last token of each
    prompt.

    Args:
        plan: the batch.
        prompts: all prompts ``plan.rows`` index, or those of the plan by their index.
        pixels: pixels of the plan's prompts, in the plan's order, each ``[P_i, ...]``; None: they are in a pool.
        virtual: their virtual tokens, float32 ``[M_i, D]``, or None; may be left out if they are filled in later.
    """
    b = plan.bucket
    members = [prompts[row] for row in plan.rows]
    # Padding rows repeat the first prompt: real arithmetic on real values, thrown away.
    order = [*range(len(members)), *[0] * (plan.size - len(members))]

    def stack(values: Sequence[np.ndarray], size: int, fill: int = 0) -> np.ndarray:
        out = np.full((plan.size, size, *values[0].shape[1:]), fill, values[0].dtype)
        for i, source in enumerate(order):
            out[i, : len(values[source])] = values[source]
        return out

    lengths = [len(prompt.token_ids) for prompt in members]
    reads = [prompt.reads or (length - 1,) for prompt, length in zip(members, lengths, strict=True)]
    reads = [(*places, *[places[-1]] * (b.reads - len(places))) for places in reads]
    text = Batch(
        token_ids=stack([prompt.token_ids for prompt in members], b.tokens),
        lengths=np.array([lengths[i] for i in order], np.int32),
        read_positions=np.array([reads[i] for i in order], np.int32),
        positions=None
        if members[0].positions is None
        else stack([prompt.positions for prompt in members if prompt.positions is not None], b.tokens),
    )
    if b.reads > 1:
        text = replace(
            text, segments=stack([prompt.segments for prompt in members if prompt.segments is not None], b.tokens)
        )
    if b.virtual:
        none = np.full(0, -1, np.int32)
        index = [none if prompt.virtual_index is None else prompt.virtual_index for prompt in members]
        text = replace(text, virtual_index=stack(index, b.tokens, fill=-1))
        given = next((tokens for tokens in virtual if tokens is not None), None)
        if given is not None:
            values = [given[:0] if tokens is None else tokens for tokens in virtual]
            text = replace(text, virtual_tokens=stack(values, b.virtual))
    if b.rows == 0:
        return text
    text = replace(
        text,
        visual_index=stack([_widened(prompt.visual_index, b.taps) for prompt in members], b.tokens, fill=-1),
        visual_weight=stack([_widened(prompt.visual_weight, b.taps) for prompt in members], b.tokens),
    )
    if pixels is None:
        return text
    # Of any prompt: those of the batch may all be text, if their bucket is wider than they are.
    known = prompts.values() if isinstance(prompts, Mapping) else prompts
    names = next(prompt.vision for prompt in known if prompt.num_rows)
    empty = {name: value[:0] for name, value in names.items()}
    return replace(
        text,
        pixels=stack(pixels, b.rows),
        vision={name: stack([{**empty, **prompt.vision}[name] for prompt in members], b.rows) for name in names}
        or None,
    )


def _widened(taps: np.ndarray, count: int) -> np.ndarray:
    """``[T, S]`` -> ``[T, count]``: further taps point at row 0 with weight 0."""
    return np.pad(taps, ((0, 0), (0, count - taps.shape[1])))
