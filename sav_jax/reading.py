"""Everything a frozen model says about a prompt, from one forward pass: head outputs, likelihoods of candidate answers
and the answer it writes by itself.

The prompt is read once; what it has in common with others up to their images, once for all of them. Its heads are kept,
the candidates are scored on its cache and the decode loop goes on from it;
so a comparison of methods costs one pass over each prompt, whatever the methods look at.

Axes: E examples, L layers, N heads, H head width, C candidate answers, G longest answer.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from sav_jax._processes import known_by_all, share, wait_for_all
from sav_jax.batching import plan_batches
from sav_jax.examples import Example
from sav_jax.extract import (
    apart,
    check_finite,
    content_key,
    digests_of_all,
    packed,
    plan_prompts,
    repeated,
    run_batches,
    run_heads,
    say_shared,
)
from sav_jax.generation import (
    Generation,
    continue_from,
    greedy,
    option_table,
    prefill_with_heads,
    score_after,
)
from sav_jax.headstore import HeadStore
from sav_jax.lmm import LMM
from sav_jax.models.batch import Batch
from sav_jax.models.intervention import HeadEdit
from sav_jax.models.multimodal import MultimodalModel
from sav_jax.sharding import data_size

_ANSWER_VERSION = "answers 1"
"""Part of every cache key of answers; raised when their meaning or numbers change."""


@dataclass(frozen=True)
class Readings:
    """What a model says about E prompts.

    Attributes:
        keys: E hex digests of model, prompt and images; equal keys are equal prompts, read once.
        heads: float32 ``[E, L, N, H]``, as :func:`sav_jax.extract_heads`; L is 0 when they were not asked for.
        scores: float32 ``[E, C]``, as :func:`sav_jax.score_options`.
        generations: E greedy answers, as :func:`sav_jax.generate`; empty ones when none were asked for.
        passes: how many prompts were run through the model; the others were in the cache, or equal to one before.
    """

    keys: tuple[str, ...]
    heads: np.ndarray
    scores: np.ndarray
    generations: tuple[Generation, ...]
    passes: int


def read(
    lmm: LMM,
    examples: Sequence[Example],
    options: Sequence[str] = (),
    max_new_tokens: int = 0,
    batch_size: int = 8,
    cache: str | None = None,
    progress: bool = True,
    keep_heads: bool = True,
    edit: HeadEdit | None = None,
) -> Readings:
    """Run every distinct prompt through the model once, unless the cache has all that is asked for.

    Features are stored batch by batch: a killed run goes on where it was. Heads are stored under the keys of
    :func:`sav_jax.extract_heads`, so that both share them.

    Args:
        lmm: the frozen model.
        examples: E examples; labels are not used.
        options: C candidate answers to score, the same for every example; may be none.
        max_new_tokens: G, let the model write at most so many tokens; 0 for none.
        batch_size: prompts per forward pass.
        cache: folder (or ``gs://`` path) of the feature cache, or None.
        progress: show a bar on stderr.
        keep_heads: False if only answers are wanted: heads take 0.4 MB per prompt in a model of seven billion
            parameters, 2.6 MB in one of 72.
        edit: a change of head outputs, the same for every example, where the prompt is read and at every token of an
            answer (its ``tokens`` must be None). Part of the keys.

    Raises:
        UserError: an image cannot be read, features are not finite, or an option is empty or given twice.
    """
    prompts = plan_prompts(lmm, examples)
    media = digests_of_all(examples)
    keys = [content_key(lmm, *of) for of in zip(prompts, examples, media, strict=True)]
    if edit is not None:
        changed = hashlib.sha256(
            b"".join(np.asarray(x, np.float32).tobytes() for x in (edit.keep, edit.add))
        ).hexdigest()
        keys = [hashlib.sha256(f"{key} edit {changed}".encode()).hexdigest() for key in keys]
    first = {key: row for row, key in reversed(list(enumerate(keys)))}
    rows = sorted(first.values())
    table, lengths = option_table(lmm, options)
    answering = bool(options) or max_new_tokens > 0
    wanted = {"heads": [keys[row] for row in rows]} if keep_heads else {}
    if answering:
        asked = hashlib.sha256(f"{_ANSWER_VERSION} {table.tolist()} {lengths.tolist()} {max_new_tokens}".encode())
        wanted["answers"] = [hashlib.sha256(f"{keys[row]} {asked.hexdigest()}".encode()).hexdigest() for row in rows]
    stores = {name: HeadStore.open(f"{cache.rstrip('/')}/{name}") for name in wanted} if cache else {}
    width = 1 + len(options) + max_new_tokens
    found = {"heads": np.zeros((len(keys), *lmm.heads_shape), np.float32)} if keep_heads else {}
    if answering:
        found["answers"] = np.zeros((len(keys), 1, 1, width), np.float32)

    absent = range(len(rows)) if not stores else known_by_all(_absent(stores, wanted), len(rows))

    def keep(places: Sequence[int], parts: dict[str, np.ndarray]) -> None:
        index = [absent[place] for place in places]
        for name in found:
            found[name][[rows[i] for i in index]] = parts[name]
            if stores:
                own = share(len(index))
                stores[name].write([wanted[name][i] for i in index[own]], parts[name][own])

    unique, planned = [examples[rows[i]] for i in absent], [prompts[rows[i]] for i in absent]
    shown = [media[rows[i]] for i in absent]
    if answering:
        packs = packed(lmm, planned, shown if edit is None else None)
        plans = plan_batches([one.prompt for one in packs], batch_size, data_size(lmm.mesh), count_reads=True)
        if progress:
            say_shared(packs, "prompts")
        step = _read_step(lmm.module, lmm.architecture.heads_path, lmm.stop_token_ids, len(options) > 0, max_new_tokens)
        further = (table, lengths, *(() if edit is None else (edit,)))
        for plan, values in run_batches(
            lmm,
            step,
            plans,
            [one.prompt for one in packs],
            [unique[one.members[0]] for one in packs],
            progress=progress,
            what="prompts",
            further=lambda _: further,
            media=[shown[one.members[0]] for one in packs],
        ):
            (places, heads), (_, answers) = (apart(packs, plan, value) for value in values)
            check_finite(heads, [unique[place] for place in places])
            keep(places, {"heads": heads, "answers": answers})
    else:
        every = range(len(planned))
        for places, values in run_heads(
            lmm, planned, unique, batch_size, every, shown, progress=progress, what="prompts", edit=edit
        ):
            keep(places, {"heads": values})
    wait_for_all("answers are stored")
    present = sorted(set(range(len(rows))).difference(absent))
    for name, store in stores.items():
        store.read_into(found[name], [rows[i] for i in present], [wanted[name][i] for i in present])

    found = {name: repeated(values, keys, first) for name, values in found.items()}
    heads = found.get("heads", np.zeros((len(keys), 0, *lmm.heads_shape[1:]), np.float32))
    answers = found["answers"][:, 0, 0] if answering else np.zeros((len(keys), width), np.float32)
    generations = tuple(_generation(lmm, row[0], row[1 + len(options) :]) for row in answers)
    return Readings(tuple(keys), heads, answers[:, 1 : 1 + len(options)], generations, len(absent))


def _absent(stores: dict[str, HeadStore], wanted: dict[str, list[str]]) -> list[int]:
    """Places whose heads or answers are not stored."""
    return sorted({i for name, store in stores.items() for i in store.missing(wanted[name])})


def _generation(lmm: LMM, count: np.floating[Any], token_ids: np.ndarray) -> Generation:
    kept = tuple(int(token) for token in token_ids[: int(count)])
    return Generation(lmm.processor.tokenizer.decode(kept, skip_special_tokens=True) if kept else "", kept)


@functools.lru_cache(maxsize=32)
def _read_step(
    module: MultimodalModel, path: tuple[str, ...], stops: tuple[int, ...], scored: bool, max_new_tokens: int
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """``(params, batch, options [C, W], lengths [C], edit=None) -> heads [B, R, L, N, H], answers [B, R, 1, 1, 1 + C +
    G]`` of the R prompts in every row.

    An answer is the number of tokens written, the scores of the options, and the tokens: as float32, which holds every
    token id exactly (they are below 2^24), so that answers are stored as heads are.
    """

    @jax.jit
    def step(
        params: Any, batch: Batch, options: jax.Array, lengths: jax.Array, edit: HeadEdit | None = None
    ) -> tuple[jax.Array, jax.Array]:
        room = max(max_new_tokens, options.shape[1] - 1)
        prefix, heads = prefill_with_heads(module, params, batch, room, path, edit)
        size = prefix.logits.shape[0]
        scores, tokens, count = jnp.zeros((size, 0)), jnp.zeros((size, 0), jnp.int32), jnp.zeros(size, jnp.int32)
        if scored:
            scores = score_after(module, params, prefix, options, lengths, edit)
        if max_new_tokens:
            tokens, count = continue_from(
                module, params, prefix, greedy, stops, max_new_tokens, jnp.int32(max_new_tokens), edit
            )
        answers = [count[:, None].astype(jnp.float32), scores, tokens.astype(jnp.float32)]
        return (
            rearrange(heads, "l b r n h -> b r l n h").astype(jnp.float32),
            rearrange(jnp.concatenate(answers, axis=1), "(b r) w -> b r 1 1 w", b=batch.token_ids.shape[0]),
        )

    return step
