"""Vision transformer: SigLIP's tower (arXiv 2303.15343), read before its final norm at the layer an LMM asks for.

Axes: X images, n patches of an image, D model width, F feed-forward width, N heads, H head width, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from sav_jax.errors import UserError
from sav_jax.models.attention import attention
from sav_jax.models.layers import ACTIVATIONS, LayerNorm, Projection
from sav_jax.models.weights import Entry


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of a vision tower; field by field Hugging Face's ``SiglipVisionConfig``."""

    image_size: int
    patch_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    hidden_act: str
    layer_norm_eps: float

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> VisionConfig:
        """From the ``vision_config`` of a ``config.json`` whose defaults have been filled in.

        Raises:
            UserError: the tower is of a kind this port does not know.
        """
        if config["model_type"] != "siglip_vision_model":
            raise UserError(
                f"vision_config.model_type {config['model_type']!r} is not known (known: siglip_vision_model)"
            )
        if config["hidden_act"] not in ACTIVATIONS:
            raise UserError(
                f"vision_config.hidden_act {config['hidden_act']!r} is not known (known: {', '.join(ACTIVATIONS)})"
            )
        return cls(
            image_size=config["image_size"],
            patch_size=config["patch_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            hidden_act=config["hidden_act"],
            layer_norm_eps=config["layer_norm_eps"],
        )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size


class VisionBlock(nn.Module):
    """Pre-norm transformer block with full attention: ``[X, n, D] -> [X, n, D]``; shaped for ``nn.scan``."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        c = self.config
        inner = (c.hidden_size, c.num_heads, c.head_dim)
        y = LayerNorm(c.layer_norm_eps, name="layer_norm1")(x)
        q, k, v = (Projection("XnD,DNH->XnNH", inner, bias_axes=2, name=f"{p}_proj")(y) for p in "qkv")
        y = attention(q, k, v, causal=False)
        x = x + Projection("XnNH,NHD->XnD", (*inner[1:], c.hidden_size), bias_axes=1, name="out_proj")(y)
        y = LayerNorm(c.layer_norm_eps, name="layer_norm2")(x)
        y = ACTIVATIONS[c.hidden_act](Projection("XnD,DF->XnF", (c.hidden_size, c.intermediate_size), 1, name="fc1")(y))
        return x + Projection("XnF,FD->XnD", (c.intermediate_size, c.hidden_size), 1, name="fc2")(y), None


class VisionTransformer(nn.Module):
    """Pixels ``[X, height, width, 3]`` -> patch features ``[X, n, D]``, the last layer's output before the final
    norm.
    """

    config: VisionConfig

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        c = self.config
        p = c.patch_size
        # SigLIP's 384 pixels hold 27 patches of 14 and 6 pixels more, which no patch sees.
        pixels = pixels[:, : c.patches_per_side * p, : c.patches_per_side * p]
        # A stride-p convolution of width p is one matrix product per patch.
        patches = rearrange(pixels, "x (i p) (j q) c -> x (i j) (p q c)", p=p, q=p)
        x = Projection("XnC,CD->XnD", (p * p * 3, c.hidden_size), bias_axes=1, name="patch_embedding")(patches)
        positions = self.param(
            "position_embedding", nn.initializers.normal(0.02), (c.patches_per_side**2, c.hidden_size)
        )
        x = x + jnp.broadcast_to(positions.astype(x.dtype), x.shape)
        blocks = nn.scan(
            VisionBlock,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=c.num_layers,
        )
        x, _ = blocks(c, name="layers")(x)
        if self.is_initializing():
            # LMMs read before this norm; it is kept so that a checkpoint comes back whole when saved.
            LayerNorm(c.layer_norm_eps, name="post_layernorm")(x)
        return x


def checkpoint_entries(config: VisionConfig, source: str, target: str) -> list[Entry]:
    """Where each parameter under ``target`` lives in a Hugging Face checkpoint whose tower is called ``source``."""
    heads = {"h": config.head_dim}
    patch = {"p": config.patch_size, "q": config.patch_size, "c": 3}
    layer = f"{source}.encoder.layers.{{layer}}"
    count = config.num_layers
    entries = [
        Entry(
            f"{target}/patch_embedding/kernel",
            f"{source}.embeddings.patch_embedding.weight",
            "d c p q -> (p q c) d",
            patch,
        ),
        Entry(f"{target}/patch_embedding/bias", f"{source}.embeddings.patch_embedding.bias", "d -> d"),
        Entry(f"{target}/position_embedding", f"{source}.embeddings.position_embedding.weight", "n d -> n d"),
        *norm_entries(f"{target}/post_layernorm", f"{source}.post_layernorm"),
        *norm_entries(f"{target}/layers/layer_norm1", f"{layer}.layer_norm1", count),
        *norm_entries(f"{target}/layers/layer_norm2", f"{layer}.layer_norm2", count),
    ]
    for name in ("q_proj", "k_proj", "v_proj"):
        entries += [
            Entry(
                f"{target}/layers/{name}/kernel", f"{layer}.self_attn.{name}.weight", "(n h) d -> d n h", heads, count
            ),
            Entry(f"{target}/layers/{name}/bias", f"{layer}.self_attn.{name}.bias", "(n h) -> n h", heads, count),
        ]
    entries += [
        Entry(
            f"{target}/layers/out_proj/kernel", f"{layer}.self_attn.out_proj.weight", "d (n h) -> n h d", heads, count
        ),
        Entry(f"{target}/layers/out_proj/bias", f"{layer}.self_attn.out_proj.bias", "d -> d", {}, count),
    ]
    for name in ("fc1", "fc2"):
        entries += [
            Entry(f"{target}/layers/{name}/kernel", f"{layer}.mlp.{name}.weight", "o i -> i o", {}, count),
            Entry(f"{target}/layers/{name}/bias", f"{layer}.mlp.{name}.bias", "o -> o", {}, count),
        ]
    return entries


def norm_entries(target: str, source: str, layers: int | None = None) -> list[Entry]:
    """Scale and bias of a LayerNorm."""
    return [
        Entry(f"{target}/scale", f"{source}.weight", "d -> d", {}, layers),
        Entry(f"{target}/bias", f"{source}.bias", "d -> d", {}, layers),
    ]
