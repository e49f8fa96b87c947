"""Training of a bundled model from nothing, in stages.

First the tower and the projector learn to see: the mean of an image's projected tokens, normalised, is classified
against the language model's own word embeddings, one label per group (digit, letter, shape, object, word, colour,
texture, category). Then the whole LMM learns to answer several questions about an image in a chat, with the loss on the
answers only and the first loss, small, beside it. Matrices learn by Muon, everything else by AdamW.

Every batch is a function of (stage, step) and the state is written atomically, so that a killed run goes on where it
was and ends with the same weights. The host never waits for a step: losses are read when they are logged.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization, struct

from sav_jax.errors import UserError
from sav_jax.models.batch import Batch
from sav_jax.models.multimodal import MultimodalModel, Output, init_params
from sav_jax.models.registry import architecture
from sav_jax.models.weights import load_params, save_checkpoint
from sav_jax.train.tiny_data import BUCKETS, GROUPS, READS, Chats, TinyBatch, bucket_of, prefetched, rows_of
from sav_jax.train.tiny_layout import Plan
from sav_jax.train.tiny_recipe import Params, Recipe, Stage, factors, optimizer, updated
from sav_jax.world.checkpoint import SKELETON_FILES, write_skeleton

_IN_FLIGHT = 6  # steps that the host may be ahead of the device


@struct.dataclass
class State:
    """What a checkpoint holds: steps done, parameters and the optimiser's state."""

    step: int
    params: Params
    optimizer: Any


def group_logits(model: MultimodalModel, params: Params, batch: Batch, group_ids: list[np.ndarray]) -> list[jax.Array]:
    """Similarities of images with the words of each label group, a list of float32 ``[B, names]``.

    Args:
        model: the LMM.
        params: its parameters.
        batch: images; text does not matter.
        group_ids: token ids of each group's words.
    """
    table, _ = model.apply({"params": params}, batch, method="encode_images")
    pooled = jnp.mean(table[:, 1:].astype(jnp.float32), axis=1)
    pooled = pooled * jax.lax.rsqrt(jnp.mean(jnp.square(pooled), axis=-1, keepdims=True) + 1e-6)
    words = params["language_model"]["embed_tokens"].astype(jnp.float32)
    # Embeddings start at 0.02; the factor lets similarities reach confident logits without large embeddings.
    return [4.0 * jnp.einsum("BD,WD->BW", pooled, words[jnp.asarray(ids)]) for ids in group_ids]


def label_loss(logits: list[jax.Array], labels: jax.Array) -> jax.Array:
    """Weighted cross-entropy within each group, over the images the group says something about (labels ``[B, G]``)."""
    total = jnp.zeros(())
    for group, (scores, (_, share)) in enumerate(zip(logits, GROUPS.values(), strict=True)):
        wanted = jax.nn.one_hot(labels[:, group], scores.shape[1])  # all zero for -1
        total = total - share * jnp.sum(wanted * jax.nn.log_softmax(scores)) / labels.shape[0]
    return total


def answer_logits(model: MultimodalModel, params: Params, batch: Batch) -> jax.Array:
    """float32 ``[B, R, V]`` at the batch's read positions."""
    output: Output = model.apply({"params": params}, batch, logits="read")  # type: ignore[assignment]
    assert output.logits is not None
    return output.logits


def answer_loss(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """Mean cross-entropy of the answers' tokens."""
    wanted = jax.nn.one_hot(targets, logits.shape[-1])
    losses = -jnp.sum(wanted * jax.nn.log_softmax(logits), axis=-1)
    return jnp.sum(losses * weights) / jnp.sum(weights)


class Trainer:
    """Trains one model in one directory.

    The directory holds the checkpoint's tokenizer and processor files, ``state.msgpack`` (the latest state),
    ``recipe.json`` and ``log.jsonl`` (a row per report or evaluation).
    """

    def __init__(self, recipe: Recipe, directory: Path):
        self.recipe = recipe
        self.directory = directory.absolute()
        self.config = write_skeleton(self.directory, recipe.family)
        self.skeleton = sorted({f.name for f in self.directory.iterdir()} & set(SKELETON_FILES))
        self.config["vision_config"].update(dict(recipe.vision))
        self.config["text_config"].update(dict(recipe.text))
        (self.directory / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        (self.directory / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
        self.model = architecture(self.config).module
        self.chats = Chats(self.directory)
        self.group_ids = [
            np.array([self.chats.layout.tokens(name)[0] for name in names], np.int32) for names, _ in GROUPS.values()
        ]
        self.transform = optimizer(recipe)
        self._programs: dict[tuple[str, ...], Future[Callable[..., Any]]] = {}
        self._compilers = ThreadPoolExecutor(6)

    def initial_params(self) -> Params:
        """Random weights, by the recipe's seed."""
        return jax.jit(self._initial_params)()

    def _initial_params(self) -> Params:
        return init_params(self.model, jax.random.key(self.recipe.seed))

    def _fresh(self, params: Params) -> State:
        return State(step=0, params=params, optimizer=self.transform.init(params))

    def save(self, state: State) -> None:
        """Writes the state beside the old one and renames it: a kill leaves one or the other."""
        partial_file = self.directory / "state.partial"
        with partial_file.open("wb") as file:
            file.write(serialization.to_bytes(jax.device_get(state)))
            file.flush()
            os.fsync(file.fileno())
        partial_file.replace(self.directory / "state.msgpack")

    def restore(self) -> State:
        """The latest state, or the first.

        Raises:
            UserError: the state is of a model of other shapes.
        """
        file = self.directory / "state.msgpack"
        if not file.exists():
            return jax.jit(lambda: self._fresh(self._initial_params()))().replace(step=0)
        shapes = jax.eval_shape(lambda: self._fresh(self._initial_params()))
        state = serialization.from_bytes(shapes, file.read_bytes())
        if jax.tree.map(jnp.shape, state) != jax.tree.map(jnp.shape, shapes):
            raise UserError(f"{file}: of a model of other shapes, or of an earlier version; take another --run-dir")
        return jax.tree.map(jnp.asarray, state).replace(step=int(state.step))

    def latest(self) -> tuple[Params, int]:
        """Parameters and steps done of the latest state; without one, of ``model.safetensors`` (steps unknown: -1).

        Raises:
            UserError: there is neither.
        """
        weights = self.directory / "model.safetensors"
        if not (self.directory / "state.msgpack").exists():
            if not weights.exists():
                raise UserError(f"{self.directory}: neither state.msgpack nor model.safetensors to export from")
            table, shapes = architecture(self.config).table, self._state_shapes().params
            return load_params(self.directory, table, shapes, jnp.float32), -1
        state = self.restore()
        return state.params, state.step

    def log(self, **row: Any) -> None:
        """Appends a row to ``log.jsonl``."""
        with (self.directory / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    # ------------------------------------------------------------------ programs

    def _plan(self, bucket: str) -> Plan:
        b = BUCKETS[bucket]
        return self.chats.layout.plan(b.images, b.side, max(b.tokens, 1))

    def _loss(
        self, params: Params, label_weight: jax.Array, arrays: tuple[jax.Array, ...], bucket: str
    ) -> tuple[jax.Array, jax.Array]:
        """The loss, and the likeliest tokens ``[B, R]``; without text the likeliest label of each group ``[B, G]``."""
        images, labels, token_ids, lengths, reads, targets, weights = arrays
        if self.recipe.dtype != "float32":
            params = jax.tree.map(lambda x: x.astype(self.recipe.dtype), params)
        layout, plan = self.chats.layout, self._plan(bucket)
        scores = None
        if BUCKETS[bucket].images == 1:
            scores = group_logits(self.model, params, layout.images_only(images, plan), self.group_ids)
        if scores is not None and not BUCKETS[bucket].tokens:
            return label_loss(scores, labels), jnp.stack([jnp.argmax(s, axis=-1) for s in scores], axis=1)
        batch = layout.batch(token_ids, lengths, reads, images, plan)
        logits = answer_logits(self.model, params, batch)
        loss = answer_loss(logits, targets, weights)
        if scores is not None:
            loss = loss + label_weight * label_loss(scores, labels)
        return loss, jnp.argmax(logits, axis=-1)

    def _shapes(self, bucket: str, rows: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Of :meth:`tiny_data.TinyBatch.arrays`."""
        b = BUCKETS[bucket]
        views, side = self.chats.layout.views(b.images, b.side)
        tokens = max(b.tokens, 1)
        return (
            jax.ShapeDtypeStruct((rows, views, side, side, 3), jnp.uint8),
            jax.ShapeDtypeStruct((rows, len(GROUPS)), jnp.int32),
            jax.ShapeDtypeStruct((rows, tokens), jnp.int32),
            jax.ShapeDtypeStruct((rows,), jnp.int32),
            jax.ShapeDtypeStruct((rows, READS), jnp.int32),
            jax.ShapeDtypeStruct((rows, READS), jnp.int32),
            jax.ShapeDtypeStruct((rows, READS), jnp.float32),
        )

    def _state_shapes(self) -> State:
        return jax.eval_shape(lambda: self._fresh(self._initial_params()))

    def _submit(self, *key: str, build: Callable[[], Callable[..., Any]]) -> Future[Callable[..., Any]]:
        """Compiles in a thread of its own; XLA leaves Python alone meanwhile."""
        if key not in self._programs:
            self._programs[key] = self._compilers.submit(build)
        return self._programs[key]

    def gradients_of(self, bucket: str, rows: int) -> Future[Callable[..., Any]]:
        """``(params, label_weight, *arrays) -> ((loss, likeliest), gradients)`` for ``rows`` prompts of a bucket."""

        def build() -> Callable[..., Any]:
            def run(params: Params, label_weight: jax.Array, *arrays: jax.Array) -> Any:
                return jax.value_and_grad(self._loss, has_aux=True)(params, label_weight, arrays, bucket)

            weight = jax.ShapeDtypeStruct((), jnp.float32)
            return jax.jit(run).lower(self._state_shapes().params, weight, *self._shapes(bucket, rows)).compile()

        return self._submit("gradients", bucket, str(rows), build=build)

    def losses_of(self, bucket: str, rows: int) -> Future[Callable[..., Any]]:
        """``(params, label_weight, *arrays) -> (loss, likeliest)``, as :meth:`gradients_of` but for the gradients."""

        def build() -> Callable[..., Any]:
            def run(params: Params, label_weight: jax.Array, *arrays: jax.Array) -> Any:
                return self._loss(params, label_weight, arrays, bucket)

            weight = jax.ShapeDtypeStruct((), jnp.float32)
            return jax.jit(run).lower(self._state_shapes().params, weight, *self._shapes(bucket, rows)).compile()

        return self._submit("losses", bucket, str(rows), build=build)

    def update(self) -> Future[Callable[..., Any]]:
        """``(params, optimizer, gradients, scale) -> (params, optimizer, finite)``."""

        def build() -> Callable[..., Any]:
            def run(params: Params, state: Any, gradients: Params, scale: jax.Array) -> tuple[Params, Any, jax.Array]:
                return updated(self.transform, params, state, gradients, scale)

            state, scale = self._state_shapes(), jax.ShapeDtypeStruct((3,), jnp.float32)
            jitted = jax.jit(run, donate_argnums=(0, 1))
            return jitted.lower(state.params, state.optimizer, state.params, scale).compile()

        return self._submit("update", build=build)

    def likeliest(self, params: Params, batch: TinyBatch) -> np.ndarray:
        """Likeliest tokens ``[B, R]`` (or labels ``[B, G]``) of a batch, by the program that training has compiled.

        Without training (``--export-only``) there is none, and one without gradients takes a fraction of the memory.
        """
        rows = len(batch.images)
        if ("gradients", batch.bucket, str(rows)) in self._programs:
            (_, best), _ = self.gradients_of(batch.bucket, rows).result()(params, np.float32(0), *batch.arrays())
        else:
            _, best = self.losses_of(batch.bucket, rows).result()(params, np.float32(0), *batch.arrays())
        return np.asarray(best)

    def compile_ahead(self) -> None:
        """Begins to compile all that training needs, side by side."""
        for stage in self.recipe.stages:
            for bucket in dict(stage.buckets) or {"image": 1.0}:
                self.gradients_of(bucket, rows_of(bucket, stage.batch_size))

    # ------------------------------------------------------------------ the loop

    def run(
        self,
        *,
        workers: int = 1,
        max_seconds: float | None = None,
        save_seconds: float = 60.0,
        snapshot: Callable[[Params], None] | None = None,
        stop_step: int | None = None,
        stop_after: int | None = None,
    ) -> State:
        """Trains from the latest state to the end.

        Args:
            workers: processes that draw.
            max_seconds: stop after about so many, with the state saved; the schedule is the recipe's all the same.
            save_seconds: between states written (and snapshots taken).
            snapshot: given the parameters whenever the state is written.
            stop_step: stop when so many steps are done, with the state saved; the schedule stays the same.
            stop_after: stop after so many steps without a word, as if killed (for tests).

        Returns:
            The state reached.
        """
        from sav_jax.train.tiny_evaluation import evaluate

        recipe, state = self.recipe, self.restore()
        last = recipe.steps if stop_step is None else min(recipe.steps, stop_step)
        if state.step >= last:
            return state
        self.update()  # compiled while the first gradients are
        params, optimizer_state = state.params, state.optimizer
        began = saved = since = time.perf_counter()
        images = 0
        pending: deque[tuple[jax.Array, jax.Array]] = deque()
        steps = range(state.step, last if stop_after is None else min(last, state.step + stop_after))
        batches = prefetched(self.directory, recipe, range(state.step, last), workers)
        with closing(batches):  # type: ignore[type-var]
            for step, batch in zip(steps, batches, strict=False):
                stage, at = recipe.place(step)
                assert batch.bucket == bucket_of(stage, at)
                differentiate = self.gradients_of(batch.bucket, len(batch.images)).result()
                (loss, _), gradients = differentiate(params, np.float32(stage.label_weight), *batch.arrays())
                scale = np.asarray(factors(recipe, step), np.float32)
                params, optimizer_state, finite = self.update().result()(params, optimizer_state, gradients, scale)
                if not pending and step == steps.start and jax.default_backend() != "cpu":
                    self.compile_ahead()  # beside the first steps
                pending.append((loss, finite))
                images += len(batch.images) * BUCKETS[batch.bucket].images
                if len(pending) >= _IN_FLIGHT:
                    jax.block_until_ready(pending[-_IN_FLIGHT])
                done, now = step + 1, time.perf_counter()
                if done % recipe.log_every == 0 or done == last:
                    self._report(stage, done, pending, images / (now - since), now - began)
                    images, since = 0, time.perf_counter()
                if done % recipe.evaluate_every == 0 or done == recipe.steps:
                    held_out = evaluate(self, params, recipe.evaluation_size, labels=stage.name == "seeing")
                    self.log(stage=stage.name, step=done, held_out=held_out)
                    images, since = 0, time.perf_counter()
                late = max_seconds is not None and now - began > max_seconds
                if (now - saved > save_seconds and stop_after is None) or late or done == last:
                    self.save(State(step=done, params=params, optimizer=optimizer_state))
                    if snapshot is not None:
                        snapshot(params)
                    saved = time.perf_counter()
                state = State(step=done, params=params, optimizer=optimizer_state)
                if late:
                    break
        return state

    def _report(
        self, stage: Stage, done: int, pending: deque[tuple[jax.Array, jax.Array]], rate: float, seconds: float
    ) -> None:
        """Logs the mean loss since the last report.

        Raises:
            FloatingPointError: more than a tenth of the steps had a gradient that is not finite.
        """
        losses, finite = (np.asarray(jax.device_get(values)) for values in zip(*pending, strict=True))
        pending.clear()
        skipped = int((~finite).sum())
        loss = float(losses[finite].mean()) if finite.any() else float("nan")
        self.log(
            stage=stage.name,
            step=done,
            loss=loss,
            skipped=skipped,
            images_per_second=round(rate, 1),
            seconds=round(seconds, 1),
        )
        if skipped > 0.1 * len(finite):
            raise FloatingPointError(f"{skipped} of {len(finite)} steps before step {done} had gradients of no size")

    def write_weights(self, params: Params, output: Path) -> None:
        """The checkpoint directory with bfloat16 weights, without its card."""
        output.mkdir(parents=True, exist_ok=True)
        for name in self.skeleton:
            shutil.copy(self.directory / name, output / name)
        save_checkpoint(output, self.config, jax.device_get(params), dtype="bfloat16")

    def export(self, params: Params, output: Path, account: str = "", options: Sequence[str] = ()) -> None:
        """Writes the checkpoint directory: bfloat16 weights, their evaluation on held-out scenes, and its card.

        Args:
            params: float32.
            output: the directory, made if missing.
            account: for the card: machine, time, and where this training was stopped.
            options: for the card: what ``scripts/train_tiny.py`` must be given besides the preset for this training.
        """
        from sav_jax.train.tiny_card import write_card
        from sav_jax.train.tiny_evaluation import counts, evaluate, guesses

        self.write_weights(params, output)
        rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), params)
        number = self.recipe.final_evaluation_size
        evaluation = {
            "recipe": asdict(self.recipe),
            "account": account,
            "options": list(options),
            "parameters": sum(x.size for x in jax.tree.leaves(params)),
            "scenes_per_kind": number,
            "labels": evaluate(self, rounded, number, labels=True, questions=False),
            "questions": evaluate(self, rounded, number),
            "guess": guesses(self, number),
            "counts": counts(self, number),
            "curve": self.curve(),
        }
        (output / "evaluation.json").write_text(json.dumps(evaluation, indent=1) + "\n")
        write_card(evaluation, output)

    def curve(self) -> list[dict[str, Any]]:
        """The rows of ``log.jsonl``; of steps logged twice (a run killed and resumed) the last."""
        file = self.directory / "log.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return list({(row["step"], "held_out" in row): row for row in rows}.values())
