"""Training of the bundled model from nothing, in two stages.

Stage 1 teaches the vision tower and the projector to see: the mean of an image's projected tokens, normalised, is
classified against the language model's own word embeddings, one label per group (digit, letter, shape, colour, texture,
category). Stage 2 teaches the whole LMM to answer questions in chats, with the loss on the answers only. Matrices learn
by Muon, everything else by AdamW.

Every batch is a function of (stage, step) and the state is written atomically, so that a killed run goes on where it
was and ends with the same weights.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization, struct

from sav_jax.models.batch import Batch
from sav_jax.models.llava import Llava
from sav_jax.models.multimodal import Output
from sav_jax.models.registry import architecture
from sav_jax.models.weights import save_checkpoint
from sav_jax.train.tiny_card import model_card
from sav_jax.train.tiny_data import (
    BUCKETS,
    GROUPS,
    Chats,
    LabelBatch,
    QuestionBatch,
    held_out_scenes,
    label_batch,
    prefetched,
)
from sav_jax.train.tiny_recipe import Params, Recipe, optimizer, updated
from sav_jax.world.checkpoint import write_skeleton
from sav_jax.world.questions import ask, ask_both

Metrics = dict[str, float]


@struct.dataclass
class State:
    """What a checkpoint holds: stage and steps done in it, parameters and the optimiser's state."""

    stage: int
    step: int
    params: Params
    optimizer: Any


def group_logits(model: Llava, params: Params, tiles: jax.Array, group_ids: list[np.ndarray]) -> list[jax.Array]:
    """Similarities of images with the words of each label group, a list of ``[B, names]``.

    Args:
        model: the LMM.
        params: its parameters.
        tiles: float ``[B, 1, height, width, 3]``.
        group_ids: token ids of each group's words.
    """
    features: jax.Array = model.apply({"params": params}, tiles, method="encode_tiles")  # type: ignore[assignment]
    pooled = jnp.mean(features, axis=(1, 2))
    pooled = pooled * jax.lax.rsqrt(jnp.mean(jnp.square(pooled), axis=-1, keepdims=True) + 1e-6)
    words = params["language_model"]["embed_tokens"]
    # Embeddings start at 0.02; the factor lets similarities reach confident logits without large embeddings.
    return [4.0 * jnp.einsum("BD,WD->BW", pooled, words[jnp.asarray(ids)]) for ids in group_ids]


def label_loss(
    params: Params, tiles: jax.Array, labels: jax.Array, model: Llava, group_ids: list[np.ndarray]
) -> jax.Array:
    """Stage 1: weighted cross-entropy within each group, over the images the group says something about."""
    total = jnp.zeros(())
    for group, (logits, (_, share)) in enumerate(
        zip(group_logits(model, params, tiles, group_ids), GROUPS.values(), strict=True)
    ):
        wanted = jax.nn.one_hot(labels[:, group], logits.shape[1])  # all zero for -1
        total = total - share * jnp.sum(wanted * jax.nn.log_softmax(logits)) / labels.shape[0]
    return total


def answer_logits(params: Params, batch: Batch, model: Llava) -> jax.Array:
    """float32 ``[B, R, V]`` at the batch's read positions."""
    output: Output = model.apply({"params": params}, batch, logits="read")  # type: ignore[assignment]
    assert output.logits is not None
    return output.logits


def answer_loss(params: Params, batch: Batch, targets: jax.Array, weights: jax.Array, model: Llava) -> jax.Array:
    """Stage 2: mean cross-entropy of the answers' tokens."""
    logits = answer_logits(params, batch, model)
    wanted = jax.nn.one_hot(targets, logits.shape[-1])
    losses = -jnp.sum(wanted * jax.nn.log_softmax(logits), axis=-1)
    return jnp.sum(losses * weights) / jnp.sum(weights)


def device_batch(batch: QuestionBatch) -> Batch:
    """The model's part of a question batch."""
    return Batch(
        token_ids=jnp.asarray(batch.token_ids),
        lengths=jnp.asarray(batch.lengths),
        read_positions=jnp.asarray(batch.read_positions),
        pixels=jnp.asarray(batch.tiles),
        visual_index=jnp.asarray(batch.visual_index),
        visual_weight=jnp.asarray(batch.visual_weight),
    )


class Trainer:
    """Trains one model in one directory.

    The directory holds the checkpoint's tokenizer and processor files, ``state.msgpack`` (the latest state),
    ``recipe.json`` and ``log.jsonl`` (a row per report or evaluation).
    """

    def __init__(self, recipe: Recipe, directory: Path):
        self.recipe = recipe
        self.directory = directory.absolute()
        self.config = write_skeleton(self.directory)
        self.config["vision_config"].update(dict(recipe.vision))
        self.config["text_config"].update(dict(recipe.text))
        (self.directory / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        (self.directory / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
        self.model: Llava = architecture(self.config).module  # type: ignore[assignment]
        self.chats = Chats(self.directory)
        self.group_ids = [
            np.array([self.chats.processor.encode(name)[0] for name in names], np.int32) for names, _ in GROUPS.values()
        ]

    def initial_params(self) -> Params:
        """Random weights, by the recipe's seed."""
        return jax.jit(self._initial_params)()

    def _initial_params(self) -> Params:
        scene = held_out_scenes("glyph", 1)[0]
        batch = self.chats.batch([([scene], ask(scene, 0, 1))], BUCKETS["square"])
        return self.model.init(jax.random.key(self.recipe.seed), device_batch(batch))["params"]

    def _fresh(self, stage: int, params: Params) -> State:
        return State(stage=stage, step=0, params=params, optimizer=optimizer(self.recipe, stage).init(params))

    def save(self, state: State) -> None:
        """Writes the state beside the old one and renames it: a kill leaves one or the other."""
        partial_file = self.directory / "state.partial"
        with partial_file.open("wb") as file:
            file.write(bytes([state.stage]) + serialization.to_bytes(jax.device_get(state)))
            file.flush()
            os.fsync(file.fileno())
        partial_file.replace(self.directory / "state.msgpack")

    def restore(self) -> State:
        """The latest state, or the first."""
        file = self.directory / "state.msgpack"
        if not file.exists():
            return self._fresh(1, self.initial_params())
        content = file.read_bytes()
        shapes = jax.eval_shape(lambda: self._fresh(content[0], self._initial_params()))
        state = serialization.from_bytes(shapes, content[1:])
        return jax.tree.map(jnp.asarray, state).replace(stage=int(state.stage), step=int(state.step))

    def log(self, **row: Any) -> None:
        """Appends a row to ``log.jsonl``."""
        with (self.directory / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def run(self, stop_after: int | None = None) -> Params:
        """Trains from the latest state to the end and returns the parameters.

        Args:
            stop_after: stop after so many steps without a word, as if killed (for tests).
        """
        state = self.restore()
        if state.stage == 1:
            state, stop_after = self._stage(state, stop_after)
            if stop_after == 0:
                return state.params
            state = self._fresh(2, state.params)
            self.save(state)
        return self._stage(state, stop_after)[0].params

    def _stage(self, state: State, stop_after: int | None) -> tuple[State, int | None]:
        """Finishes the state's stage; the second result is what is left of ``stop_after``."""
        recipe, stage, total = self.recipe, state.stage, self.recipe.steps(state.stage)
        update = self._label_step if stage == 1 else self._question_step
        size = recipe.label_batch_size if stage == 1 else recipe.question_batch_size
        params, optimizer_state = state.params, state.optimizer
        losses: list[jax.Array] = []
        since = time.perf_counter()
        batches = prefetched(self.directory, stage, range(state.step, total), size)
        with closing(batches):  # type: ignore[type-var]
            for step, batch in zip(range(state.step, total), batches, strict=False):
                params, optimizer_state, loss = update(params, optimizer_state, batch)
                losses.append(loss)
                done = step + 1
                if done % 50 == 0 or done == total:
                    values = np.asarray([float(v) for v in losses])
                    rate = len(losses) * size / (time.perf_counter() - since)
                    self.log(stage=stage, step=done, loss=float(values.mean()), examples_per_second=round(rate, 1))
                    losses, since = [], time.perf_counter()
                if done % recipe.evaluate_every == 0 or done == total:
                    evaluate = self.evaluate_labels if stage == 1 else self.evaluate_questions
                    self.log(stage=stage, step=done, held_out=evaluate(params, recipe.evaluation_size))
                    since = time.perf_counter()
                if done % recipe.checkpoint_every == 0 or done == total:
                    self.save(State(stage=stage, step=done, params=params, optimizer=optimizer_state))
                if stop_after is not None:
                    stop_after -= 1
                    if stop_after == 0:
                        break
        return State(stage=stage, step=total, params=params, optimizer=optimizer_state), stop_after

    @cached_property
    def _label_step(self) -> Callable[..., Any]:
        transform = optimizer(self.recipe, 1)
        loss = partial(label_loss, model=self.model, group_ids=self.group_ids)

        @partial(jax.jit, donate_argnums=(0, 1))
        def update(params: Params, state: Any, tiles: jax.Array, labels: jax.Array) -> tuple[Params, Any, jax.Array]:
            value, gradients = jax.value_and_grad(loss)(params, tiles, labels)
            return *updated(transform, params, state, gradients), value

        def step(params: Params, state: Any, batch: LabelBatch) -> tuple[Params, Any, jax.Array]:
            return update(params, state, jnp.asarray(batch.tiles), jnp.asarray(batch.labels))

        return step

    @cached_property
    def _question_step(self) -> Callable[..., Any]:
        transform = optimizer(self.recipe, 2)
        loss = partial(answer_loss, model=self.model)

        @partial(jax.jit, donate_argnums=(0, 1))
        def update(
            params: Params, state: Any, batch: Batch, targets: jax.Array, weights: jax.Array
        ) -> tuple[Params, Any, jax.Array]:
            value, gradients = jax.value_and_grad(loss)(params, batch, targets, weights)
            return *updated(transform, params, state, gradients), value

        def step(params: Params, state: Any, batch: QuestionBatch) -> tuple[Params, Any, jax.Array]:
            return update(params, state, device_batch(batch), jnp.asarray(batch.targets), jnp.asarray(batch.weights))

        return step

    def export(self, params: Params, output: Path) -> None:
        """Writes the checkpoint directory: bfloat16 weights, their evaluation on held-out scenes, and its card."""
        write_skeleton(output)
        save_checkpoint(output, self.config, jax.device_get(params), dtype="bfloat16")
        rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), params)
        number = self.recipe.final_evaluation_size
        evaluation = {
            "recipe": asdict(self.recipe),
            "parameters": sum(x.size for x in jax.tree.leaves(params)),
            "scenes_per_kind": number,
            "labels": self.evaluate_labels(rounded, number),
            "questions": self.evaluate_questions(rounded, number),
            "guess": self.guesses(number),
        }
        (output / "evaluation.json").write_text(json.dumps(evaluation, indent=2) + "\n")
        (output / "README.md").write_text(model_card(evaluation))

    @cached_property
    def _predict_labels(self) -> Callable[..., list[jax.Array]]:
        return jax.jit(partial(group_logits, self.model, group_ids=self.group_ids))

    @cached_property
    def _predict_answers(self) -> Callable[..., jax.Array]:
        return jax.jit(lambda params, batch: jnp.argmax(answer_logits(params, batch, self.model), axis=-1))

    def evaluate_labels(self, params: Params, number: int) -> Metrics:
        """Accuracy within each label group on held-out scenes, as "digit (scan)"; ``number`` scenes of each sort."""
        results: Metrics = {}
        for kind, category in (
            ("scan", "digit"),
            ("scan", "letter"),
            ("glyph", "digit"),
            ("glyph", "letter"),
            ("shape", None),
        ):
            right: dict[str, list[bool]] = defaultdict(list)
            scenes = held_out_scenes(kind, number, category=category)
            batch = label_batch(scenes)
            logits = self._predict_labels(params, tiles=jnp.asarray(batch.tiles))
            for group, scores in zip(GROUPS, logits, strict=True):
                column = batch.labels[:, list(GROUPS).index(group)]
                hits = np.asarray(jnp.argmax(scores, axis=-1)) == column
                if (column >= 0).any():
                    right[group] = list(hits[column >= 0])
            results |= {
                f"{group} ({kind} {category or ''})".replace(" )", ")"): float(np.mean(v)) for group, v in right.items()
            }
        return {name: round(value, 4) for name, value in results.items()}

    def evaluate_questions(self, params: Params, number: int, batch_size: int = 64) -> Metrics:
        """Share of first questions about held-out scenes answered exactly, by kind of scene and type of question.

        ``number`` scenes of each kind; every answer token must be the likeliest one (greedy decoding gives just this
        answer).
        """
        right: dict[str, list[bool]] = defaultdict(list)
        for bucket_name, kind, questions in self._held_out(number):
            size = max(round(batch_size * BUCKETS[bucket_name].batch_share), 1)
            for first in range(0, len(questions), size):
                part = questions[first : first + size]
                # The last batch is filled up with its own first rows: one compiled shape per bucket.
                batch = self.chats.batch([part[i % len(part)] for i in range(size)], BUCKETS[bucket_name])
                best = np.asarray(self._predict_answers(params, device_batch(batch)))
                hits = np.all((best == batch.targets) | (batch.weights == 0), axis=1)
                for hit, (_, (qa,)) in zip(hits.tolist(), part, strict=False):
                    right[f"{qa.type} ({kind})"].append(hit)
        return {name: round(float(np.mean(values)), 4) for name, values in sorted(right.items())}

    def guesses(self, number: int) -> Metrics:
        """Share of the commonest answer for each row of :meth:`evaluate_questions`: what one answer to all reaches."""
        answers: dict[str, list[str]] = defaultdict(list)
        for _, kind, questions in self._held_out(number):
            for _, (qa,) in questions:
                answers[f"{qa.type} ({kind})"].append(qa.answer)
        return {name: round(Counter(v).most_common(1)[0][1] / len(v), 4) for name, v in sorted(answers.items())}

    def _held_out(self, number: int) -> Iterator[tuple[str, str, list[tuple[list[Any], list[Any]]]]]:
        """(bucket, kind, [(scenes, one question)])."""
        for kind in ("scan", "glyph", "shape", "pair", "group"):
            yield "square", kind, [([s], ask(s, i, 1)) for i, s in enumerate(held_out_scenes(kind, number))]
        scenes = held_out_scenes("scan", number) + held_out_scenes("shape", number)
        two = [([scenes[i], scenes[-1 - i]], ask_both(scenes[i], scenes[-1 - i], i)[:1]) for i in range(number)]
        yield "two", "two images", two
        large = held_out_scenes("glyph", number, side=BUCKETS["large"].side)
        yield "large", "64 pixels", [([s], ask(s, i, 1)) for i, s in enumerate(large)]
