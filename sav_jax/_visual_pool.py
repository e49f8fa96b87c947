"""Images that several prompts show, encoded once.

The visual tables of the images of many batches lie in one pool on the device. Which image is encoded before which
batch, and where in the pool it lies, follows from the plans of the batches alone; when the pool is full, its oldest
images make room. What a batch is given are places in the pool instead of pixels.

Axes: U images encoded together, P rows of pixels of an image (padded), M visual tokens of it, X rows of the pool, J
deepstack layers, D width of the decoder.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sav_jax.batching import BatchPlan, next_size, round_rows
from sav_jax.lmm import LMM
from sav_jax.models.batch import Batch
from sav_jax.models.multimodal import MultimodalModel
from sav_jax.models.processor import Processor, Prompt

POOL_BYTES = 512 << 20
"""At most so much of the device's memory: some twenty images of 3,645 tokens in a model of seven billion parameters, a
hundred in one of half a billion.
"""
WORTH = 4
"""A pool is made if one in so many images was there before: encoding apart from the rest costs a little, too."""
_TOGETHER = 8  # images encoded in one call at most


@dataclass(frozen=True)
class Encoding:
    """An image to be encoded: before which batch, which rows of a prompt's pixels, and where in the pool it goes."""

    batch: int
    prompt: int
    start: int
    stop: int
    place: int


@dataclass(frozen=True)
class Schedule:
    """What is encoded before each batch, and where the images of its prompts then lie.

    Attributes:
        rows: X.
        fresh: of each batch.
        used: of each of these encodings, the batches that read what it made.
        places: of each batch, prompt -> where each of its images begins.
    """

    rows: int
    fresh: tuple[tuple[Encoding, ...], ...]
    used: Mapping[Encoding, frozenset[int]]
    places: tuple[Mapping[int, tuple[int, ...]], ...]


def schedule(
    plans: Sequence[BatchPlan],
    prompts: Sequence[Prompt],
    media: Sequence[Sequence[str]],
    rate: Fraction,
    most_rows: int,
) -> Schedule | None:
    """Decide what is encoded when, and where it is kept.

    Args:
        plans: the batches, in order.
        prompts: all prompts they index.
        media: digests of each prompt's images and videos.
        rate: visual tokens of a row of pixels.
        most_rows: of the pool.

    Returns:
        None if too few images are shown again, or those of one batch take more than a third of the pool.
    """
    shown = [(digest, count) for plan in plans for row in plan.rows for digest, count in _images(row, prompts, media)]
    sizes = {image: int(image[1] * rate) for image in shown}
    if not shown or WORTH * (len(shown) - len(sizes)) < len(shown):
        return None
    needed = [{image: None for row in plan.rows for image in _images(row, prompts, media)} for plan in plans]
    largest = max(sum(sizes[image] for image in images) for images in needed)
    rows = min(most_rows, 1 + max(sum(sizes.values()), 3 * largest))
    if 3 * largest > rows:
        return None
    held: dict[tuple[str, int], int] = {}  # where each image lies
    made: dict[tuple[str, int], Encoding] = {}  # by what
    used: dict[Encoding, set[int]] = defaultdict(set)
    pointer = 1  # row 0 is the newline vector
    fresh, places = [], []
    for number, (plan, images) in enumerate(zip(plans, needed, strict=True)):
        first_shown = {}
        for row in reversed(plan.rows):
            start = sum(prompts[row].media_rows)
            for image in reversed(_images(row, prompts, media)):
                start -= image[1]
                first_shown[image] = row, start
        encodings = []
        waiting = [image for image in images if image not in held]
        while waiting:
            image = waiting.pop(0)
            if pointer + sizes[image] > rows:
                pointer = 1
            place, pointer = pointer, pointer + sizes[image]
            for other, where in list(held.items()):
                if where < pointer and place < where + sizes[other]:
                    del held[other]
                    if other in images:  # encoded anew; a third of the pool is enough not to come round again
                        waiting.append(other)
            held[image] = place
            row, start = first_shown[image]
            made[image] = Encoding(number, row, start, start + image[1], place)
            encodings.append(made[image])
        for image in images:
            used[made[image]].add(number)
        fresh.append(tuple(encodings))
        places.append({row: tuple(held[image] for image in _images(row, prompts, media)) for row in plan.rows})
    return Schedule(rows, tuple(fresh), {one: frozenset(numbers) for one, numbers in used.items()}, tuple(places))


def _images(row: int, prompts: Sequence[Prompt], media: Sequence[Sequence[str]]) -> list[tuple[str, int]]:
    """Digest and rows of pixels of each image or video of a prompt: alike if they are encoded alike."""
    return list(zip(media[row], prompts[row].media_rows, strict=True))


def _calls(fresh: Sequence[Encoding]) -> list[list[Encoding]]:
    """What is encoded together: a few images of about one size."""
    groups: dict[int, list[Encoding]] = defaultdict(list)
    for one in fresh:
        groups[round_rows(one.stop - one.start)].append(one)
    calls = []
    for group in groups.values():
        while group:
            # Powers of two: nothing is encoded twice, and few programs are compiled.
            size = min(_TOGETHER, next_size(len(group) // 2 + 1, 1))
            calls.append(group[:size])
            group = group[size:]
    return calls


class VisualPool:
    """The pool, and what to do for each batch that is run. Made by :func:`pool_for`.

    What is encoded together is the same whatever batches are run: of those that are not, the calls are made that have
    an image which is looked for later. So a run that is resumed gives the same bits.
    """

    def __init__(
        self,
        lmm: LMM,
        prompts: Sequence[Prompt],
        plan: Schedule,
        run: Sequence[int],
        rate: Fraction,
        tables: jax.ShapeDtypeStruct,
    ):
        self._processor: Processor = lmm.processor
        self._encode = _encode_step(lmm.module)
        self._prompts, self._schedule, self._rate = prompts, plan, rate
        self._calls: dict[int, list[list[Encoding]]] = {}
        wanted, before = frozenset(run), -1
        for number in run:
            calls = [call for earlier in range(before + 1, number + 1) for call in _calls(plan.fresh[earlier])]
            self._calls[number] = [
                call for call in calls if any(wanted & plan.used.get(one, frozenset()) for one in call)
            ]
            before = number
        self._array = jnp.zeros((tables.shape[0], plan.rows, tables.shape[-1]), tables.dtype)

    def decoded(self, number: int) -> set[int]:
        """Prompts whose pixels are needed before batch ``number``."""
        return {one.prompt for call in self._calls[number] for one in call}

    def prompts(self, number: int) -> dict[int, Prompt]:
        """The prompts of a batch with places in the pool instead of places in their own tables."""
        return {row: self._moved(self._prompts[row], places) for row, places in self._schedule.places[number].items()}

    def _moved(self, prompt: Prompt, places: Sequence[int]) -> Prompt:
        index = prompt.visual_index.copy()
        first = 1
        for place, rows in zip(places, prompt.media_rows, strict=True):
            after = first + int(rows * self._rate)
            own = (prompt.visual_index >= first) & (prompt.visual_index < after)
            index[own] += place - first
            first = after
        return replace(prompt, visual_index=index)

    def host(self, number: int, pixels: Mapping[int, np.ndarray]) -> list[tuple[Any, ...]]:
        """What is to be encoded before a batch: arguments of :meth:`encode`, few images at a time.

        Args:
            number: which batch.
            pixels: of the prompts in :meth:`decoded`, each ``[P_i, ...]``.
        """
        return [self._stacked(call, pixels) for call in self._calls[number]]

    def _stacked(self, group: Sequence[Encoding], pixels: Mapping[int, np.ndarray]) -> tuple[Any, ...]:
        rows = round_rows(group[0].stop - group[0].start)

        def padded(values: Sequence[np.ndarray]) -> np.ndarray:
            out = np.zeros((len(values), rows, *values[0].shape[1:]), values[0].dtype)
            for row, value in zip(out, values, strict=True):
                row[: len(value)] = value
            return out

        plans = [self._processor.vision_of(self._prompts[one.prompt], one.start, one.stop) for one in group]
        places = np.full(
            (len(group), int(rows * self._rate)), self._schedule.rows, np.int32
        )  # behind the pool: nowhere
        for row, one in zip(places, group, strict=True):
            tokens = int((one.stop - one.start) * self._rate)
            row[:tokens] = one.place + np.arange(tokens)
        vision = {name: padded([plan[name] for plan in plans]) for name in plans[0]} or None
        return padded([pixels[one.prompt][one.start : one.stop] for one in group]), vision, places

    def encode(self, params: Any, call: tuple[Any, ...]) -> None:
        """Put images into the pool."""
        self._array = self._encode(params, self._array, *jax.device_put(call))

    def filled(self, batch: Batch) -> Batch:
        """A batch that reads the pool as it is now."""
        return replace(batch, visual_pool=self._array)


def pool_for(
    lmm: LMM,
    plans: Sequence[BatchPlan],
    run: Sequence[int],
    prompts: Sequence[Prompt],
    media: Sequence[Sequence[str]] | None,
) -> VisualPool | None:
    """A pool for these batches; None if it would not pay, or the model lives on several devices.

    Args:
        lmm: the model.
        plans, prompts, media: see :func:`schedule`.
        run: numbers of the batches that will be run, in order.
    """
    if media is None or jax.process_count() > 1 or (lmm.mesh is not None and lmm.mesh.size > 1):
        return None
    tables, rate = _shape_of_tables(lmm)
    row_bytes = tables.shape[0] * tables.shape[-1] * tables.dtype.itemsize
    plan = schedule(plans, prompts, media, rate, POOL_BYTES // row_bytes)
    return None if plan is None else VisualPool(lmm, prompts, plan, run, rate, tables)


def _shape_of_tables(lmm: LMM) -> tuple[jax.ShapeDtypeStruct, Fraction]:
    """``[1 + J, 1, 1 + M, D]`` of the smallest image, and the visual tokens of a row of pixels."""
    vision = lmm.module.dummy_vision()
    batch = _vision_batch(vision["pixels"], vision.get("vision"))
    tables: Any = jax.eval_shape(
        lambda params: lmm.module.apply({"params": params}, batch, method="visual_tables"), lmm.params
    )
    return tables, Fraction(tables.shape[2] - 1, vision["pixels"].shape[1])


def _vision_batch(pixels: Any, vision: Any) -> Batch:
    """A batch of images without prompts."""
    nothing = np.zeros((pixels.shape[0], 1), np.int32)
    return Batch(nothing, nothing[:, 0], nothing, pixels=pixels, vision=vision)


@functools.lru_cache(maxsize=32)
def _encode_step(module: MultimodalModel) -> Callable[..., jax.Array]:
    """``(params, pool [1 + J, X, D], pixels [U, P, ...], vision, places [U, M]) -> pool``, in the place of the old."""

    @functools.partial(jax.jit, donate_argnums=1)
    def step(params: Any, pool: jax.Array, pixels: jax.Array, vision: Any, places: jax.Array) -> jax.Array:
        tables: Any = module.apply({"params": params}, _vision_batch(pixels, vision), method="visual_tables")
        tables = tables.astype(pool.dtype)
        tokens = tables[:, :, 1:].reshape(tables.shape[0], math.prod(places.shape), tables.shape[-1])
        pool = pool.at[:, 0].set(tables[:, 0, 0])
        return pool.at[:, places.reshape(-1)].set(tokens, mode="drop")

    return step
