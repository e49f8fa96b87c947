"""The language model: a pre-norm causal decoder with grouped-query attention and rotary positions. Llama, Mistral,
Qwen2, Qwen3 and the decoders of the Qwen-VL family differ by config alone.

Axes: B batch, T tokens, R positions read, N query heads, K key/value heads, H head width, D model width, F feed-forward
width, V vocabulary, L layers. Layers are scanned: every parameter under ``layers`` has a leading L.

The one thing this decoder does that others do not: each attention sows its output *before the output projection*, at
the positions read only, as ``intermediates/.../layers/self_attn/head_outputs``; the scan stacks them to ``[L, B, R, N,
H]``.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from sav_jax.models.attention import attention, attention_at
from sav_jax.models.batch import Array
from sav_jax.models.decoder_config import DecoderConfig
from sav_jax.models.intervention import HeadEdit, LayerEdit, edited, tokens_at
from sav_jax.models.layers import ACTIVATIONS, Projection, RMSNorm, rotary_angles, rotate, scanned
from sav_jax.models.weights import Entry


@struct.dataclass
class KVCache:
    """Keys and values of the tokens read so far: an explicit pytree, kept and reused by whoever holds it.

    Attributes:
        keys, values: ``[L, B, S, K, H]``, S being the capacity.
        lengths: int32 ``[B]``, how many of the S are filled.
        fresh: nothing is filled (static, so that a first prefill attends to its own tokens only).
        prompt_lengths: int32 ``[B]`` tokens of the first prefill, in models whose rotary base depends on them.
    """

    keys: jax.Array
    values: jax.Array
    lengths: jax.Array
    fresh: bool = struct.field(pytree_node=False, default=False)
    prompt_lengths: Array | None = None

    @classmethod
    def empty(cls, config: DecoderConfig, batch: int, capacity: int, dtype: Any) -> KVCache:
        """Room for ``capacity`` tokens of ``batch`` rows."""
        shape = (config.num_layers, batch, capacity, config.num_kv_heads, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch, jnp.int32), fresh=True)


def _append(cached: jax.Array, new: jax.Array, offsets: jax.Array) -> jax.Array:
    """Write ``new`` ``[B, T, K, H]`` into ``cached`` ``[B, S, K, H]`` from each row's offset on (it must fit)."""
    zero = jnp.zeros((), offsets.dtype)
    return jax.vmap(lambda row, part, at: jax.lax.dynamic_update_slice(row, part, (at, zero, zero)))(
        cached, new.astype(cached.dtype), offsets
    )


def read_at(x: jax.Array, positions: Array) -> jax.Array:
    """``x[b, positions[b, r]]``: ``[B, T, ...]`` and int32 ``[B, R]`` -> ``[B, R, ...]``."""
    index = positions.reshape(positions.shape + (1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)


def stretched_theta(theta: float, head_dim: int, lengths: Array, trained_length: int) -> jax.Array:
    """The rotary base for prompts longer than those seen in training ("dynamic NTK" scaling).

    A prompt of up to 2^k times the trained length gets longer wavelengths, the longest of them 2^(k + 1) - 1 times as
    long as it was.

    Args:
        theta: the base in training.
        head_dim: H.
        lengths: int32 ``[B]`` tokens of each prompt.
        trained_length: tokens of the longest prompts in training.

    Returns:
        float32 ``[B]``.
    """
    doublings = range(31 - trained_length.bit_length())  # more do not fit an int32
    bases = [theta * (2 ** (k + 1) - 1) ** (head_dim / (head_dim - 2)) for k in range(len(doublings) + 1)]
    bounds = np.array([trained_length * 2**k for k in doublings], np.int32)
    passed = jnp.sum(jnp.asarray(lengths)[:, None] > bounds[None, :], axis=1)
    return jnp.take(jnp.array(bases, jnp.float32), passed)


def log_n_scale(positions: Array, trained_length: int) -> jax.Array:
    """What queries are multiplied by, so that attention over more keys than were seen in training stays as sharp:
    the logarithm of the number of keys to the base of the trained length, 1 within it. int32 ``[B, T]`` -> float32.
    """
    keys = (jnp.asarray(positions) + 1).astype(jnp.float32)
    return jnp.maximum(jnp.log(keys) / math.log(trained_length), 1.0)


@struct.dataclass
class Context:
    """What every layer is given alike.

    Attributes:
        angles: cosine and sine of the rotary positions, ``[B, T, H / 2]`` each.
        lengths: int32 ``[B]`` real tokens of each row.
        read_positions: int32 ``[B, R]`` where head outputs are sown.
        offsets: int32 ``[B]`` tokens in the cache before these; None without a cache or with a fresh one.
        deepstack: visual features added to the outputs of the first layers, ``[J, B, T, D]`` (Qwen3-VL), or None.
        query_scale: float32 ``[B, T]`` what queries are multiplied by, or None.
        edited_tokens: bool ``[B, T]`` where head outputs are changed (``models/intervention.py``), or None.
        segments: int32 ``[B, T]``, see :class:`sav_jax.models.batch.Batch`, or None.
    """

    angles: tuple[jax.Array, jax.Array]
    lengths: Array
    read_positions: Array
    offsets: jax.Array | None = None
    deepstack: jax.Array | None = None
    query_scale: jax.Array | None = None
    edited_tokens: Array | None = None
    segments: Array | None = None

    def at_read(self) -> Context:
        """Angles, scales and edited tokens at the positions read, ``[B, R, ...]``."""
        angles, scale, tokens = jax.tree.map(
            lambda x: read_at(jnp.asarray(x), self.read_positions), (self.angles, self.query_scale, self.edited_tokens)
        )
        return self.replace(angles=angles, query_scale=scale, edited_tokens=tokens)  # type: ignore[attr-defined]


LayerCache: TypeAlias = tuple[jax.Array, jax.Array] | None


class SelfAttention(nn.Module):
    """Causal grouped-query attention; sows ``head_outputs`` ``[B, R, N, H]``, what enters the output projection.

    Attributes:
        heads_only: compute the queries that are read alone, and nothing behind the heads.
    """

    config: DecoderConfig
    heads_only: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, context: Context, cache: LayerCache, edit: LayerEdit | None = None
    ) -> tuple[jax.Array, LayerCache]:
        c = self.config
        bias_axes = 2 if c.qkv_bias else 0
        read = self.heads_only
        asking = read_at(x, context.read_positions) if read else x
        if c.fused_qkv:
            shape = 3, c.num_heads, c.head_dim, c.hidden_size
            qkv = Projection("BTD,ANHD->BTANH", shape, bias_axes and 3, name="qkv")(x)
            q, k, v = (qkv[:, :, i] for i in range(3))
            q = read_at(q, context.read_positions) if read else q
        else:
            q = Projection("BTD,NHD->BTNH", (c.num_heads, c.head_dim, c.hidden_size), bias_axes, name="q_proj")(asking)
            k = Projection("BTD,KHD->BTKH", (c.num_kv_heads, c.head_dim, c.hidden_size), bias_axes, name="k_proj")(x)
            v = Projection("BTD,KHD->BTKH", (c.num_kv_heads, c.head_dim, c.hidden_size), bias_axes, name="v_proj")(x)
        if c.qk_norm:
            q, k = RMSNorm(c.rms_norm_eps, name="q_norm")(q), RMSNorm(c.rms_norm_eps, name="k_norm")(k)
        at = context.at_read() if read else context
        q, k = rotate(q, at.angles), rotate(k, context.angles)
        if at.query_scale is not None:
            q = q * at.query_scale[:, :, None, None].astype(q.dtype)
        if cache is not None:
            start = jnp.zeros(x.shape[0], jnp.int32) if context.offsets is None else context.offsets
            cache = _append(cache[0], k, start), _append(cache[1], v, start)
        if read:
            keys, values = (k, v) if cache is None else (part.astype(v.dtype) for part in cache)
            places = jnp.asarray(context.read_positions)
            if context.offsets is not None:
                places = places + context.offsets[:, None]
            heads = attention_at(q, keys, values, places, context.segments)
        elif cache is None or context.offsets is None:
            heads = attention(q, k, v, causal=True, lengths=context.lengths, segments=context.segments)
        else:
            # A query sees the cache and the new tokens up to its own: all of them real when the query is.
            keys, values = (part.astype(v.dtype) for part in cache)
            heads = attention(q, keys, values, causal=True, offsets=context.offsets)
        if edit is not None and at.edited_tokens is not None:
            heads = edited(heads, edit, at.edited_tokens)
        # Sliced here, inside the scan, so that memory is L*B*R*N*H and not L*B*T*N*H. The reducer keeps the array
        # itself, not a tuple of it.
        taken = heads if read else read_at(heads, context.read_positions)
        self.sow("intermediates", "head_outputs", taken, reduce_fn=lambda _, new: new)
        if read:
            return x, cache
        return Projection("BTNH,DNH->BTD", (c.hidden_size, c.num_heads, c.head_dim), name="o_proj")(heads), cache


class FeedForward(nn.Module):
    """Gated feed-forward (SwiGLU, arXiv 2002.05202): down(act(gate(x)) * up(x))."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        gate = Projection("BTD,FD->BTF", (c.intermediate_size, c.hidden_size), name="gate_proj")(x)
        up = Projection("BTD,FD->BTF", (c.intermediate_size, c.hidden_size), name="up_proj")(x)
        return Projection("BTF,DF->BTD", (c.hidden_size, c.intermediate_size), name="down_proj")(
            ACTIVATIONS[c.hidden_act](gate) * up
        )


class DecoderBlock(nn.Module):
    """Attention and feed-forward with residuals, ``[B, T, D] -> [B, T, D]``; shaped for ``nn.scan``.

    Attributes:
        heads_only: stop at the heads; what is returned as hidden states means nothing.
    """

    config: DecoderConfig
    heads_only: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, layer: jax.Array, cache: LayerCache, edit: LayerEdit | None, context: Context
    ) -> tuple[jax.Array, LayerCache]:
        eps = self.config.rms_norm_eps
        normed = RMSNorm(eps, name="input_layernorm")(x)
        y, cache = SelfAttention(self.config, self.heads_only, name="self_attn")(normed, context, cache, edit)
        if self.heads_only:
            return y, cache
        x = x + y
        x = x + FeedForward(self.config, name="mlp")(RMSNorm(eps, name="post_attention_layernorm")(x))
        if context.deepstack is not None:
            last = context.deepstack.shape[0] - 1
            features = jax.lax.dynamic_index_in_dim(context.deepstack, jnp.minimum(layer, last), keepdims=False)
            x = x + jnp.where(layer <= last, features, jnp.zeros_like(features))
        return x, cache


class Decoder(nn.Module):
    """Embeddings in, normalised hidden states out; logits on request (``[B, T, D] -> [B, T, V]``)."""

    config: DecoderConfig

    def setup(self) -> None:
        c = self.config
        self.embedding = self.param("embed_tokens", nn.initializers.normal(0.02), (c.vocab_size, c.hidden_size))
        self.layers = scanned(DecoderBlock, c.num_layers, c.remat, (0, 0, 0, nn.broadcast))(c)
        self.norm = RMSNorm(c.rms_norm_eps)
        if not c.tie_word_embeddings:
            self.lm_head = Projection("BTD,VD->BTV", (c.vocab_size, c.hidden_size))

    def embed(self, token_ids: Array) -> jax.Array:
        """int32 ``[B, T]`` -> ``[B, T, D]``; ids beyond the vocabulary (image tokens of some) get the last row."""
        return jnp.take(self.embedding, token_ids, axis=0, mode="clip")

    def __call__(
        self,
        x: jax.Array,
        lengths: Array,
        read_positions: Array,
        positions: Array | None = None,
        cache: KVCache | None = None,
        deepstack: jax.Array | None = None,
        edit: HeadEdit | None = None,
        segments: Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Run all layers.

        Args:
            x: ``[B, T, D]`` embeddings.
            lengths: int32 ``[B]`` real tokens of each row.
            read_positions: int32 ``[B, R]`` where head outputs are sown.
            positions: int32 ``[B, T]`` or ``[B, T, 3]`` rotary positions; None counts on from the cache.
            cache: what came before; its capacity must hold T more than its longest row.
            deepstack: see :class:`Context`.
            edit: a change of head outputs.
            segments: int32 ``[B, T]`` of rows of several prompts (not behind what is in a cache), or None.

        Returns:
            ``[B, T, D]`` after the final norm, and the cache with these tokens appended (None if none was given).
        """
        context, layer_edits, prompt_lengths = self._context(
            x.shape[1], lengths, read_positions, positions, cache, deepstack, edit
        )
        context = context.replace(segments=segments)  # type: ignore[attr-defined]
        layers = jnp.arange(self.config.num_layers)
        layer_caches = None if cache is None else (cache.keys, cache.values)
        x, layer_caches = self.layers(x, layers, layer_caches, layer_edits, context)
        if cache is not None and layer_caches is not None:
            keys, values = layer_caches
            cache = KVCache(keys, values, cache.lengths + lengths, prompt_lengths=prompt_lengths)
        return self.norm(x), cache

    def heads(
        self,
        x: jax.Array,
        lengths: Array,
        read_positions: Array,
        positions: Array | None = None,
        cache: KVCache | None = None,
        deepstack: jax.Array | None = None,
        edit: HeadEdit | None = None,
        segments: Array | None = None,
    ) -> jax.Array:
        """Head outputs alone: nothing behind those of the last layer is computed, nor what other positions ask there.

        Args:
            x, lengths, read_positions, positions, cache, deepstack, edit: as for a call. Parameters may hold more
                layers than the config has: those behind the last are not touched.
            segments: int32 ``[B, T]`` of rows of several prompts (not with a cache), or None.

        Returns:
            ``[L, B, R, N, H]``.
        """
        context, layer_edits, _ = self._context(x.shape[1], lengths, read_positions, positions, cache, deepstack, edit)
        context = context.replace(segments=segments)  # type: ignore[attr-defined]
        stacked = {name: tree for name, tree in self.layers.variables.items() if name != "intermediates"}
        caches = None if cache is None else (cache.keys, cache.values)
        last = self.config.num_layers - 1

        def run(x: jax.Array, layer: Any, heads_only: bool) -> tuple[jax.Array, jax.Array]:
            # By index, as a slice of the stacked parameters would be a copy of nearly all of them.
            own = jax.tree.map(
                lambda part: jax.lax.dynamic_index_in_dim(part, layer, keepdims=False), (stacked, caches, layer_edits)
            )
            block = DecoderBlock(self.config, heads_only, parent=None)
            variables, layer_cache, layer_edit = own
            output: Any = block.apply(variables, x, layer, layer_cache, layer_edit, context, mutable=["intermediates"])
            (x, _), state = output
            return x, state["intermediates"]["self_attn"]["head_outputs"]

        x, heads = jax.lax.scan(lambda x, layer: run(x, layer, False), x, jnp.arange(last))
        return jnp.concatenate([heads, run(x, jnp.int32(last), True)[1][None]])

    def _context(
        self,
        tokens: int,
        lengths: Array,
        read_positions: Array,
        positions: Array | None,
        cache: KVCache | None,
        deepstack: jax.Array | None,
        edit: HeadEdit | None,
    ) -> tuple[Context, LayerEdit | None, Array | None]:
        """What all layers are given, what is changed in each, and the prompts' lengths where the rotary base depends
        on them.
        """
        c = self.config
        offsets = None if cache is None or cache.fresh else cache.lengths
        if positions is None:
            start = jnp.zeros(lengths.shape[0], jnp.int32) if offsets is None else offsets
            positions = start[:, None] + jnp.arange(tokens)[None, :]
        if c.rope_axes is not None and positions.ndim == 2:
            positions = jnp.broadcast_to(positions[:, :, None], (*positions.shape, 3))
        theta: float | jax.Array = c.rope_theta
        prompt_lengths: Array | None = None
        if c.dynamic_ntk:
            # What follows a prompt is read as the prompt was: the keys in the cache have been turned already.
            prompt_lengths = lengths if cache is None or cache.fresh else cache.prompt_lengths
            assert prompt_lengths is not None
            theta = stretched_theta(c.rope_theta, c.head_dim, prompt_lengths, c.trained_length)
        layer_edits, edited_tokens = None, None
        if edit is not None:
            layer_edits = LayerEdit(edit.keep, edit.add)
            edited_tokens = tokens_at(read_positions, tokens) if edit.tokens is None else edit.tokens
        context = Context(
            angles=rotary_angles(positions, c.head_dim, theta, c.rope_axes),
            lengths=lengths,
            read_positions=read_positions,
            offsets=offsets,
            deepstack=deepstack,
            query_scale=log_n_scale(positions, c.trained_length) if c.log_n else None,
            edited_tokens=edited_tokens,
        )
        return context, layer_edits, prompt_lengths

    def logits(self, hidden: jax.Array) -> jax.Array:
        """``[B, T, D]`` normalised hidden states -> float32 ``[B, T, V]``."""
        if self.config.tie_word_embeddings:
            return jnp.einsum("BTD,VD->BTV", hidden, self.embedding.astype(hidden.dtype)).astype(jnp.float32)
        return self.lm_head(hidden).astype(jnp.float32)


def checkpoint_entries(config: DecoderConfig, source: str, lm_head: str, target: str) -> list[Entry]:
    """Where each parameter under ``target`` lives in a Hugging Face checkpoint.

    Args:
        config: sizes.
        source: prefix of the decoder's keys, for example ``language_model.model``.
        lm_head: key of the output head without ``.weight``; with tied embeddings a stored copy must equal the
            embedding.
        target: parameter path of the decoder.
    """
    heads = {"h": config.head_dim}
    layer = f"{source}.layers.{{layer}}"
    count = config.num_layers
    entries = [
        Entry(f"{target}/embed_tokens", f"{source}.embed_tokens.weight", "v d -> v d"),
        Entry(f"{target}/norm/scale", f"{source}.norm.weight", "d -> d"),
    ]
    if config.tie_word_embeddings:
        entries.append(Entry(f"{target}/embed_tokens", f"{lm_head}.weight", "v d -> v d", copy=True))
    else:
        entries.append(Entry(f"{target}/lm_head/kernel", f"{lm_head}.weight", "v d -> v d"))
    for name in ("input_layernorm", "post_attention_layernorm"):
        entries.append(Entry(f"{target}/layers/{name}/scale", f"{layer}.{name}.weight", "d -> d", {}, count))
    for name in ("q_proj", "k_proj", "v_proj"):
        path, key = f"{target}/layers/self_attn/{name}", f"{layer}.self_attn.{name}"
        entries.append(Entry(f"{path}/kernel", f"{key}.weight", "(n h) d -> n h d", heads, count))
        if config.qkv_bias:
            entries.append(Entry(f"{path}/bias", f"{key}.bias", "(n h) -> n h", heads, count))
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            path, key = f"{target}/layers/self_attn/{name}", f"{layer}.self_attn.{name}"
            entries.append(Entry(f"{path}/scale", f"{key}.weight", "h -> h", {}, count))
    entries.append(
        Entry(
            f"{target}/layers/self_attn/o_proj/kernel",
            f"{layer}.self_attn.o_proj.weight",
            "d (n h) -> d n h",
            heads,
            count,
        )
    )
    for name in ("gate_proj", "up_proj", "down_proj"):
        entries.append(
            Entry(f"{target}/layers/mlp/{name}/kernel", f"{layer}.mlp.{name}.weight", "o i -> o i", {}, count)
        )
    return entries
