"""Batches of the drawn world for the bundled models' training, as NumPy arrays of fixed shapes.

A batch is a pure function of (stage, step): a resumed run sees what an uninterrupted one would. They are drawn ahead of
time by other processes; pixels travel as bytes.

Axes: B examples, G label groups, T tokens, R answer positions, N views of a prompt's images.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sav_jax.train.tiny_layout import Layout
from sav_jax.train.tiny_recipe import Recipe, Stage
from sav_jax.world.facts import CATEGORIES
from sav_jax.world.glyphs import DIGITS, LETTERS
from sav_jax.world.objects import OBJECTS
from sav_jax.world.questions import QA, ask
from sav_jax.world.scene import KINDS, LARGE, SIZE, Scene, draw, sample_scene
from sav_jax.world.several import ask_several, sample_images
from sav_jax.world.shapes import COLORS, SHAPES, TEXTURES
from sav_jax.world.words import WORDS

#: Label groups of the first stage, each with its share of the loss. A label is told apart only from its own group (0
#: from 1, not from o).
GROUPS: dict[str, tuple[tuple[str, ...], float]] = {
    "digit": (tuple(DIGITS), 1.0),
    "letter": (tuple(LETTERS), 1.0),
    "shape": (SHAPES, 1.0),
    "object": (OBJECTS, 1.0),
    "word": (WORDS, 1.0),
    "color": (tuple(COLORS), 0.2),
    "texture": (TEXTURES, 0.4),
    "category": (CATEGORIES, 0.2),
}

#: Kinds of scene and how often they are drawn: in the first stage, and later in small and in large images.
LABEL_MIX = {"scan": 0.28, "glyph": 0.26, "shape": 0.2, "object": 0.12, "word": 0.14}
QUESTION_MIX = {
    "scan": 0.13, "glyph": 0.12, "shape": 0.16, "object": 0.11, "word": 0.06, "swatch": 0.02, "pair": 0.17,
    "group": 0.14, "crowd": 0.09,
}  # fmt: skip

#: First seeds of what each stage draws; far apart, so that nothing overlaps.
STAGE_SEEDS = {"seeing": 10**9, "answering": 3 * 10**9, "instructions": 6 * 10**9}
HELD_OUT_SEEDS = 9 * 10**9


@dataclass(frozen=True)
class TinyBatch:
    """Chats about images with the answers' positions; in the first stage, images alone.

    Attributes:
        bucket: whose shapes it has.
        images: uint8 ``[B, N, height, width, 3]``.
        labels: int32 ``[B, G]``, index within the group, -1 where the group says nothing about the image.
        token_ids: int32 ``[B, T]``.
        lengths: int32 ``[B]``.
        reads: int32 ``[B, R]``, positions whose next token is part of an answer; 0 where unused.
        targets: int32 ``[B, R]``, those next tokens.
        weights: float32 ``[B, R]``; an answer's tokens share a weight of one, its end counts ``END_WEIGHT``.
        questions: int32 ``[B, R]`` which of the row's questions each position answers; -1 where unused.
        asked: the questions of each row that are in it.
    """

    bucket: str
    images: NDArray[np.uint8]
    labels: NDArray[np.int32]
    token_ids: NDArray[np.int32]
    lengths: NDArray[np.int32]
    reads: NDArray[np.int32]
    targets: NDArray[np.int32]
    weights: NDArray[np.float32]
    questions: NDArray[np.int32]
    asked: tuple[tuple[QA, ...], ...] = ()

    def arrays(self) -> tuple[NDArray[np.generic], ...]:
        """What a training step is given."""
        return self.images, self.labels, self.token_ids, self.lengths, self.reads, self.targets, self.weights


@dataclass(frozen=True)
class Bucket:
    """Static shapes of one sort of prompt.

    Attributes:
        tokens: T; 0 where there is no text.
        images: per prompt.
        side: their width and height in pixels.
        share: B as a share of the stage's batch size.
    """

    tokens: int
    images: int
    side: int
    share: float = 1.0


BUCKETS = {
    "image": Bucket(tokens=0, images=1, side=SIZE),
    "square": Bucket(tokens=128, images=1, side=SIZE),
    "large": Bucket(tokens=176, images=1, side=LARGE, share=0.5),
    "two": Bucket(tokens=128, images=2, side=SIZE, share=0.5),
}
READS = 24
END_WEIGHT = 0.1


def bucket_of(stage: Stage, step: int) -> str:
    """Which bucket a step of a stage draws from."""
    if not stage.buckets:
        return "image"
    names, shares = zip(*stage.buckets, strict=True)
    point = np.random.default_rng([STAGE_SEEDS[stage.name], step, 1]).random() * sum(shares)
    return names[int(np.searchsorted(np.cumsum(shares)[:-1], point, side="right"))]


def rows_of(bucket: str, batch_size: int) -> int:
    """B."""
    return max(round(batch_size * BUCKETS[bucket].share), 1)


def _mixed(mix: dict[str, float], rng: np.random.Generator, number: int) -> list[str]:
    """Kinds of ``number`` scenes."""
    kinds, shares = tuple(mix), np.array(list(mix.values()))
    return [kinds[int(i)] for i in rng.choice(len(kinds), size=number, p=shares / shares.sum())]


def group_labels(scenes: Sequence[Scene]) -> NDArray[np.int32]:
    """Labels of the first scene, if it shows a single thing, int32 [G]."""
    scene = scenes[0]
    if len(scene.things) > 1 or len(scenes) > 1 or scene.kind in ("pair", "group", "crowd", "swatch"):
        return np.full(len(GROUPS), -1, np.int32)
    thing = scene.thing
    said = {thing.category: thing.name, "color": thing.color, "category": thing.category}
    if thing.category == "shape" and thing.size == "large":
        said["texture"] = thing.texture
    return np.array(
        [names.index(said[group]) if group in said else -1 for group, (names, _) in GROUPS.items()], np.int32
    )


def _capitalised(qa: QA) -> QA:
    """People may begin a question with a capital letter; the world's wordings never do."""
    return replace(qa, question=qa.question[0].upper() + qa.question[1:])


Item = tuple[Sequence[Scene], Sequence[QA]]


class Chats:
    """Turns scenes with questions into token arrays, by the checkpoint's own tokenizer, template and image plan."""

    def __init__(self, directory: Path):
        self.layout = Layout(directory)

    def batch(self, items: Sequence[Item], bucket_name: str) -> TinyBatch:
        """Draws and tokenises a batch. Questions that no longer fit into the bucket are left out."""
        bucket, size = BUCKETS[bucket_name], len(items)
        length = max(bucket.tokens, 1)
        views, side = self.layout.views(bucket.images, bucket.side)
        images = np.zeros((size, views, side, side, 3), np.uint8)
        token_ids, lengths = np.zeros((size, length), np.int32), np.zeros(size, np.int32)
        reads, targets = np.zeros((size, READS), np.int32), np.zeros((size, READS), np.int32)
        weights, questions = np.zeros((size, READS), np.float32), np.full((size, READS), -1, np.int32)
        labels = np.stack([group_labels(scenes) for scenes, _ in items])
        asked: list[tuple[QA, ...]] = []
        for row, (scenes, wanted) in enumerate(items):
            images[row] = self.layout.pack([draw(scene) for scene in scenes])
            if not bucket.tokens:
                continue
            ids = list(self.layout.plan(bucket.images, bucket.side, length).head)
            used = 0
            kept: list[QA] = []
            for qa in wanted:
                question = qa.question
                ahead = (
                    self.layout.next_question(question) if kept else self.layout.first_question(question, bucket.images)
                )
                answer = self.layout.answer(qa.answer)
                if len(ids) + len(ahead) + len(answer) > length or used + len(answer) > READS:
                    continue
                ids += ahead
                places = slice(used, used + len(answer))
                reads[row, places] = np.arange(len(ids) - 1, len(ids) - 1 + len(answer))
                targets[row, places] = answer
                weights[row, places] = [1.0 / (len(answer) - 1)] * (len(answer) - 1) + [END_WEIGHT]
                questions[row, places] = len(kept)
                ids += answer
                used += len(answer)
                kept.append(qa)
            lengths[row] = len(ids)
            token_ids[row, : len(ids)] = ids
            asked.append(tuple(kept))
        return TinyBatch(
            bucket_name, images, labels, token_ids, lengths, reads, targets, weights, questions, tuple(asked)
        )

    def training_batch(self, recipe: Recipe, step: int) -> TinyBatch:
        """The batch of a step, counted over all stages."""
        stage, at = recipe.place(step)
        name = bucket_of(stage, at)
        bucket, rows = BUCKETS[name], rows_of(name, stage.batch_size)
        first = STAGE_SEEDS[stage.name]
        rng = np.random.default_rng([first, at])
        seeds = [first + 2 * (at * stage.batch_size + i) for i in range(rows)]
        if name == "image":
            kinds = _mixed(LABEL_MIX, rng, rows)
            return self.batch([([sample_scene(s, k)], ()) for s, k in zip(seeds, kinds, strict=True)], name)
        capitals = rng.random((rows, recipe.turns)) < 0.3
        kinds = _mixed(QUESTION_MIX, rng, rows)
        items: list[Item] = []
        for seed, kind, capital in zip(seeds, kinds, capitals, strict=True):
            scenes: Sequence[Scene]
            if bucket.images == 2:
                scenes = both = sample_images(seed)
                questions = ask_several(both, seed, recipe.turns)
            else:
                scenes = [sample_scene(seed, kind, side=bucket.side)]
                questions = ask(scenes[0], seed, recipe.turns)
            items.append(
                (scenes, [_capitalised(qa) if big else qa for qa, big in zip(questions, capital, strict=False)])
            )
        return self.batch(items, name)


_draw: Callable[[int], TinyBatch] | None = None


def _start(directory: Path, recipe: Recipe) -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")  # a worker has nothing to compute on an accelerator
    global _draw  # one per worker process, set once
    chats = Chats(directory)

    def draw_step(step: int) -> TinyBatch:
        return replace(chats.training_batch(recipe, step), asked=())

    _draw = draw_step
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """A killed training does not tell its workers, which would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _drawn(step: int) -> TinyBatch:
    assert _draw is not None
    return _draw(step)


def prefetched(directory: Path, recipe: Recipe, steps: range, workers: int = 1) -> Iterator[TinyBatch]:
    """Batches of ``steps`` in order, drawn ahead of time by ``workers`` other processes."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start, (directory, recipe)) as pool:
        pending: list[Future[TinyBatch]] = []
        todo = iter(steps)
        try:
            for _ in steps:
                while len(pending) < 4 + 3 * workers and (step := next(todo, None)) is not None:
                    pending.append(pool.submit(_drawn, step))
                yield pending.pop(0).result()
        finally:
            for future in pending:
                future.cancel()


def held_out_scenes(kind: str, number: int, *, category: str | None = None, side: int = SIZE) -> list[Scene]:
    """Scenes that training never draws, with its held-out faces, pen styles and combinations of colour and shape."""
    return [sample_scene(HELD_OUT_SEEDS + i, kind, category=category, held_out=True, side=side) for i in range(number)]


def held_out_items(number: int, buckets: set[str]) -> Iterator[tuple[str, str, list[Item]]]:
    """Questions about held-out scenes: (bucket, kind, ``number`` items of one question each), of these buckets."""
    for kind in KINDS:
        yield "square", kind, [([s], ask(s, i, 1)) for i, s in enumerate(held_out_scenes(kind, number))]
    if "large" in buckets:
        large = held_out_scenes("glyph", number, side=LARGE)
        yield "large", "64 pixels", [([s], ask(s, i, 1)) for i, s in enumerate(large)]
    if "two" in buckets:
        pairs = [sample_images(HELD_OUT_SEEDS + 2 * i, held_out=True) for i in range(number)]
        yield "two", "two images", [(p, ask_several(p, i, 1)) for i, p in enumerate(pairs)]
