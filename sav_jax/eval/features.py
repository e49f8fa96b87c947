"""What models make of a split's examples: computed when first asked for, shared by all methods, counted.

Axes: E examples, S support examples, Q queries, C classes, K texts, L layers, N heads per layer, H head width.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from sav_jax.aim import DemonstrationBank, load_aim
from sav_jax.dual_encoder import load_dual_encoder
from sav_jax.errors import UserError
from sav_jax.eval.embeddings import Embeddings
from sav_jax.eval.tasks.base import Item, Split, Task
from sav_jax.examples import Example
from sav_jax.lmm import LMM
from sav_jax.models.intervention import HeadEdit
from sav_jax.reading import Readings, read

if TYPE_CHECKING:
    from sav_jax.eval.methods.base import Settings


@dataclass(frozen=True)
class Heads:
    """Head vectors of some examples: rows of one large array, which is never copied whole.

    Attributes:
      array: float32 [E, L, N, H].
      rows: int [R], which of them.
    """

    array: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """(R, L, N, H)."""
        return len(self.rows), *self.array.shape[1:]

    def whole(self) -> np.ndarray:
        """All of them, [R, L, N, H]: for the support. Not to be written to: consecutive rows are not copied."""
        if len(self.rows) and (np.diff(self.rows) == 1).all():
            return self.array[self.rows[0] : self.rows[-1] + 1]
        return self.array[self.rows]

    def layers(self, first: int, last: int) -> np.ndarray:
        """A copy of some layers, [R, last - first, N, H]."""
        return self.array[self.rows, first:last]

    def blocks(self, size: int = 128) -> Iterator[tuple[slice, np.ndarray]]:
        """Copies of ``size`` rows at a time, with their places among the rows: for the queries."""
        for start in range(0, len(self.rows), size):
            part = slice(start, min(start + size, len(self.rows)))
            yield part, self.array[self.rows[part]]


class Reader:
    """Runs models over prompts and counts the passes.

    Attributes:
      passes: prompts that were run through a model as it is.
      patched_passes: prompts that were run with head outputs changed: to answer, and in searches for what to change
        (there a prompt read once serves all masks of a step).
      demonstration_passes: demonstrations that were read by themselves, to be shown as virtual tokens.
      prompts: keys of all distinct (model, prompt) pairs that were asked for, run or read from the cache.
      seconds: spent in loading and running models.
    """

    def __init__(self, load: Callable[[], LMM], batch_size: int = 8, cache: str | None = None) -> None:
        self._load = load
        self.batch_size, self.cache = batch_size, cache
        self.passes = self.patched_passes = self.demonstration_passes = 0
        self.prompts: set[str] = set()
        self.seconds = 0.0

    @functools.cached_property
    def lmm(self) -> LMM:
        """The model, loaded when first asked for."""
        with self.timed():
            return self._load()

    @functools.lru_cache(maxsize=4)  # noqa: B019 (a reader lives as long as its run)
    def reinitialized(self, seed: int) -> LMM:
        """The same model with random weights."""
        lmm = self.lmm
        with self.timed():
            return lmm.reinitialized(seed)

    @functools.lru_cache(maxsize=4)  # noqa: B019
    def embeddings(self, path: str) -> Embeddings:
        """A dual encoder, loaded when first asked for, and its embeddings, kept."""
        with self.timed():
            return Embeddings(load_dual_encoder(path), self.cache)

    @functools.lru_cache(maxsize=4)  # noqa: B019
    def bank(self, path: str) -> DemonstrationBank:
        """Demonstrations as virtual tokens, by a projection that is loaded when first asked for."""
        return DemonstrationBank(self.lmm, load_aim(path), self.batch_size)

    def read(
        self,
        lmm: LMM,
        examples: Sequence[Example],
        options: Sequence[str] = (),
        max_new_tokens: int = 0,
        *,
        keep_heads: bool = True,
        edit: HeadEdit | None = None,
    ) -> Readings:
        """As :func:`sav_jax.reading.read`, counted and timed."""
        with self.timed():
            readings = read(
                lmm,
                examples,
                options,
                max_new_tokens,
                self.batch_size,
                self.cache,
                keep_heads=keep_heads,
                edit=edit,
            )
        if edit is None:
            self.passes += readings.passes
            self.prompts.update(readings.keys)
        else:
            self.patched_passes += readings.passes
        return readings

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Count what happens inside as time in the model."""
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start


@dataclass
class Universe:
    """All items of a task that any of its splits needs, and what models say of them, each prompt read once.

    Attributes:
      task: the task.
      items: E items.
      labels: C class names.
      reader: runs the models.
      max_new_tokens: longest answer that a model may write.
      kept: what methods have made of it and will want again, by names of their own.
    """

    task: Task
    items: tuple[Item, ...]
    labels: tuple[str, ...]
    reader: Reader
    max_new_tokens: int = 32
    kept: dict[Any, Any] = field(default_factory=dict)
    _random: dict[int, Readings] = field(default_factory=dict)
    _answers: dict[tuple[Any, ...], tuple[Readings, Any]] = field(default_factory=dict)

    @functools.cached_property
    def place(self) -> dict[int, int]:
        """Row of an item, by its identity."""
        return {id(item): row for row, item in enumerate(self.items)}

    @functools.cached_property
    def readings(self) -> Readings:
        """Heads, likelihoods of the task's answers and the answer written: one pass for all of them."""
        examples = [item.example for item in self.items]
        answers = [self.task.answer(label) for label in self.labels]
        return self.reader.read(self.reader.lmm, examples, answers, self.max_new_tokens)

    def random_readings(self, seed: int) -> Readings:
        """Heads of the model with random weights."""
        if seed not in self._random:
            lmm = self.reader.reinitialized(seed)
            self._random[seed] = self.reader.read(lmm, [item.example for item in self.items])
        return self._random[seed]

    def answers(self, examples: Sequence[Example], edit: HeadEdit | None = None) -> Readings:
        """Likelihoods of the task's answers and the answer written after other prompts, or with head outputs changed;
        without heads.
        """
        prompts = (
            (e.question, e.frames, *map(id, e.images), "", *map(id, e.videos), *(v.key for v in e.virtual))
            for e in examples
        )
        name = (id(edit), *prompts)
        if name not in self._answers:
            options = [self.task.answer(label) for label in self.labels]
            readings = self.reader.read(
                self.reader.lmm, examples, options, self.max_new_tokens, keep_heads=False, edit=edit
            )
            self._answers[name] = readings, (examples, edit)  # kept, so that their ids stay their own
        return self._answers[name][0]

    def rows(self, items: Sequence[Item]) -> np.ndarray:
        """Rows of items, int [R]."""
        return np.array([self.place[id(item)] for item in items], np.int64)


class Features:
    """What a method is given: a split, the settings, and what models make of the split's examples.

    Attributes:
      task, split, settings: what is asked.
      reader: runs further prompts.
    """

    def __init__(self, universe: Universe, split: Split, settings: Settings) -> None:
        self._universe = universe
        self.task, self.split, self.settings = universe.task, split, settings
        self.reader = universe.reader
        self._support, self._queries = universe.rows(split.support), universe.rows(split.queries)

    @property
    def targets(self) -> np.ndarray:
        """Class of each support example, int [S]: its column. All 0 in a generative task, which has no classes."""
        if self.task.generative:
            return np.zeros(len(self.split.support), np.int64)
        column = {label: i for i, label in enumerate(self.split.labels)}
        return np.array([column[item.label] for item in self.split.support], np.int64)

    @functools.cached_property
    def heads(self) -> tuple[Heads, Heads]:
        """Head vectors of the support and of the queries."""
        if "readings" not in vars(self._universe):  # nothing is read for a number that is refused
            self._check_num_heads(self.reader.lmm.heads_shape)
        return self._pair(self._universe.readings.heads)

    @functools.cached_property
    def random_heads(self) -> tuple[Heads, Heads]:
        """The same with random weights in every part of the model."""
        return self._pair(self._universe.random_readings(self.settings.seed).heads)

    @functools.cached_property
    def option_scores(self) -> np.ndarray:
        """Log-likelihood of each class's answer after each query, float32 [Q, C]."""
        return self._universe.readings.scores[self._queries]

    @functools.cached_property
    def support_option_scores(self) -> np.ndarray:
        """The same after each support example, float32 [S, C]."""
        return self._universe.readings.scores[self._support]

    @functools.cached_property
    def texts(self) -> tuple[str, ...]:
        """What the model writes after each query, Q texts."""
        if self.task.generative:  # neither heads nor the support are of use
            readings = self.answers([item.example for item in self.split.queries])
            return tuple(generation.text for generation in readings.generations)
        generations = self._universe.readings.generations
        return tuple(generations[row].text for row in self._queries)

    def text_heads(self, texts: Sequence[str]) -> np.ndarray:
        """Head vectors of texts without images, each asked like a question: float32 [K, L, N, H]."""
        return self.reader.read(self.reader.lmm, [Example(text) for text in texts]).heads

    @property
    def kept(self) -> dict[Any, Any]:
        """What methods have made of the task so far and will want again, by names of their own."""
        return self._universe.kept

    def answers(self, examples: Sequence[Example], edit: HeadEdit | None = None) -> Readings:
        """Likelihoods of the task's answers and the answer written after other prompts, such as with demonstrations, or
        with head outputs changed; read once for all methods, without heads.
        """
        return self._universe.answers(examples, edit)

    def _pair(self, heads: np.ndarray) -> tuple[Heads, Heads]:
        self._check_num_heads(heads.shape[1:])
        return Heads(heads, self._support), Heads(heads, self._queries)

    def _check_num_heads(self, shape: Sequence[int]) -> None:
        """Of heads, (L, N, H)."""
        available = shape[0] * shape[1]
        if not 1 <= self.settings.num_heads <= available:
            raise UserError(f"--num-heads is {self.settings.num_heads}; there are {available} heads to choose from")
