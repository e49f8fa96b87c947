"""LLaVA-OneVision (arXiv 2408.03326): a SigLIP tower, a two-layer projector and a Qwen2 decoder.

Axes: B batch, T tokens, R positions read, P tiles of one prompt, n patches of a tile, S taps of a visual token, D width
of the decoder.

Which visual token stands where (anyres tiles, unpadding, newline tokens, reduction of large images) is decided on the
host by ``models/anyres.py``; the device only gathers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from flax import struct

from sav_jax.errors import UserError
from sav_jax.models import decoder, vit
from sav_jax.models.batch import Array, Batch
from sav_jax.models.decoder import Decoder, DecoderConfig, read_at
from sav_jax.models.layers import ACTIVATIONS, Projection
from sav_jax.models.vit import VisionConfig, VisionTransformer
from sav_jax.models.weights import Entry, Table


@dataclass(frozen=True)
class LlavaOnevisionConfig:
    """Everything a LLaVA-OneVision ``config.json`` says that changes the numbers."""

    vision: VisionConfig
    text: DecoderConfig
    projector_hidden_act: str
    projector_bias: bool
    image_token_id: int
    image_grid_pinpoints: tuple[tuple[int, int], ...]
    max_tiles: int
    """N of ``anyres_max_N``: images worth more than N tiles of visual tokens are reduced."""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> LlavaOnevisionConfig:
        """From a ``config.json`` whose defaults have been filled in (``models/registry.py`` does that).

        Raises:
            UserError: an option that would change the numbers and is not implemented.
        """
        vision = VisionConfig.from_hf(config["vision_config"])
        layer = config["vision_feature_layer"]
        if not isinstance(layer, int):
            raise UserError(f"vision_feature_layer {layer!r}: only a single layer is supported")
        # hidden_states[0] is the embedding and hidden_states[i] the output of layer i, so the tower stops after layer
        # i.
        depth = layer if layer >= 0 else vision.num_layers + 1 + layer
        if not 0 < depth <= vision.num_layers:
            raise UserError(f"vision_feature_layer {layer} does not exist in a tower of {vision.num_layers} layers")
        if config["vision_feature_select_strategy"] != "full":
            raise UserError(
                f"vision_feature_select_strategy {config['vision_feature_select_strategy']!r} is not supported "
                "(known: full)"
            )
        aspect = config["vision_aspect_ratio"]
        if not aspect.startswith("anyres_max_"):
            raise UserError(f"vision_aspect_ratio {aspect!r} is not supported (known: anyres_max_N)")
        if config["projector_hidden_act"] not in ACTIVATIONS:
            raise UserError(f"projector_hidden_act {config['projector_hidden_act']!r} is not known")
        text = {**config["text_config"], "tie_word_embeddings": config["tie_word_embeddings"]}
        return cls(
            vision=replace(vision, num_layers=depth),
            text=DecoderConfig.from_hf(text),
            projector_hidden_act=config["projector_hidden_act"],
            projector_bias=config["multimodal_projector_bias"],
            image_token_id=config["image_token_index"],
            image_grid_pinpoints=tuple((h, w) for h, w in config["image_grid_pinpoints"]),
            max_tiles=int(aspect.removeprefix("anyres_max_")),
        )


@struct.dataclass
class Output:
    """What a forward pass returns besides the sown heads.

    Attributes:
        hidden: ``[B, T, D]`` after the final norm.
        logits: float32 ``[B, R, V]`` ("read"), ``[B, T, V]`` ("all") or None ("none").
    """

    hidden: jax.Array
    logits: jax.Array | None = None


class Projector(nn.Module):
    """Two linear layers with an activation between: vision width -> D."""

    config: LlavaOnevisionConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        width, bias_axes = c.text.hidden_size, int(c.projector_bias)
        x = Projection("XnC,CD->XnD", (c.vision.hidden_size, width), bias_axes, name="linear_1")(x)
        x = ACTIVATIONS[c.projector_hidden_act](x)
        return Projection("XnC,CD->XnD", (width, width), bias_axes, name="linear_2")(x)


class LlavaOnevision(nn.Module):
    """The LMM: a :class:`Batch` in, an :class:`Output` out, head outputs in the ``intermediates`` collection."""

    config: LlavaOnevisionConfig

    def setup(self) -> None:
        c = self.config
        self.vision_tower = VisionTransformer(c.vision)
        self.multi_modal_projector = Projector(c)
        self.image_newline = self.param("image_newline", nn.initializers.normal(0.02), (c.text.hidden_size,))
        self.language_model = Decoder(c.text)

    def encode_images(self, tiles: Array) -> jax.Array:
        """Tiles ``[B, P, height, width, 3]`` -> projected visual tokens ``[B, P, n, D]``."""
        x = rearrange(jnp.asarray(tiles, self.image_newline.dtype), "b p h w c -> (b p) h w c")
        x = self.multi_modal_projector(self.vision_tower(x))
        return rearrange(x, "(b p) n d -> b p n d", p=tiles.shape[1])

    def embed(self, batch: Batch) -> jax.Array:
        """Token embeddings with visual tokens in their places, ``[B, T, D]``."""
        x = self.language_model.embed(batch.token_ids)
        if batch.tiles is None or batch.visual_index is None or batch.visual_weight is None:
            return x
        features = rearrange(self.encode_images(batch.tiles), "b p n d -> b (p n) d")
        newline = jnp.broadcast_to(self.image_newline, (features.shape[0], 1, features.shape[2]))
        table = jnp.concatenate([newline, features], axis=1)
        visual = jnp.zeros_like(x)
        for tap in range(batch.visual_index.shape[2]):
            rows = read_at(table, jnp.maximum(batch.visual_index[:, :, tap], 0))
            visual = visual + rows * batch.visual_weight[:, :, tap, None].astype(x.dtype)
        return jnp.where(batch.visual_index[:, :, :1] >= 0, visual, x)

    def __call__(self, batch: Batch, logits: str = "none") -> Output:
        """Forward pass.

        Args:
            batch: prompts of one bucket.
            logits: "none", "read" (at ``batch.read_positions``) or "all".
        """
        positions = jnp.broadcast_to(jnp.arange(batch.token_ids.shape[1])[None, :], batch.token_ids.shape)
        hidden = self.language_model(self.embed(batch), positions, batch.lengths, batch.read_positions)
        if logits == "none" and not self.is_initializing():
            return Output(hidden)
        at = hidden if logits == "all" else read_at(hidden, batch.read_positions)
        return Output(hidden, self.language_model.logits(at))


HEADS_PATH = ("language_model", "layers", "self_attn", "head_outputs")
"""Where the heads ``[L, B, R, N, H]`` stand in the ``intermediates`` collection."""


def checkpoint_table(config: LlavaOnevisionConfig) -> Table:
    """The Hugging Face layout, as the hub's ``llava-hf`` checkpoints store it; newer key names are renamed to it."""
    c = config
    entries = [
        *vit.checkpoint_entries(c.vision, "vision_tower.vision_model", "vision_tower"),
        Entry("image_newline", "image_newline", "d -> d"),
        *decoder.checkpoint_entries(c.text, "language_model.model", "language_model.lm_head", "language_model"),
    ]
    for name in ("linear_1", "linear_2"):
        path = f"multi_modal_projector/{name}"
        entries.append(Entry(f"{path}/kernel", f"multi_modal_projector.{name}.weight", "o i -> i o"))
        if c.projector_bias:
            entries.append(Entry(f"{path}/bias", f"multi_modal_projector.{name}.bias", "o -> o"))
    return Table(
        entries=tuple(entries),
        renames=(
            (r"^model\.language_model\.(?!model\.)", "language_model.model."),
            (r"^lm_head\.", "language_model.lm_head."),
            (r"^model\.(vision_tower|multi_modal_projector|image_newline)", r"\1"),
            (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
        ),
        ignored=(
            # The attention-pooling head of a full SigLIP, and layers behind the one an LMM reads, take no part in the
            # forward pass.
            r"vision_tower\.vision_model\.head\..*",
            r"vision_tower\.vision_model\.embeddings\.position_ids",
            *_behind(r"vision_tower\.vision_model\.encoder\.layers", c.vision.num_layers),
            *_behind(r"language_model\.model\.layers", c.text.num_layers),
        ),
    )


def _behind(prefix: str, depth: int) -> tuple[str, ...]:
    """A pattern for the layers from ``depth`` on (at most 999)."""
    return (prefix + r"\.(" + "|".join(str(i) for i in range(depth, 1000)) + r")\..*",)
