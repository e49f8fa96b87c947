"""Where a model looks when it begins to answer after demonstrations: AIM's first observation (its figure 3).

The weights of attention are never kept by the library, whose kernels do not make them. They are read off by a value of
our own: three more numbers of every value vector say of which kind its token is, and what comes out in their place is
the share of the attention that tokens of each kind get.

Axes: B batch, T tokens, N heads, K key/value heads, H head width, C kinds.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import sav_jax
from sav_jax.batching import BatchPlan, plan_batches
from sav_jax.eval.methods.icl import draw_balanced, in_turns
from sav_jax.eval.tasks import find_tasks
from sav_jax.eval.tasks.base import split_task
from sav_jax.extract import plan_prompts, run_batches
from sav_jax.lmm import LMM
from sav_jax.models import decoder
from sav_jax.models.attention import attention
from sav_jax.models.processor import Prompt
from scripts.reproduction.heads import Sheet
from scripts.reproduction.study import Study

KINDS = "text", "images"
"""Of demonstrations: their questions and answers, to the letter; what the template puts around them is neither."""


_HOLE = "\ue000"  # in no text, and a template has no opinion on it


def kinds_of(lmm: LMM, prompt: Prompt, example: sav_jax.Example) -> np.ndarray:
    """Which tokens are the text of an example's earlier turns, which their images, float32 [T, C]."""
    processor = lmm.processor
    blank = tuple(replace(turn, question=_HOLE, answer=_HOLE) for turn in example.history)
    around = processor.text(_HOLE, len(example.images), (), blank).split(_HOLE)
    parts = [part for turn in example.history for part in (turn.question, turn.answer)]
    text, said = around[0], [np.zeros(len(around[0]), bool)]
    for part, behind in zip([*parts, example.question], around[1:], strict=True):
        text += part + behind
        said += [np.full(len(part), len(said) < 2 * len(parts)), np.zeros(len(behind), bool)]
    assert text == processor.text(example.question, len(example.images), (), example.history)
    inside = np.concatenate(said)
    encoded = processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, spans = np.array(encoded["input_ids"]), encoded["offset_mapping"]
    told = np.array([inside[start:stop].any() for start, stop in spans])
    visual = prompt.visual_index[:, 0] >= 0
    own = np.zeros(len(visual), bool)
    own[~visual] = told[~processor.is_media(ids)]  # the same tokens, but for those that images were widened to
    starts = np.flatnonzero(visual & ~np.append(False, visual[:-1]))
    before = np.arange(len(visual)) < starts[-1]  # where the query's image begins
    return np.stack([own, before & visual], axis=1).astype(np.float32)


@contextlib.contextmanager
def recorded(kinds: jax.Array, told: list[np.ndarray]) -> Iterator[None]:
    """Programs traced in here tell the shares of every layer's attention, at the last token, float [B, N, C]."""

    def recording(q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool, lengths: Any, **_: Any) -> jax.Array:
        marks = jnp.broadcast_to(kinds[:, :, None], (*v.shape[:3], kinds.shape[-1])).astype(v.dtype)
        both = attention(q, k, jnp.concatenate([v, marks], axis=-1), causal=causal, lengths=lengths, backend="xla")
        shares = both[jnp.arange(len(both)), lengths - 1, :, v.shape[-1] :]
        jax.debug.callback(lambda values: told.append(np.asarray(values)), shares)
        return both[..., : v.shape[-1]]

    with mock.patch.object(decoder, "attention", recording):
        yield


def shares_of(lmm: LMM, examples: Sequence[sav_jax.Example], batch_size: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Of each prompt the share of the attention at its last token that each kind gets, the mean over all heads of all
    layers, and its share of all tokens before the query: float [prompts, C] each.
    """
    prompts = plan_prompts(lmm, examples)
    kinds = [kinds_of(lmm, *of) for of in zip(prompts, examples, strict=True)]
    found = np.zeros((len(prompts), len(KINDS)))
    told: list[np.ndarray] = []

    def step(params: Any, batch: Any, marks: jax.Array) -> jax.Array:
        with recorded(marks, told):
            output: Any = lmm.module.apply({"params": params}, batch, logits="read")
        return output.logits

    program = jax.jit(step)
    for plan in plan_batches(prompts, batch_size):
        marks = np.zeros((plan.size, plan.bucket.tokens, len(KINDS)), np.float32)
        for place, row in enumerate(plan.rows):
            marks[place, : len(kinds[row])] = kinds[row]
        told.clear()
        further = functools.partial(_given, marks)
        run = run_batches(lmm, program, [plan], prompts, examples, progress=False, what="attention", further=further)
        list(run)
        jax.effects_barrier()
        if len(told) != lmm.num_layers:
            raise AssertionError(f"{len(told)} layers told their attention, not {lmm.num_layers}")
        found[list(plan.rows)] = np.mean(told, axis=(0, 2))[: len(plan.rows)]
    tokens = np.array([of.sum(axis=0) / of.sum() for of in kinds])
    return found, tokens


def _given(marks: np.ndarray, _: BatchPlan) -> tuple[np.ndarray]:
    return (marks,)


def attended(study: Study, model: str, tasks: Sequence[str], shots: int, demonstrations: int) -> dict[str, Any]:
    """Task -> of every query with demonstrations before it, as turns: the share of the attention on demonstrations that
    their text gets ("text of the attention"), text's share of their tokens ("text of the tokens"), and what
    demonstrations get of all attention ("demonstrations").
    """

    def compute() -> dict[str, Any]:
        lmm = study.load(model)
        found = {}
        for name in tasks:
            (task,) = find_tasks(name)
            sheet = Sheet()
            for seed in study.seeds:
                split = split_task(task, task.load(Path()), shots, seed, 20 if study.quick else 60)
                targets = np.array([split.labels.index(item.label) for item in split.support])
                drawn = draw_balanced(targets, demonstrations, np.random.default_rng(seed))
                chosen = [split.support[row] for row in drawn]
                shares, tokens = shares_of(lmm, [in_turns(task, chosen, item.example) for item in split.queries])
                sheet.start([item.group or item.example.id for item in split.queries])
                whole = shares.sum(axis=1)
                sheet.add("text of the attention", shares[:, 0] / whole)
                sheet.add("text of the tokens", tokens[:, 0])
                sheet.add("demonstrations", whole)
            found[name] = {"sheet": sheet.content()}
        return found

    facts = {"tasks": tasks, "shots": shots, "demonstrations": demonstrations, "version": 2}
    return dict(study.kept(f"aim/{model}/attention", compute, **facts))
