"""Generation and option scoring on a KV cache: the prompt is read once, then tokens follow one by one.

A :class:`Prefix` is a prompt already read. It is an ordinary pytree: keep it, and any number of continuations can be
scored or generated from it.

Axes: E examples, B batch, T tokens, V vocabulary, C options.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import struct

from sav_jax.batching import BatchPlan, plan_batches
from sav_jax.errors import UserError
from sav_jax.examples import Example
from sav_jax.extract import plan_prompts, run_batches
from sav_jax.lmm import LMM
from sav_jax.models.batch import Batch
from sav_jax.models.decoder import KVCache, read_at
from sav_jax.models.intervention import HeadEdit
from sav_jax.models.multimodal import MultimodalModel
from sav_jax.models.processor import Prompt
from sav_jax.sharding import data_size

_ROOM = 32  # caches grow in steps of so many tokens, so that a few more new tokens do not compile anew


@dataclass(frozen=True)
class Generation:
    """One continuation.

    Attributes:
        text: decoded, without special tokens.
        token_ids: as generated, without the stop token.
    """

    text: str
    token_ids: tuple[int, ...]


@struct.dataclass
class Prefix:
    """Prompts that have been read.

    Attributes:
        cache: keys and values of their tokens.
        logits: float32 ``[B, V]`` of the token that follows.
        next_positions: int32 ``[B]`` its rotary position (with M-RoPE not the number of tokens).
    """

    cache: KVCache
    logits: jax.Array
    next_positions: jax.Array


def prefill(module: MultimodalModel, params: Any, batch: Batch, room: int) -> Prefix:
    """Read prompts into a cache that has room for ``room`` further tokens each."""
    return prefill_with_heads(module, params, batch, room, ())[0]


def prefill_with_heads(
    module: MultimodalModel,
    params: Any,
    batch: Batch,
    room: int,
    heads_path: tuple[str, ...],
    edit: HeadEdit | None = None,
) -> tuple[Prefix, Any]:
    """As :func:`prefill`, and the head outputs at the positions read, from the same pass.

    Args:
        module, params, batch, room: as for :func:`prefill`.
        heads_path: where the heads stand among the intermediates (``Architecture.heads_path``).
        edit: a change of head outputs, at the positions read unless it says where.

    Returns:
        The :class:`Prefix`, and what stands at ``heads_path``: ``[L, B, R, N, H]``. Rows of R prompts that share their
        beginning (``batch.segments``) come apart: the prefix has B * R rows, those of a row together.
    """
    rows, tokens = batch.token_ids.shape
    dtype = jax.tree.leaves(params)[0].dtype
    packed = batch.segments is not None
    cache = KVCache.empty(module.config.text, rows, tokens if packed else tokens + room, dtype)
    output: Any
    output, state = module.apply(
        {"params": params}, batch, logits="read", cache=cache, edit=edit, mutable=["intermediates"]
    )
    heads = functools.reduce(operator.getitem, heads_path, state["intermediates"])
    if packed:
        return _apart(output.cache, output.logits, batch, room), heads
    if batch.positions is None:
        following = jnp.asarray(batch.lengths)
    else:
        following = jnp.max(jnp.asarray(batch.positions), axis=(1, 2)) + 1  # padding counts as 0
    return Prefix(output.cache, output.logits[:, 0], following), heads


def _apart(cache: KVCache, logits: jax.Array, batch: Batch, room: int) -> Prefix:
    """Prompts that were read in one row, each in a row of its own: what it shares and what is its own, side by side.

    Args:
        cache: of B rows.
        logits: float32 ``[B, R, V]`` at the end of each prompt.
        batch: the rows.
        room: for so many further tokens each.
    """
    segments, ends = jnp.asarray(batch.segments), jnp.asarray(batch.read_positions)
    own = jnp.take_along_axis(segments, ends, axis=1)  # the number of each prompt, [B, R]
    shared = jnp.argmax(segments > 0, axis=1).astype(jnp.int32)[:, None]
    starts = jnp.argmax(segments[:, None, :] == own[:, :, None], axis=2).astype(jnp.int32)
    lengths = shared + ends + 1 - starts
    # What stands behind its end means nothing, and nothing sees it.
    places = jnp.arange(segments.shape[1] + room, dtype=jnp.int32)[None, None, :]
    places = jnp.where(places < shared[:, :, None], places, places - shared[:, :, None] + starts[:, :, None])
    places = jnp.minimum(places, segments.shape[1] - 1)

    def take(stored: jax.Array) -> jax.Array:
        taken = jax.vmap(lambda row, at: jnp.take(row, at, axis=1), in_axes=(1, 0), out_axes=1)(stored, places)
        return rearrange(taken, "l b r s k h -> l (b r) s k h")

    positions = read_at(jnp.asarray(batch.positions), ends)
    last = positions if positions.ndim == 2 else jnp.max(positions, axis=2)
    apart = KVCache(take(cache.keys), take(cache.values), lengths.reshape(-1))
    return Prefix(apart, rearrange(logits, "b r v -> (b r) v"), last.reshape(-1) + 1)


def extend(
    module: MultimodalModel,
    params: Any,
    prefix: Prefix,
    token_ids: jax.Array,
    lengths: jax.Array,
    edit: HeadEdit | None = None,
) -> Any:
    """Read text after a prefix.

    Args:
        module, params: the model.
        prefix: its cache must have room for T more tokens.
        token_ids: int32 ``[B, T]``, right-padded.
        lengths: int32 ``[B]`` real tokens of each row.
        edit: a change of head outputs, at all of these tokens unless it says where.

    Returns:
        float32 logits ``[B, T, V]`` after each token, and the longer :class:`Prefix`. The prefix given stays valid.
    """
    steps = jnp.arange(token_ids.shape[1])
    batch = Batch(
        token_ids=token_ids,
        lengths=lengths,
        read_positions=jnp.maximum(lengths - 1, 0)[:, None],
        positions=prefix.next_positions[:, None] + steps[None, :],
    )
    if edit is not None and edit.tokens is None:
        edit = dataclasses.replace(edit, tokens=jnp.ones(token_ids.shape, bool))
    output: Any = module.apply({"params": params}, batch, logits="all", cache=prefix.cache, edit=edit)
    last = jnp.take_along_axis(output.logits, batch.read_positions[:, :, None], axis=1)[:, 0]
    return output.logits, Prefix(output.cache, last, prefix.next_positions + lengths)


def generate(
    lmm: LMM,
    examples: Sequence[Example],
    max_new_tokens: int = 32,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
    prompts: Sequence[Prompt] | None = None,
) -> list[Generation]:
    """Continue every prompt until the model stops or ``max_new_tokens`` are reached.

    Args:
        lmm: the frozen model.
        examples: E examples; labels are not used.
        max_new_tokens: at most so many tokens each.
        temperature: 0 takes the likeliest token (greedy); else logits are divided by it and a token is drawn.
        top_k: draw among the so many likeliest tokens.
        top_p: draw among the likeliest tokens that together reach this probability (nucleus, arXiv 1904.09751).
        seed: of the draws. An example's draws depend on the seed and its place in ``examples``, not on the batch.
        batch_size: prompts decoded together.
        progress: show a bar on stderr.
        prompts: what the model is given instead of the examples' questions, E prompts with the examples' images.

    Returns:
        E :class:`Generation`, in order.

    Raises:
        UserError: an image cannot be read, or an option is out of range.

    Example:
        >>> import sav_jax
        >>> from PIL import Image
        >>> lmm = sav_jax.load("tiny")
        >>> asked = [sav_jax.Example("what color is the background?", (Image.new("RGB", (32, 32), "blue"),))]
        >>> sav_jax.generate(lmm, asked, max_new_tokens=4, progress=False)[0].text
        'blue'
    """
    check_sampling(max_new_tokens, temperature, top_k, top_p, seed)
    if prompts is None:
        prompts = plan_prompts(lmm, examples)
    plans = plan_batches(prompts, batch_size, data_size(lmm.mesh))
    room = -(-max_new_tokens // _ROOM) * _ROOM
    step = _generate_step(lmm.module, room, lmm.stop_token_ids, temperature > 0, top_k, top_p is not None)

    def further(plan: BatchPlan) -> tuple[Any, ...]:
        rows = np.zeros(plan.size, np.uint32)
        rows[: len(plan.rows)] = plan.rows
        scalars = np.int32(max_new_tokens), np.float32(temperature or 1.0), np.float32(max(top_p or 1.0, 1e-30))
        return rows, np.uint32(seed), *scalars

    results: list[Generation | None] = [None] * len(prompts)
    for plan, (tokens, lengths) in run_batches(
        lmm, step, plans, prompts, examples, progress=progress, what="generate", further=further
    ):
        for row, ids, length in zip(plan.rows, tokens.tolist(), lengths.tolist(), strict=False):
            kept = tuple(ids[:length])
            results[row] = Generation(lmm.processor.tokenizer.decode(kept, skip_special_tokens=True), kept)
    return [result for result in results if result is not None]


def check_sampling(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, seed: int) -> None:
    """Raise UserError if an option of :func:`generate` is out of range."""
    for name, value in (("max_new_tokens", max_new_tokens), ("top_k", top_k), ("seed", seed)):
        if value is not None and not isinstance(value, int | np.integer):
            raise UserError(f"{name} must be a whole number, not {value!r}")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if not (temperature == 0 or 1e-6 <= temperature < float("inf")):
        raise UserError(f"temperature must be 0 (greedy) or a number from 1e-6 on, not {temperature}")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise UserError("top_k must be at least 1, and top_p in (0, 1]")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed must be from 0 to 2^32 - 1, not {seed}")


def sample(
    logits: jax.Array, keys: jax.Array, temperature: jax.Array, top_k: int | None, top_p: jax.Array | None
) -> jax.Array:
    """Draw one token per row: temperature, then top-k, then nucleus.

    Args:
        logits: float32 ``[B, V]``.
        keys: one random key per row.
        temperature: scalar above 0.
        top_k, top_p: see :func:`generate`.

    Returns:
        int32 ``[B]``.
    """
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if top_p is not None:
        ranked = jnp.sort(logits, axis=-1, descending=True)
        p = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(p, axis=-1) - p
        # The likeliest token always stays: nothing comes before it.
        lowest = jnp.min(jnp.where(before < top_p, ranked, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


@functools.lru_cache(maxsize=32)
def _generate_step(
    module: MultimodalModel, room: int, stops: tuple[int, ...], draw: bool, top_k: int | None, nucleus: bool
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """One compiled program: prefill and the whole decode loop, ``(tokens [B, room], lengths [B])``."""

    @jax.jit
    def step(
        params: Any,
        batch: Batch,
        rows: jax.Array,
        seed: jax.Array,
        max_new_tokens: jax.Array,
        temperature: jax.Array,
        top_p: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        row_keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), rows)

        def pick(logits: jax.Array, count: jax.Array) -> jax.Array:
            if not draw:
                return greedy(logits, count)
            keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(row_keys, count)
            return sample(logits, keys, temperature, top_k, top_p if nucleus else None)

        start = prefill(module, params, batch, room)
        return continue_from(module, params, start, pick, stops, room, max_new_tokens)

    return step


def continue_from(
    module: MultimodalModel,
    params: Any,
    prefix: Prefix,
    pick: Callable[[jax.Array, jax.Array], jax.Array],
    stops: tuple[int, ...],
    room: int,
    max_new_tokens: jax.Array | int,
    edit: HeadEdit | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The decode loop: one token after the other until every row has stopped or has ``max_new_tokens``.

    Args:
        module, params: the model.
        prefix: prompts that have been read, with room for ``room`` more tokens.
        pick: (logits float32 ``[B, V]``, number of the new token) -> int32 ``[B]``.
        stops: tokens that end a row.
        room: static bound of the new tokens.
        max_new_tokens: at most so many, at most ``room``.
        edit: a change of head outputs at every new token.

    Returns:
        int32 tokens ``[B, room]``, 0 behind the last, and their number ``[B]``, without the stop token.
    """
    stop_ids = jnp.array(stops, jnp.int32)

    def following(state: tuple[Any, ...]) -> tuple[Any, ...]:
        count, prefix, tokens, lengths, done = state
        token = pick(prefix.logits, count)
        done = done | jnp.any(token[:, None] == stop_ids[None, :], axis=1)
        tokens = tokens.at[:, count].set(jnp.where(done, 0, token))
        lengths = lengths + jnp.where(done, 0, 1)
        # A row that is done goes on reading its last token: static shapes; nobody looks.
        _, prefix = extend(module, params, prefix, token[:, None], jnp.ones_like(lengths), edit)
        return count + 1, prefix, tokens, lengths, done

    def unfinished(state: tuple[Any, ...]) -> jax.Array:
        count, _, _, _, done = state
        return (count < max_new_tokens) & ~jnp.all(done)

    size = prefix.logits.shape[0]
    zeros = jnp.zeros(size, jnp.int32)
    state = jnp.int32(0), prefix, jnp.zeros((size, room), jnp.int32), zeros, jnp.zeros(size, bool)
    _, _, tokens, lengths, _ = jax.lax.while_loop(unfinished, following, state)
    return tokens, lengths


def greedy(logits: jax.Array, count: jax.Array) -> jax.Array:
    """The likeliest token of each row (for :func:`continue_from`)."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def score_options(
    lmm: LMM, examples: Sequence[Example], options: Sequence[str], batch_size: int = 8, progress: bool = True
) -> np.ndarray:
    """Log-likelihood of each candidate answer after each prompt: sum over its tokens of log p(token | prompt, before).

    Every prompt is read once; the options are read after it, on its cache. Options of one token cost nothing more.

    Args:
        lmm, examples, batch_size, progress: as for :func:`generate`.
        options: C candidate answers, the same for every example.

    Returns:
        float32 ``[E, C]``.

    Raises:
        UserError: an option has no tokens, or two have the same.

    Example:
        >>> import sav_jax
        >>> from PIL import Image
        >>> lmm = sav_jax.load("tiny")
        >>> asked = [sav_jax.Example("what color is the background?", (Image.new("RGB", (32, 32), "blue"),))]
        >>> options = ["red", "blue", "green"]
        >>> scores = sav_jax.score_options(lmm, asked, options, progress=False)  # float32 [1, 3], log-likelihoods
        >>> options[scores[0].argmax()]
        'blue'
    """
    table, lengths = option_table(lmm, options)
    prompts = plan_prompts(lmm, examples)
    plans = plan_batches(prompts, batch_size, data_size(lmm.mesh))
    scores = np.zeros((len(prompts), len(lengths)), np.float32)
    step = _score_step(lmm.module)
    for plan, values in run_batches(
        lmm, step, plans, prompts, examples, progress=progress, what="options", further=lambda _: (table, lengths)
    ):
        scores[list(plan.rows)] = values
    return scores


def option_table(lmm: LMM, options: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of C candidate answers, int32 ``[C, W]``, right-padded, and their numbers, int32 ``[C]``.

    Raises:
        UserError: an option has no tokens, or two have the same, or it is one string instead of several.
    """
    if isinstance(options, str):
        raise UserError(f"options must be a list of strings, not the one string {options!r}")
    tokens = [tuple(lmm.processor.encode(option)) for option in options]
    for option, ids in zip(options, tokens, strict=True):
        if not ids or tokens.count(ids) > 1:
            raise UserError(f"option {option!r} {'is empty' if not ids else 'is given twice'}")
    width = max((len(ids) for ids in tokens), default=1)
    table = np.zeros((len(tokens), width), np.int32)
    for column, ids in enumerate(tokens):
        table[column, : len(ids)] = ids
    return table, np.array([len(ids) for ids in tokens], np.int32)


def score_after(
    module: MultimodalModel,
    params: Any,
    prefix: Prefix,
    options: jax.Array,
    lengths: jax.Array,
    edit: HeadEdit | None = None,
) -> jax.Array:
    """Log-likelihood of each option as what follows each prompt.

    Args:
        module, params: the model.
        prefix: B prompts that have been read, with room for W - 1 more tokens.
        options, lengths: int32 ``[C, W]`` and ``[C]``, see :func:`option_table`.
        edit: a change of head outputs at every token of the options.

    Returns:
        float32 ``[B, C]``.
    """
    size, width = prefix.logits.shape[0], options.shape[1]
    first = jnp.take(jax.nn.log_softmax(prefix.logits, axis=-1), options[:, 0], axis=1)
    if width == 1:
        return first

    def rest(option: tuple[jax.Array, jax.Array]) -> jax.Array:
        ids, length = option
        # The last token of an option is predicted, never read.
        read = jnp.broadcast_to(ids[None, :-1], (size, width - 1))
        logits, _ = extend(module, params, prefix, read, jnp.full(size, width - 1, jnp.int32), edit)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), ids[None, 1:, None], axis=2)[:, :, 0]
        real = jnp.arange(1, width)[None, :] < length
        return jnp.sum(jnp.where(real, log_p, 0.0), axis=1)

    # One option at a time: the caches of all at once would not fit.
    return first + jax.lax.map(rest, (options, lengths)).T


@functools.lru_cache(maxsize=32)
def _score_step(module: MultimodalModel) -> Callable[..., jax.Array]:
    """``(params, batch, options [C, W], lengths [C]) -> [B, C]``."""

    @jax.jit
    def step(params: Any, batch: Batch, options: jax.Array, lengths: jax.Array) -> jax.Array:
        prefix = prefill(module, params, batch, options.shape[1] - 1)
        return score_after(module, params, prefix, options, lengths)

    return step
