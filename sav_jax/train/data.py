"""Which conversations make up each step, and the arrays of a step.

The plan of a run follows from lengths, seed and settings alone: every process makes the same plan and loads its own
rows of each batch, and a run is resumed by the number of its next step. Rows of a batch have nearly the same length:
each epoch is shuffled, cut into stretches of many batches, sorted within them, and its batches are shuffled again
(length grouping, as in LLaVA's training code).

Axes: B batch, T tokens, R targets of the longest row.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from flax import struct
from tqdm import tqdm

from sav_jax.batching import BatchPlan, Bucket, assemble, round_rows, round_tokens
from sav_jax.errors import UserError
from sav_jax.lmm import LMM
from sav_jax.models.batch import Array, Batch
from sav_jax.models.processor import Prompt
from sav_jax.sharding import own_rows
from sav_jax.train.chats import Chat, ChatFormat, Lesson, lesson, with_questions

_STRETCH = 50  # batches that are sorted by length together


@struct.dataclass
class LessonBatch:
    """One step's input.

    Attributes:
        batch: prompts; ``read_positions`` ``[B, R]`` are those before the targets.
        targets: int32 ``[B, R]`` the token that follows each of them.
        weights: float32 ``[B, R]``, 0 at padding.
    """

    batch: Batch
    targets: Array
    weights: Array


@dataclass(frozen=True)
class StepPlan:
    """Rows of one step and the epoch of each, which decides what is drawn for it.

    Attributes:
        bucket, targets: static shapes of its arrays.
        tokens: of all rows, without padding.
    """

    bucket: Bucket
    targets: int
    tokens: int
    rows: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Sizes:
    """Of one conversation: tokens, rows of pixels, taps, targets; at most these, whatever is drawn for it."""

    tokens: int
    rows: int
    taps: int
    targets: int


def plan_steps(
    sizes: Sequence[Sizes], batch_size: int, steps: int, seed: int, group_by_modality: bool = False
) -> list[StepPlan]:
    """The batches of a run.

    Args:
        sizes: of each conversation.
        batch_size: B.
        steps: how many batches; epochs follow one another, rows left over from one begin the next.
        seed: of all shuffling.
        group_by_modality: batches hold either rows with images or rows without, as LLaVA's do.

    Returns:
        ``steps`` plans.
    """
    plans: list[StepPlan] = []
    kinds = (True, False) if group_by_modality else (None,)
    left: dict[bool | None, list[tuple[int, int]]] = {kind: [] for kind in kinds}
    epoch = 0
    while len(plans) < steps:
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(sizes)).tolist()
        grouped: list[list[tuple[int, int]]] = []
        for kind in kinds:
            items = left[kind] + [(row, epoch) for row in order if kind in (None, bool(sizes[row].rows))]
            full = len(items) - len(items) % batch_size
            left[kind] = items[full:]
            for start in range(0, full, batch_size * _STRETCH):
                stretch = items[start : min(start + batch_size * _STRETCH, full)]
                stretch.sort(key=lambda item: -sizes[item[0]].tokens)
                grouped += [stretch[i : i + batch_size] for i in range(0, len(stretch), batch_size)]
        plans += [_step(sizes, grouped[i]) for i in rng.permutation(len(grouped))]
        epoch += 1
    return plans[:steps]


def _step(sizes: Sequence[Sizes], rows: Sequence[tuple[int, int]]) -> StepPlan:
    members = [sizes[row] for row, _ in rows]
    bucket = Bucket(
        round_tokens(max(m.tokens for m in members)),
        round_rows(max(m.rows for m in members)),
        max(m.taps for m in members),
    )
    targets = round_targets(max(m.targets for m in members))
    return StepPlan(bucket, targets, sum(m.tokens for m in members), tuple(rows))


def padding_of(data: Any) -> float:
    """Share of the tokens in all batches of a run that is padding."""
    real, computed = np.sum([data.tokens(step) for step in range(len(data))], axis=0)
    return float(1 - real / computed)


def round_targets(number: int) -> int:
    """Up to a power of two up to 64, then like tokens."""
    return max(4, 2 ** (number - 1).bit_length()) if number <= 64 else round_tokens(number)


class ChatData:
    """Conversations as batches.

    Attributes:
        plans: one for each step of the run.
        cut: conversations that were longer than ``max_tokens``.
    """

    def __init__(
        self,
        lmm: LMM,
        chats: Sequence[Chat],
        form: ChatFormat,
        *,
        batch_size: int,
        steps: int,
        seed: int,
        sq_ratio: float = 0.0,
        max_tokens: int | None = None,
        group_by_modality: bool = False,
        progress: bool = False,
    ):
        if not chats:
            raise UserError("there is nothing to train on")
        self.lmm, self.chats, self.form = lmm, chats, form
        self.seed, self.sq_ratio, self.max_tokens = seed, sq_ratio, max_tokens or lmm.max_tokens
        rows = tqdm(range(len(chats)), "planning", unit=" rows", file=sys.stderr, disable=not progress, mininterval=0.5)
        every = [_sizes(self._lesson(row, None)) for row in rows]
        self.cut = sum(size.tokens == self.max_tokens for size in every)
        self.plans = plan_steps(every, batch_size, steps, seed, group_by_modality)

    def __len__(self) -> int:
        return len(self.plans)

    def _lesson(self, row: int, epoch: int | None) -> Lesson:
        """The conversation as drawn in an epoch; None: with every question that may be asked, the longest form."""
        chat = self.chats[row]
        if self.sq_ratio:
            rng = np.random.default_rng([self.seed, 0 if epoch is None else epoch, row])
            chat = with_questions(chat, 1.0 if epoch is None else self.sq_ratio, rng)
        return lesson(self.lmm.processor, chat, self.form, self.max_tokens)

    def names(self, step: int) -> str:
        """The conversations of a step, for error messages."""
        return "; ".join(self.chats[row].source or str(row) for row, _ in self.plans[step].rows)

    def tokens(self, step: int) -> tuple[int, int]:
        """Of the longest form of what may be drawn: it decides the bucket."""
        plan = self.plans[step]
        return plan.tokens, plan.bucket.tokens * len(plan.rows)

    def __getitem__(self, step: int) -> LessonBatch:
        """This process's rows of a step, as host arrays."""
        plan = self.plans[step]
        rows = plan.rows[own_rows(self.lmm.mesh, len(plan.rows))]
        lessons = [self._lesson(row, epoch) for row, epoch in rows]
        media = [self.chats[row].media for row, _ in rows]
        pixels = [self.lmm.processor.pixels(example.load_images(), example.load_videos()) for example in media]
        own = BatchPlan(plan.bucket, tuple(range(len(rows))), len(rows))
        whole = (self._lesson(row, epoch).prompt for row, epoch in plan.rows)
        batch = assemble(own, with_image([one.prompt for one in lessons], plan.bucket, whole), pixels)
        return supervised(batch, [one.targets for one in lessons], plan.targets)


def with_image(own: list[Prompt], bucket: Bucket, whole: Iterable[Prompt]) -> list[Prompt]:
    """This process's prompts and, if none of them has an image but the whole batch has, one more that has: of it
    :func:`~sav_jax.batching.assemble` learns what arrays the images have.
    """
    if not bucket.rows or any(prompt.num_rows for prompt in own):
        return own
    return [*own, next(prompt for prompt in whole if prompt.num_rows)]


def supervised(batch: Batch, targets: Sequence[np.ndarray], width: int) -> LessonBatch:
    """Have a batch read the positions before its targets.

    Args:
        batch: B prompts.
        targets: int32 ``[T_i]`` of each, -1 where nothing is predicted; what stands first is never predicted.
        width: R.
    """
    rows = len(targets)
    positions = np.zeros((rows, width), np.int32)
    tokens = np.zeros((rows, width), np.int32)
    weights = np.zeros((rows, width), np.float32)
    for i, target in enumerate(targets):
        places = np.flatnonzero(target[1:] >= 0)
        positions[i, : len(places)] = places
        tokens[i, : len(places)] = target[places + 1]
        weights[i, : len(places)] = 1
    return LessonBatch(replace(batch, read_positions=positions), tokens, weights)


def _sizes(one: Lesson) -> Sizes:
    return Sizes(
        len(one.prompt.token_ids),
        one.prompt.num_rows,
        one.prompt.visual_index.shape[1],
        int((one.targets[1:] >= 0).sum()),
    )


def batches(data: Any, first: int, threads: int = 2) -> Iterator[Any]:
    """The batches of ``data`` from a step on, prepared by threads while others are used, in order."""
    import grain

    steps = grain.MapDataset.source(range(first, len(data)))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(steps.map(lambda step: data[step]).to_iter_dataset(options))
