"""Batches of the drawn world for the bundled model's training, as NumPy arrays of fixed shapes.

A batch is a pure function of (stage, step): a resumed run sees what an uninterrupted one would. They are drawn ahead of
time in one other process.

Axes: B examples, G label groups, T tokens, R answer positions, P tiles, S taps of a visual token (always 1 here).
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sav_jax.models.processor import Processor, load_processor
from sav_jax.world.glyphs import DIGITS, LETTERS
from sav_jax.world.questions import CATEGORIES, QA, ask, ask_both
from sav_jax.world.scene import LARGE, SIZE, Scene, draw, sample_scene
from sav_jax.world.shapes import COLORS, SHAPES, TEXTURES

#: Label groups of stage 1, each with its share of the loss. A label is told apart only from its own group (0 from 1,
#: not from o).
GROUPS: dict[str, tuple[tuple[str, ...], float]] = {
    "digit": (tuple(DIGITS), 1.0),
    "letter": (tuple(LETTERS), 1.0),
    "shape": (SHAPES, 1.0),
    "color": (tuple(COLORS), 0.15),
    "texture": (TEXTURES, 0.3),
    "category": (CATEGORIES, 0.15),
}

#: Kinds of scene and how often they are drawn, by stage.
LABEL_MIX = {"scan": 0.42, "glyph": 0.36, "shape": 0.22}
QUESTION_MIX = {"scan": 0.3, "glyph": 0.2, "shape": 0.18, "pair": 0.16, "group": 0.16}

#: First seeds of what training draws; far apart, so that nothing overlaps.
LABEL_SEEDS, QUESTION_SEEDS, HELD_OUT_SEEDS = 10**9, 3 * 10**9, 9 * 10**9


@dataclass(frozen=True)
class LabelBatch:
    """Stage 1: one image, its labels by group.

    Attributes:
        tiles: float32 ``[B, 1, 32, 32, 3]`` normalised pixels.
        labels: int32 ``[B, G]``, index within the group, -1 where the group says nothing about the image.
    """

    tiles: NDArray[np.float32]
    labels: NDArray[np.int32]


@dataclass(frozen=True)
class QuestionBatch:
    """Stage 2: chats about images, with the answers' positions.

    Attributes:
        token_ids, lengths, tiles, visual_index, visual_weight: as in :class:`sav_jax.models.batch.Batch`.
        read_positions: int32 ``[B, R]``, positions whose next token is part of an answer; 0 where unused.
        targets: int32 ``[B, R]``, those next tokens.
        weights: float32 ``[B, R]``; an answer's tokens share a weight of one, its end counts ``END_WEIGHT``.
    """

    token_ids: NDArray[np.int32]
    lengths: NDArray[np.int32]
    read_positions: NDArray[np.int32]
    tiles: NDArray[np.float32]
    visual_index: NDArray[np.int32]
    visual_weight: NDArray[np.float32]
    targets: NDArray[np.int32]
    weights: NDArray[np.float32]


@dataclass(frozen=True)
class Bucket:
    """Static shapes of one sort of question batch: tokens, tiles, and images of ``side`` pixels per prompt."""

    tokens: int
    tiles: int
    images: int
    side: int
    batch_share: float = 1.0


#: For "square" the base view and the only tile of the grid are the same pixels, so that one tile serves both.
BUCKETS = {
    "square": Bucket(tokens=80, tiles=1, images=1, side=SIZE),
    "large": Bucket(tokens=132, tiles=5, images=1, side=LARGE, batch_share=0.5),
    "two": Bucket(tokens=80, tiles=2, images=2, side=SIZE),
}
READS = 16
END_WEIGHT = 0.1


def _capitalised(qa: QA) -> QA:
    """People may begin a question with a capital letter; the world's wordings never do."""
    return replace(qa, question=qa.question[0].upper() + qa.question[1:])


def bucket_of(step: int) -> str:
    """Which bucket a step of stage 2 draws from."""
    return {5: "large", 13: "two"}.get(step % 16, "square")


def _mixed(mix: dict[str, float], rng: np.random.Generator) -> str:
    kinds = tuple(mix)
    return kinds[int(rng.choice(len(kinds), p=np.array(list(mix.values()))))]


def pixels(image: Image.Image) -> NDArray[np.float32]:
    """Normalised pixels of an image that is one tile already, as the processor makes them."""
    return np.asarray(image, dtype=np.float32) / np.float32(127.5) - np.float32(1.0)


def group_labels(scene: Scene) -> NDArray[np.int32]:
    """Labels of a scene with a single thing, int32 [G]."""
    thing = scene.thing
    said = {thing.category: thing.name, "color": thing.color, "category": thing.category}
    if thing.category == "shape" and thing.size == "large":
        said["texture"] = thing.texture
    return np.array(
        [names.index(said[group]) if group in said else -1 for group, (names, _) in GROUPS.items()], np.int32
    )


def label_batch(scenes: Sequence[Scene]) -> LabelBatch:
    """Draws scenes of single things."""
    return LabelBatch(
        np.stack([pixels(draw(scene)) for scene in scenes])[:, None],
        np.stack([group_labels(scene) for scene in scenes]),
    )


def label_scenes(step: int, batch_size: int) -> list[Scene]:
    """The scenes of a step of stage 1."""
    first = LABEL_SEEDS + step * batch_size
    rng = np.random.default_rng([LABEL_SEEDS, step])
    return [sample_scene(first + i, _mixed(LABEL_MIX, rng)) for i in range(batch_size)]


class Chats:
    """Turns scenes with questions into token arrays, by the checkpoint's own tokenizer, template and image plan."""

    def __init__(self, directory: Path):
        self.directory = directory

    @cached_property
    def processor(self) -> Processor:
        return load_processor(self.directory)

    @cached_property
    def end(self) -> int:
        return int(self.processor.tokenizer.convert_tokens_to_ids("<|im_end|>"))

    @lru_cache(maxsize=20000)  # noqa: B019  one instance per process, lives as long as it
    def _first_turn(self, question: str, images: int) -> tuple[int, ...]:
        return tuple(self.processor.encode(self.processor.text(question, images)))

    @lru_cache(maxsize=20000)  # noqa: B019
    def _next_turn(self, question: str) -> tuple[int, ...]:
        return tuple(self.processor.encode(self.processor.text(question, 0)))

    @lru_cache(maxsize=20000)  # noqa: B019
    def _answer(self, answer: str) -> tuple[int, ...]:
        return (*self.processor.encode(answer), self.end)

    def batch(self, items: Sequence[tuple[Sequence[Scene], Sequence[QA]]], bucket: Bucket) -> QuestionBatch:
        """Draws and tokenises a batch. Questions that no longer fit into the bucket are left out."""
        size, length = len(items), bucket.tokens
        side = SIZE
        token_ids = np.zeros((size, length), np.int32)
        lengths = np.zeros(size, np.int32)
        visual_index = np.full((size, length, 1), -1, np.int32)
        visual_weight = np.zeros((size, length, 1), np.float32)
        tiles = np.zeros((size, bucket.tiles, side, side, 3), np.float32)
        reads = np.zeros((size, READS), np.int32)
        targets = np.zeros((size, READS), np.int32)
        weights = np.zeros((size, READS), np.float32)
        for row, (scenes, questions) in enumerate(items):
            images = [draw(scene) for scene in scenes]
            plan = self.processor.expand(
                self._first_turn(questions[0].question, len(images)), [i.size[::-1] for i in images]
            )
            index = plan.visual_index
            if bucket.side == SIZE:
                tiles[row] = np.stack([pixels(image) for image in images])
                if bucket.images == 1:
                    patches = self.processor.config.vision.patches_per_side**2
                    index = np.where(index > patches, index - patches, index)
            else:
                tiles[row] = self.processor.pixels(images)
            ids = plan.token_ids.tolist()
            visual_index[row, : len(ids)] = index
            visual_weight[row, : len(ids)] = plan.visual_weight
            used = 0
            for turn, qa in enumerate(questions):
                ahead = [] if turn == 0 else list(self._next_turn(qa.question))
                answer = self._answer(qa.answer)
                if len(ids) + len(ahead) + len(answer) > length or used + len(answer) > READS:
                    continue
                ids += ahead
                places = slice(used, used + len(answer))
                reads[row, places] = np.arange(len(ids) - 1, len(ids) - 1 + len(answer))
                targets[row, places] = answer
                weights[row, places] = [1.0 / (len(answer) - 1)] * (len(answer) - 1) + [END_WEIGHT]
                ids += answer
                used += len(answer)
            lengths[row] = len(ids)
            token_ids[row, : len(ids)] = ids
        return QuestionBatch(token_ids, lengths, reads, tiles, visual_index, visual_weight, targets, weights)

    def training_batch(self, step: int, batch_size: int) -> QuestionBatch:
        """The batch of a step of stage 2: two questions about every image (or pair of images)."""
        bucket = BUCKETS[bucket_of(step)]
        rng = np.random.default_rng([QUESTION_SEEDS, step])
        items: list[tuple[list[Scene], list[QA]]] = []
        for i in range(round(batch_size * bucket.batch_share)):
            seed = QUESTION_SEEDS + 2 * (step * batch_size + i)
            if bucket.images == 2:
                scenes = [sample_scene(seed + k, _mixed(LABEL_MIX, rng)) for k in range(2)]
                questions = ask_both(scenes[0], scenes[1], seed)
            else:
                scenes = [sample_scene(seed, _mixed(QUESTION_MIX, rng), side=bucket.side)]
                questions = ask(scenes[0], seed, 2)
            items.append((scenes, [_capitalised(qa) if rng.random() < 0.3 else qa for qa in questions]))
        return self.batch(items, bucket)


_chats: Chats | None = None


def _start(directory: Path) -> None:
    global _chats  # one per worker process, set once
    _chats = Chats(directory)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """A killed training does not tell its worker, which would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _draw(stage: int, step: int, batch_size: int) -> LabelBatch | QuestionBatch:
    if stage == 1:
        return label_batch(label_scenes(step, batch_size))
    assert _chats is not None
    return _chats.training_batch(step, batch_size)


def prefetched(
    directory: Path, stage: int, steps: range, batch_size: int, ahead: int = 12
) -> Iterator[LabelBatch | QuestionBatch]:
    """Batches of ``steps`` in order, drawn by another process up to ``ahead`` batches early."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _start, (directory,)) as pool:
        pending: list[Future[LabelBatch | QuestionBatch]] = []
        todo = iter(steps)
        try:
            for _ in steps:
                while len(pending) < ahead and (step := next(todo, None)) is not None:
                    pending.append(pool.submit(_draw, stage, step, batch_size))
                yield pending.pop(0).result()
        finally:
            for future in pending:
                future.cancel()


def held_out_scenes(kind: str, number: int, *, category: str | None = None, side: int = SIZE) -> list[Scene]:
    """Scenes that training never draws, with its held-out faces and pen styles."""
    return [sample_scene(HELD_OUT_SEEDS + i, kind, category=category, held_out=True, side=side) for i in range(number)]
