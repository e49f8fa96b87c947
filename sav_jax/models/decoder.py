"""The language model: a pre-norm causal decoder with grouped-query attention and rotary positions (Qwen2, arXiv
2407.10671).

Axes: B batch, T tokens, R positions read, N query heads, K key/value heads, H head width, D model width, F feed-forward
width, V vocabulary, L layers. Layers are scanned: every parameter under ``layers`` has a leading L.

The one thing this decoder does that others do not: each attention sows its output *before the output projection*, at
the positions read only, as ``intermediates/.../layers/self_attn/head_outputs``; the scan stacks them to ``[L, B, R, N,
H]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from sav_jax.errors import UserError
from sav_jax.models.attention import attention
from sav_jax.models.batch import Array
from sav_jax.models.layers import ACTIVATIONS, Projection, RMSNorm, rotary_angles, rotate
from sav_jax.models.weights import Entry


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder; field by field Hugging Face's ``Qwen2Config``."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    hidden_act: str
    qkv_bias: bool
    tie_word_embeddings: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """From the ``text_config`` of a ``config.json`` whose defaults have been filled in.

        Raises:
            UserError: an option that would change the numbers and is not implemented.
        """
        if config["model_type"] != "qwen2":
            raise UserError(f"text_config.model_type {config['model_type']!r} is not known (known: qwen2)")
        rope = config["rope_parameters"]
        if rope.get("rope_type", "default") != "default":
            raise UserError(f"text_config: rope_type {rope['rope_type']!r} is not supported (known: default)")
        if "sliding_attention" in (config.get("layer_types") or ()):
            raise UserError("text_config: sliding-window attention is not supported")
        if config["hidden_act"] not in ACTIVATIONS:
            raise UserError(
                f"text_config.hidden_act {config['hidden_act']!r} is not known (known: {', '.join(ACTIVATIONS)})"
            )
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config["num_key_value_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            rms_norm_eps=config["rms_norm_eps"],
            rope_theta=float(rope["rope_theta"]),
            hidden_act=config["hidden_act"],
            qkv_bias=True,
            tie_word_embeddings=bool(config["tie_word_embeddings"]),
        )


def read_at(x: jax.Array, positions: Array) -> jax.Array:
    """``x[b, positions[b, r]]``: ``[B, T, ...]`` and int32 ``[B, R]`` -> ``[B, R, ...]``."""
    index = positions.reshape(positions.shape + (1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)


class SelfAttention(nn.Module):
    """Causal grouped-query attention; sows ``head_outputs`` ``[B, R, N, H]``."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, angles: tuple[jax.Array, jax.Array], lengths: Array, read_positions: Array
    ) -> jax.Array:
        c = self.config
        bias_axes = 2 if c.qkv_bias else 0
        q = Projection("BTD,DNH->BTNH", (c.hidden_size, c.num_heads, c.head_dim), bias_axes, name="q_proj")(x)
        k = Projection("BTD,DKH->BTKH", (c.hidden_size, c.num_kv_heads, c.head_dim), bias_axes, name="k_proj")(x)
        v = Projection("BTD,DKH->BTKH", (c.hidden_size, c.num_kv_heads, c.head_dim), bias_axes, name="v_proj")(x)
        heads = attention(rotate(q, angles), rotate(k, angles), v, causal=True, lengths=lengths)
        # Sliced here, inside the scan, so that memory is L*B*R*N*H and not L*B*T*N*H. The reducer keeps the array
        # itself, not a tuple of it.
        self.sow("intermediates", "head_outputs", read_at(heads, read_positions), reduce_fn=lambda _, new: new)
        return Projection("BTNH,NHD->BTD", (c.num_heads, c.head_dim, c.hidden_size), name="o_proj")(heads)


class FeedForward(nn.Module):
    """Gated feed-forward (SwiGLU, arXiv 2002.05202): down(act(gate(x)) * up(x))."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        gate = Projection("BTD,DF->BTF", (c.hidden_size, c.intermediate_size), name="gate_proj")(x)
        up = Projection("BTD,DF->BTF", (c.hidden_size, c.intermediate_size), name="up_proj")(x)
        return Projection("BTF,FD->BTD", (c.intermediate_size, c.hidden_size), name="down_proj")(
            ACTIVATIONS[c.hidden_act](gate) * up
        )


class DecoderBlock(nn.Module):
    """Attention and feed-forward with residuals, ``[B, T, D] -> [B, T, D]``; shaped for ``nn.scan``."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, angles: tuple[jax.Array, jax.Array], lengths: Array, read_positions: Array
    ) -> tuple[jax.Array, None]:
        eps = self.config.rms_norm_eps
        y = RMSNorm(eps, name="input_layernorm")(x)
        x = x + SelfAttention(self.config, name="self_attn")(y, angles, lengths, read_positions)
        y = RMSNorm(eps, name="post_attention_layernorm")(x)
        return x + FeedForward(self.config, name="mlp")(y), None


class Decoder(nn.Module):
    """Embeddings in, normalised hidden states out; logits on request (``[B, T, D] -> [B, T, V]``)."""

    config: DecoderConfig

    def setup(self) -> None:
        c = self.config
        self.embedding = self.param("embed_tokens", nn.initializers.normal(0.02), (c.vocab_size, c.hidden_size))
        self.layers = nn.scan(
            DecoderBlock,
            # Without "intermediates" here the sown heads would vanish silently.
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.num_layers,
        )(c)
        self.norm = RMSNorm(c.rms_norm_eps)
        if not c.tie_word_embeddings:
            self.lm_head = Projection("BTD,DV->BTV", (c.hidden_size, c.vocab_size))

    def embed(self, token_ids: Array) -> jax.Array:
        """int32 ``[B, T]`` -> ``[B, T, D]``."""
        return jnp.take(self.embedding, token_ids, axis=0)

    def __call__(self, x: jax.Array, positions: jax.Array, lengths: Array, read_positions: Array) -> jax.Array:
        """Run all layers.

        Args:
            x: ``[B, T, D]`` embeddings.
            positions: int32 ``[B, T]`` rotary positions.
            lengths: int32 ``[B]`` real tokens of each row.
            read_positions: int32 ``[B, R]`` where head outputs are sown.

        Returns:
            ``[B, T, D]`` after the final norm.
        """
        angles = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        x, _ = self.layers(x, angles, lengths, read_positions)
        return self.norm(x)

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
        entries.append(Entry(f"{target}/lm_head/kernel", f"{lm_head}.weight", "v d -> d v"))
    for name in ("input_layernorm", "post_attention_layernorm"):
        entries.append(Entry(f"{target}/layers/{name}/scale", f"{layer}.{name}.weight", "d -> d", {}, count))
    for name in ("q_proj", "k_proj", "v_proj"):
        path, key = f"{target}/layers/self_attn/{name}", f"{layer}.self_attn.{name}"
        entries.append(Entry(f"{path}/kernel", f"{key}.weight", "(n h) d -> d n h", heads, count))
        if config.qkv_bias:
            entries.append(Entry(f"{path}/bias", f"{key}.bias", "(n h) -> n h", heads, count))
    entries.append(
        Entry(
            f"{target}/layers/self_attn/o_proj/kernel",
            f"{layer}.self_attn.o_proj.weight",
            "d (n h) -> n h d",
            heads,
            count,
        )
    )
    for name in ("gate_proj", "up_proj", "down_proj"):
        entries.append(
            Entry(f"{target}/layers/mlp/{name}/kernel", f"{layer}.mlp.{name}.weight", "o i -> i o", {}, count)
        )
    return entries
