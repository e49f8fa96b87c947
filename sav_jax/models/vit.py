"""Transformer encoders of images: the towers of CLIP (arXiv 2103.00020) and SigLIP (arXiv 2303.15343), which differ by
config alone, and the blocks they share with the text towers of ``models/dual_encoder.py``.

Axes: X images (or texts), n tokens of one (a class token, if there is one, then patches), D model width, F feed-forward
width, N heads, H head width, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from sav_jax.errors import UserError
from sav_jax.models.attention import attention
from sav_jax.models.layers import ACTIVATIONS, LayerNorm, Projection, scanned
from sav_jax.models.weights import Entry


class EncoderConfig(Protocol):
    """What an :class:`EncoderBlock` needs to know."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def hidden_act(self) -> str: ...
    @property
    def layer_norm_eps(self) -> float: ...


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of a vision tower; field by field Hugging Face's ``CLIPVisionConfig`` and ``SiglipVisionConfig``.

    Attributes:
        num_layers: layers of the checkpoint.
        depth: layers that are run: an LMM may read the output of an earlier layer than the last.
        class_token: a learnt token stands before the patches (CLIP).
        pre_norm: a LayerNorm stands before the first layer (CLIP).
        patch_bias: the patch embedding has a bias (SigLIP).
        remat: what a layer keeps for its backward pass, a name in ``layers.REMAT_POLICIES``.
    """

    image_size: int
    patch_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    depth: int
    num_heads: int
    hidden_act: str
    layer_norm_eps: float
    class_token: bool
    pre_norm: bool
    patch_bias: bool
    remat: str = "none"

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> VisionConfig:
        """From the ``vision_config`` of a ``config.json`` whose defaults have been filled in.

        Raises:
            UserError: the tower is of a kind this port does not know.
        """
        model_type = config["model_type"]
        if model_type not in _TOWERS:
            raise UserError(f"vision_config.model_type {model_type!r} is not known (known: {', '.join(_TOWERS)})")
        class_token, pre_norm, patch_bias = _TOWERS[model_type]
        return cls(
            image_size=config["image_size"],
            patch_size=config["patch_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            depth=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            hidden_act=known_activation(config, "vision_config"),
            layer_norm_eps=config["layer_norm_eps"],
            class_token=class_token,
            pre_norm=pre_norm,
            patch_bias=patch_bias,
        )

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """n: tokens of an image."""
        return self.patches_per_side**2 + self.class_token


_TOWERS = {
    # model_type: (class token, norm before the layers, bias of the patch embedding)
    "clip_vision_model": (True, True, False),
    "siglip_vision_model": (False, False, True),
}


def known_activation(config: Mapping[str, Any], name: str) -> str:
    """``hidden_act`` of the sub-config called ``name``.

    Raises:
        UserError: it is not implemented.
    """
    if config["hidden_act"] not in ACTIVATIONS:
        raise UserError(f"{name}.hidden_act {config['hidden_act']!r} is not known (known: {', '.join(ACTIVATIONS)})")
    return config["hidden_act"]


def feed_forward(config: EncoderConfig, x: jax.Array) -> jax.Array:
    """Two linear layers, ``fc1`` and ``fc2`` of the module that calls this: ``[X, n, D] -> [X, n, D]``."""
    c = config
    x = ACTIVATIONS[c.hidden_act](Projection("XnD,FD->XnF", (c.intermediate_size, c.hidden_size), 1, name="fc1")(x))
    return Projection("XnF,DF->XnD", (c.hidden_size, c.intermediate_size), 1, name="fc2")(x)


class EncoderBlock(nn.Module):
    """Pre-norm transformer block: ``[X, n, D] -> [X, n, D]``; shaped for ``nn.scan``."""

    config: EncoderConfig
    causal: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        c = self.config
        heads = (c.num_heads, c.hidden_size // c.num_heads)
        y = LayerNorm(c.layer_norm_eps, name="layer_norm1")(x)
        q, k, v = (
            Projection("XnD,NHD->XnNH", (*heads, c.hidden_size), bias_axes=2, name=f"{p}_proj")(y) for p in "qkv"
        )
        y = attention(q, k, v, causal=self.causal)
        x = x + Projection("XnNH,DNH->XnD", (c.hidden_size, *heads), bias_axes=1, name="out_proj")(y)
        return x + feed_forward(c, LayerNorm(c.layer_norm_eps, name="layer_norm2")(x)), None


def encoder_layers(config: EncoderConfig, length: int, causal: bool = False) -> nn.Module:
    """``length`` blocks with stacked parameters."""
    return scanned(EncoderBlock, length, getattr(config, "remat", "none"), in_axes=())(config, causal)


class VisionTransformer(nn.Module):
    """Pixels ``[X, height, width, 3]`` -> features ``[X, n, D]``: what layer ``depth`` puts out, before the final
    norm.
    """

    config: VisionConfig

    def setup(self) -> None:
        c = self.config
        init = nn.initializers.normal(0.02)
        self.patch_embedding = Projection("XnC,DC->XnD", (c.hidden_size, c.patch_size**2 * 3), int(c.patch_bias))
        self.position_embedding = self.param("position_embedding", init, (c.num_tokens, c.hidden_size))
        if c.class_token:
            self.class_embedding = self.param("class_embedding", init, (c.hidden_size,))
        if c.pre_norm:
            self.pre_layernorm = LayerNorm(c.layer_norm_eps)
        self.layers = encoder_layers(c, c.depth)
        if c.depth < c.num_layers:
            self.unread_layers = encoder_layers(c, c.num_layers - c.depth)
        self.post_layernorm = LayerNorm(c.layer_norm_eps)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        c = self.config
        p = c.patch_size
        # SigLIP's 384 pixels hold 27 patches of 14 and 6 pixels more, which no patch sees.
        pixels = pixels[:, : c.patches_per_side * p, : c.patches_per_side * p]
        # A stride-p convolution of width p is one matrix product per patch.
        x = self.patch_embedding(rearrange(pixels, "x (i p) (j q) c -> x (i j) (p q c)", p=p, q=p))
        if c.class_token:
            first = jnp.broadcast_to(self.class_embedding.astype(x.dtype), (x.shape[0], 1, x.shape[2]))
            x = jnp.concatenate([first, x], axis=1)
        x = x + jnp.broadcast_to(self.position_embedding.astype(x.dtype), x.shape)
        if c.pre_norm:
            x = self.pre_layernorm(x)
        x, _ = self.layers(x)
        if self.is_initializing():
            # What LMMs do not read is kept, so that a checkpoint comes back whole when saved.
            self.post_layernorm(x)
            if c.depth < c.num_layers:
                self.unread_layers(x)
        return x

    def normalized(self, pixels: jax.Array) -> jax.Array:
        """The same after the final norm: what dual encoders read."""
        return self.post_layernorm(self(pixels))


def checkpoint_entries(config: VisionConfig, source: str, target: str) -> list[Entry]:
    """Where each parameter under ``target`` lives in a Hugging Face checkpoint whose tower is called ``source``."""
    c = config
    patch = {"p": c.patch_size, "q": c.patch_size, "c": 3}
    embeddings = f"{source}.embeddings"
    entries = [
        Entry(
            f"{target}/patch_embedding/kernel", f"{embeddings}.patch_embedding.weight", "d c p q -> d (p q c)", patch
        ),
        Entry(f"{target}/position_embedding", f"{embeddings}.position_embedding.weight", "n d -> n d"),
        *norm_entries(f"{target}/post_layernorm", f"{source}.post_layernorm"),
        *layer_entries(c, f"{source}.encoder.layers", f"{target}/layers", c.depth),
    ]
    if c.patch_bias:
        entries.append(Entry(f"{target}/patch_embedding/bias", f"{embeddings}.patch_embedding.bias", "d -> d"))
    if c.class_token:
        entries.append(Entry(f"{target}/class_embedding", f"{embeddings}.class_embedding", "d -> d"))
    if c.pre_norm:
        # Misspelt in every checkpoint.
        entries += norm_entries(f"{target}/pre_layernorm", f"{source}.pre_layrnorm")
    if c.depth < c.num_layers:
        unread = c.num_layers - c.depth
        entries += layer_entries(c, f"{source}.encoder.layers", f"{target}/unread_layers", unread, c.depth)
    return entries


def layer_entries(config: EncoderConfig, source: str, target: str, count: int, first: int = 0) -> list[Entry]:
    """The same for ``count`` encoder layers from number ``first`` on."""
    heads = {"h": config.hidden_size // config.num_heads}
    layer = f"{source}.{{layer}}"
    entries = [
        *norm_entries(f"{target}/layer_norm1", f"{layer}.layer_norm1", count, first),
        *norm_entries(f"{target}/layer_norm2", f"{layer}.layer_norm2", count, first),
    ]
    inward, outward = ("(n h) d -> n h d", "(n h) -> n h"), ("d (n h) -> d n h", "d -> d")
    patterns = {"q_proj": inward, "k_proj": inward, "v_proj": inward, "out_proj": outward}
    for name, (kernel, bias) in patterns.items():
        path, key = f"{target}/{name}", f"{layer}.self_attn.{name}"
        entries += [
            Entry(f"{path}/kernel", f"{key}.weight", kernel, heads, count, first),
            Entry(f"{path}/bias", f"{key}.bias", bias, heads if "h" in bias else {}, count, first),
        ]
    for name in ("fc1", "fc2"):
        entries += linear_entries(f"{target}/{name}", f"{layer}.mlp.{name}", count, first)
    return entries


def linear_entries(target: str, source: str, layers: int | None = None, first: int = 0) -> list[Entry]:
    """Kernel and bias of a linear layer."""
    return [
        Entry(f"{target}/kernel", f"{source}.weight", "o i -> o i", {}, layers, first),
        Entry(f"{target}/bias", f"{source}.bias", "o -> o", {}, layers, first),
    ]


def norm_entries(target: str, source: str, layers: int | None = None, first: int = 0) -> list[Entry]:
    """Scale and bias of a LayerNorm."""
    return [
        Entry(f"{target}/scale", f"{source}.weight", "d -> d", {}, layers, first),
        Entry(f"{target}/bias", f"{source}.bias", "d -> d", {}, layers, first),
    ]
