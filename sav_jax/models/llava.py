"""The LLaVA families: a CLIP or SigLIP tower, a two-layer projector (or SQ-LLaVA's, ``models/projectors.py``) and a
decoder.

They differ by config and by how an image is shown (``models/anyres.py``):

- LLaVA-1.5 (arXiv 2310.03744): one view of every image, nothing between rows of patches;
- LLaVA-NeXT (LLaVA-1.6): anyres for every image;
- LLaVA-OneVision (arXiv 2408.03326): anyres, reduced to a token budget, for a lone image; one view for several; one
  view for every frame of a video, pooled to half its side.

Axes: B batch, P tiles of one prompt, n visual tokens of a tile, X = B * P tiles, D width of the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from sav_jax.errors import UserError
from sav_jax.models import decoder, projectors, vit
from sav_jax.models.batch import Array, Batch
from sav_jax.models.decoder_config import DecoderConfig
from sav_jax.models.layers import ACTIVATIONS, Projection
from sav_jax.models.multimodal import MultimodalModel
from sav_jax.models.projectors import PrototypeConfig, PrototypeExtractor
from sav_jax.models.vit import VisionConfig, VisionTransformer
from sav_jax.models.weights import TOWER_FILE, Entry, Table, layers_from


@dataclass(frozen=True)
class LlavaConfig:
    """Everything a ``config.json`` of the families says that changes the numbers.

    Attributes:
        skipped_tokens: how many of the tower's tokens are dropped from the front (1: CLIP's class token).
        newline: the model has a newline vector, put at the end of rows of patches.
        image_grid_pinpoints: resolutions (height, width) an image may be fitted to; empty means no anyres.
        anyres_for_several: images that share a prompt are cut into tiles like a lone one.
        max_tiles: N of ``anyres_max_N``: images worth more than N tiles of visual tokens are reduced; None: never.
        video_token_id: the placeholder of a video; None in families that read none.
        prototypes: of SQ-LLaVA's prototype extractor, which is then the projector; None: the plain one.
    """

    vision: VisionConfig
    text: DecoderConfig
    projector_hidden_act: str
    projector_bias: bool
    image_token_id: int
    skipped_tokens: int
    newline: bool
    image_grid_pinpoints: tuple[tuple[int, int], ...] = ()
    anyres_for_several: bool = False
    max_tiles: int | None = None
    video_token_id: int | None = None
    prototypes: PrototypeConfig | None = None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> LlavaConfig:
        """From a ``config.json`` whose defaults have been filled in (``models/registry.py`` does that).

        Raises:
            UserError: an option that would change the numbers and is not implemented.
        """
        model_type = config["model_type"]
        vision = VisionConfig.from_hf(config["vision_config"])
        layer = config["vision_feature_layer"]
        if not isinstance(layer, int):
            raise UserError(f"vision_feature_layer {layer!r}: only a single layer is supported")
        # hidden_states[0] is the embedding and hidden_states[i] the output of layer i: the tower stops after layer i.
        depth = layer if layer >= 0 else vision.num_layers + 1 + layer
        if not 0 < depth <= vision.num_layers:
            raise UserError(f"vision_feature_layer {layer} does not exist in a tower of {vision.num_layers} layers")
        if config["projector_hidden_act"] not in ACTIVATIONS:
            raise UserError(f"projector_hidden_act {config['projector_hidden_act']!r} is not known")
        prototypes = config.get("prototype_extractor")
        if prototypes is not None and not config["multimodal_projector_bias"]:
            raise UserError("multimodal_projector_bias false: a prototype extractor has biases")
        text = {**config["text_config"], "tie_word_embeddings": config["tie_word_embeddings"]}
        parsed = cls(
            vision=replace(vision, depth=depth),
            text=DecoderConfig.from_hf(text),
            projector_hidden_act=config["projector_hidden_act"],
            projector_bias=config["multimodal_projector_bias"],
            image_token_id=config["image_token_index"],
            skipped_tokens=int(config["vision_feature_select_strategy"] == "default"),
            newline=model_type != "llava",
            image_grid_pinpoints=tuple((h, w) for h, w in config.get("image_grid_pinpoints") or ()),
            anyres_for_several=model_type == "llava_next",
            max_tiles=_max_tiles(config["vision_aspect_ratio"]) if model_type == "llava_onevision" else None,
            video_token_id=config["video_token_index"] if model_type == "llava_onevision" else None,
            prototypes=None if prototypes is None else PrototypeConfig.from_hf(prototypes),
        )
        if parsed.image_grid_pinpoints and parsed.tokens_per_tile != vision.patches_per_side**2:
            raise UserError(
                f"vision_feature_select_strategy {config['vision_feature_select_strategy']!r} of a "
                f"{config['vision_config']['model_type']} leaves other tokens than patches, which makes no grid"
            )
        return parsed

    @property
    def tokens_per_tile(self) -> int:
        """n: visual tokens of a tile."""
        return self.vision.num_tokens - self.skipped_tokens


def _max_tiles(aspect: str) -> int:
    if not aspect.startswith("anyres_max_"):
        raise UserError(f"vision_aspect_ratio {aspect!r} is not supported (known: anyres_max_N)")
    return int(aspect.removeprefix("anyres_max_"))


class Projector(nn.Module):
    """Two linear layers with an activation between: vision width -> D."""

    config: LlavaConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        width, bias_axes = c.text.hidden_size, int(c.projector_bias)
        x = Projection("XnC,DC->XnD", (width, c.vision.hidden_size), bias_axes, name="linear_1")(x)
        x = ACTIVATIONS[c.projector_hidden_act](x)
        return Projection("XnC,DC->XnD", (width, width), bias_axes, name="linear_2")(x)


def _projector(config: LlavaConfig) -> nn.Module:
    if config.prototypes is None:
        return Projector(config)
    return PrototypeExtractor(config.prototypes, config.vision.hidden_size, config.text.hidden_size)


class Llava(MultimodalModel):
    """A ViT, a projector and a decoder; visual tables hold the newline vector (or zeros) and the visual
    tokens of all tiles.
    """

    config: LlavaConfig

    def setup(self) -> None:
        super().setup()
        self.vision_tower = VisionTransformer(self.config.vision)
        self.multi_modal_projector = _projector(self.config)
        if self.config.newline:
            width = self.config.text.hidden_size
            self.image_newline = self.param("image_newline", nn.initializers.normal(0.02), (width,))

    def dummy_vision(self) -> dict[str, Any]:
        size = self.config.vision.image_size
        return {"pixels": jnp.zeros((1, 1, size, size, 3), jnp.float32)}

    def encode_tiles(self, tiles: Array) -> jax.Array:
        """Tiles ``[B, P, height, width, 3]`` -> projected visual tokens ``[B, P, n, D]``."""
        pixels = jnp.asarray(tiles, self.language_model.embedding.dtype)
        x = self.vision_tower(rearrange(pixels, "b p h w c -> (b p) h w c"))[:, self.config.skipped_tokens :]
        return rearrange(self.multi_modal_projector(x), "(b p) n d -> b p n d", p=tiles.shape[1])

    def encode_images(self, batch: Batch) -> tuple[jax.Array, None]:
        """Tiles ``[B, P, height, width, 3]`` -> tables ``[B, 1 + P * n, D]``."""
        assert batch.pixels is not None
        features = rearrange(self.encode_tiles(batch.pixels), "b p n d -> b (p n) d")
        newline = self.image_newline if self.config.newline else jnp.zeros(features.shape[2], features.dtype)
        newline = jnp.broadcast_to(newline, (features.shape[0], 1, features.shape[2]))
        return jnp.concatenate([newline, features], axis=1), None


def checkpoint_table(config: LlavaConfig) -> Table:
    """The Hugging Face layout, as the hub's ``llava-hf`` checkpoints store it; newer key names, and those of LLaVA's
    own releases, are renamed to it.
    """
    c = config
    entries = [
        *vit.checkpoint_entries(c.vision, "vision_tower.vision_model", "vision_tower"),
        *decoder.checkpoint_entries(c.text, "language_model.model", "language_model.lm_head", "language_model"),
    ]
    if c.newline:
        entries.append(Entry("image_newline", "image_newline", "d -> d"))
    if c.prototypes is not None:
        entries += projectors.checkpoint_entries(c.prototypes, "multi_modal_projector", "multi_modal_projector")
    for name in ("linear_1", "linear_2") if c.prototypes is None else ():
        path = f"multi_modal_projector/{name}"
        entries.append(Entry(f"{path}/kernel", f"multi_modal_projector.{name}.weight", "o i -> o i"))
        if c.projector_bias:
            entries.append(Entry(f"{path}/bias", f"multi_modal_projector.{name}.bias", "o -> o"))
    return Table(
        entries=tuple(entries),
        renames=(
            (r"^model\.language_model\.(?!model\.)", "language_model.model."),
            (r"^lm_head\.", "language_model.lm_head."),
            (r"^model\.(vision_tower|multi_modal_projector|image_newline)", r"\1"),
            # LLaVA's releases: the decoder is the model, and the tower's wrapper has a tower.
            (r"^model\.(embed_tokens|layers|norm)\.", r"language_model.model.\1."),
            (r"^model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
            (r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
            *projectors.released_renames(r"^model\.mm_projector\.", "multi_modal_projector"),
            (r"^vision_tower\.vision_tower\.", "vision_tower."),
            # A tower's own checkpoint, read beside one without.
            (r"^vision_model\.", "vision_tower.vision_model."),
            (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
        ),
        ignored=(
            # The attention-pooling head of a full SigLIP, the rest of a dual encoder, and layers behind the ones
            # loaded take no part in the forward pass.
            r"vision_tower\.vision_model\.head\..*",
            r"text_model\..*|(text|visual)_projection\.weight|logit_scale|logit_bias",
            layers_from(r"language_model\.model\.layers", c.text.num_layers),
            # Neither does this norm of SQ-LLaVA's releases.
            *([projectors.released_ignored(r"model\.mm_projector\.")] if c.prototypes is not None else []),
            # Buffers that older releases stored.
            r"vision_tower\.vision_model\.embeddings\.position_ids",
            r"language_model\.model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        ),
        parts=(
            (
                r"vision_tower\..*",
                "the vision tower's weights are missing; LLaVA's releases leave them in the repository that "
                f"mm_vision_tower names: put them, as safetensors, into the same folder as {TOWER_FILE}",
            ),
        ),
        module_names=(
            (r"^language_model\.model\.", "model.language_model."),
            (r"^language_model\.lm_head", "lm_head"),
            (r"^vision_tower\.vision_model\.", "model.vision_tower."),
            (r"^multi_modal_projector", "model.multi_modal_projector"),
        ),
    )
