"""Dual encoders: a tower for images and one for texts that meet in one space. CLIP (arXiv 2103.00020), SigLIP (arXiv
2303.15343) and SigLIP 2 at fixed resolution (arXiv 2502.14786, the same architecture) differ by config alone.

Axes: X images or texts, n patches of an image (and a class token), T tokens of a text (padded), D width of a tower, E
width of the embeddings, N heads, H head width, V vocabulary, U = 3 (query, key, value).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from sav_jax.errors import UserError
from sav_jax.models import vit
from sav_jax.models.attention import attention
from sav_jax.models.batch import Array
from sav_jax.models.decoder import read_at
from sav_jax.models.layers import LayerNorm, Projection
from sav_jax.models.vit import EncoderConfig, VisionConfig, VisionTransformer
from sav_jax.models.weights import Entry, Table


@dataclass(frozen=True)
class TextConfig:
    """Sizes of a text tower; field by field Hugging Face's ``CLIPTextConfig`` and ``SiglipTextConfig``.

    Attributes:
        max_length: T, what every text is padded or cut to.
        causal: a token sees those before it (CLIP), or all, padding included (SigLIP).
        eos_token_id: the text is read at the first of these tokens; None: at the last token.
    """

    vocab_size: int
    max_length: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    hidden_act: str
    layer_norm_eps: float
    causal: bool
    eos_token_id: int | None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> TextConfig:
        """From the ``text_config`` of a ``config.json`` whose defaults have been filled in."""
        clip = config["model_type"] == "clip_text_model"
        return cls(
            vocab_size=config["vocab_size"],
            max_length=config["max_position_embeddings"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            hidden_act=vit.known_activation(config, "text_config"),
            layer_norm_eps=config["layer_norm_eps"],
            causal=clip,
            eos_token_id=config["eos_token_id"] if clip else None,
        )

    def read_positions(self, token_ids: np.ndarray) -> np.ndarray:
        """Where each text of ``[X, T]`` is read, int32 ``[X]``."""
        if self.eos_token_id is None:
            return np.full(len(token_ids), token_ids.shape[1] - 1, np.int32)
        if self.eos_token_id == 2:
            # OpenAI's own configs name a wrong token; the real one has the largest id.
            return token_ids.argmax(axis=1).astype(np.int32)
        return (token_ids == self.eos_token_id).argmax(axis=1).astype(np.int32)


@dataclass(frozen=True)
class DualEncoderConfig:
    """Everything a ``config.json`` of the families says that changes the numbers.

    Attributes:
        embedding_size: E.
        sigmoid: SigLIP's ends: attention pooling instead of a projection of the class token, a bias on the text
            projection, and a bias on the logits.
    """

    vision: VisionConfig
    text: TextConfig
    embedding_size: int
    sigmoid: bool

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> DualEncoderConfig:
        """From a ``config.json`` whose defaults have been filled in (``models/registry.py`` does that).

        Raises:
            UserError: an option that would change the numbers and is not implemented.
        """
        vision, text = config["vision_config"], config["text_config"]
        sigmoid = config["model_type"] == "siglip"
        if sigmoid and (not vision["vision_use_head"] or text["projection_size"] != vision["hidden_size"]):
            raise UserError("a SigLIP whose image and text embeddings differ in width cannot compare them")
        return cls(
            vision=VisionConfig.from_hf(vision),
            text=TextConfig.from_hf(text),
            embedding_size=text["projection_size"] if sigmoid else config["projection_dim"],
            sigmoid=sigmoid,
        )


class AttentionPooling(nn.Module):
    """Patches ``[X, n, D]`` -> ``[X, D]``: a learnt query looks at all of them, and a feed-forward follows (SigLIP)."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        inner = (c.num_heads, c.hidden_size // c.num_heads)
        probe = self.param("probe", nn.initializers.lecun_normal(), (1, 1, c.hidden_size))
        probe = jnp.broadcast_to(probe.astype(x.dtype), (x.shape[0], 1, c.hidden_size))
        # Stored as one matrix: queries of the patches and key and value of the probe are computed and not used.
        qkv = Projection("XnD,UNHD->XnUNH", (3, *inner, c.hidden_size), bias_axes=3, name="qkv")(
            jnp.concatenate([probe, x], axis=1)
        )
        y = attention(qkv[:, :1, 0], qkv[:, 1:, 1], qkv[:, 1:, 2], causal=False)
        y = Projection("XnNH,DNH->XnD", (c.hidden_size, *inner), bias_axes=1, name="out_proj")(y)
        return (y + vit.feed_forward(c, LayerNorm(c.layer_norm_eps, name="layernorm")(y)))[:, 0]


class TextTransformer(nn.Module):
    """Token ids ``[X, T]`` -> ``[X, D]``, the last layer's output at one token of each text, normalised."""

    config: TextConfig

    def setup(self) -> None:
        c = self.config
        init = nn.initializers.normal(0.02)
        self.embedding = self.param("embed_tokens", init, (c.vocab_size, c.hidden_size))
        self.position_embedding = self.param("position_embedding", init, (c.max_length, c.hidden_size))
        self.layers = vit.encoder_layers(c, c.num_layers, c.causal)
        self.final_layer_norm = LayerNorm(c.layer_norm_eps)

    def __call__(self, token_ids: Array, read_positions: Array) -> jax.Array:
        x = jnp.take(self.embedding, token_ids, axis=0)
        x = x + jnp.broadcast_to(self.position_embedding, x.shape)
        x, _ = self.layers(x)
        return self.final_layer_norm(read_at(x, read_positions[:, None])[:, 0])


class TwoTowers(nn.Module):
    """Images and texts -> unit vectors ``[X, E]``, float32."""

    config: DualEncoderConfig

    def setup(self) -> None:
        c = self.config
        self.vision_model = VisionTransformer(c.vision)
        self.text_model = TextTransformer(c.text)
        if c.sigmoid:
            self.head = AttentionPooling(c.vision)
            self.logit_bias = self.param("logit_bias", nn.initializers.constant(-10.0), (1,))
        else:
            self.visual_projection = Projection("XD,ED->XE", (c.embedding_size, c.vision.hidden_size))
        self.text_projection = Projection("XD,ED->XE", (c.embedding_size, c.text.hidden_size), int(c.sigmoid))
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(np.log(10.0)), (1,))

    def embed_images(self, pixels: Array) -> jax.Array:
        """``[X, height, width, 3]`` -> ``[X, E]``."""
        x = self.vision_model.normalized(jnp.asarray(pixels, self.logit_scale.dtype))
        return unit(self.head(x) if self.config.sigmoid else self.visual_projection(x[:, 0]))

    def embed_texts(self, token_ids: Array, read_positions: Array) -> jax.Array:
        """int32 ``[X, T]`` and ``[X]`` -> ``[X, E]``."""
        return unit(self.text_projection(self.text_model(token_ids, read_positions)))

    def __call__(self, pixels: Array, token_ids: Array, read_positions: Array) -> tuple[jax.Array, jax.Array]:
        """Both."""
        return self.embed_images(pixels), self.embed_texts(token_ids, read_positions)


def unit(x: jax.Array) -> jax.Array:
    """``x`` / its length along the last axis, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))


def checkpoint_table(config: DualEncoderConfig) -> Table:
    """The Hugging Face layout, as the hub's ``openai/clip-*`` and ``google/siglip*`` checkpoints store it."""
    c = config
    text, embeddings = "text_model", "text_model.embeddings"
    entries = [
        *vit.checkpoint_entries(c.vision, "vision_model", "vision_model"),
        Entry(f"{text}/embed_tokens", f"{embeddings}.token_embedding.weight", "v d -> v d"),
        Entry(f"{text}/position_embedding", f"{embeddings}.position_embedding.weight", "t d -> t d"),
        *vit.layer_entries(c.text, f"{text}.encoder.layers", f"{text}/layers", c.text.num_layers),
        *vit.norm_entries(f"{text}/final_layer_norm", f"{text}.final_layer_norm"),
    ]
    if c.sigmoid:
        entries += [
            *vit.linear_entries("text_projection", f"{text}.head"),
            *_pooling_entries(c.vision, "vision_model.head", "head"),
            Entry("logit_scale", "logit_scale", "one -> one"),
            Entry("logit_bias", "logit_bias", "one -> one"),
        ]
    else:
        entries += [
            Entry("text_projection/kernel", "text_projection.weight", "o i -> o i"),
            Entry("visual_projection/kernel", "visual_projection.weight", "o i -> o i"),
            Entry("logit_scale", "logit_scale", "-> 1"),
        ]
    # A buffer that older releases stored.
    return Table(tuple(entries), ignored=(r"(text|vision)_model\.embeddings\.position_ids",))


def _pooling_entries(config: VisionConfig, source: str, target: str) -> list[Entry]:
    heads = {"h": config.hidden_size // config.num_heads}
    fused = {**heads, "u": 3}
    attend = f"{source}.attention"
    return [
        Entry(f"{target}/probe", f"{source}.probe", "x n d -> x n d"),
        Entry(f"{target}/qkv/kernel", f"{attend}.in_proj_weight", "(u n h) d -> u n h d", fused),
        Entry(f"{target}/qkv/bias", f"{attend}.in_proj_bias", "(u n h) -> u n h", fused),
        Entry(f"{target}/out_proj/kernel", f"{attend}.out_proj.weight", "d (n h) -> d n h", heads),
        Entry(f"{target}/out_proj/bias", f"{attend}.out_proj.bias", "d -> d"),
        *vit.norm_entries(f"{target}/layernorm", f"{source}.layernorm"),
        *vit.linear_entries(f"{target}/fc1", f"{source}.mlp.fc1"),
        *vit.linear_entries(f"{target}/fc2", f"{source}.mlp.fc2"),
    ]
