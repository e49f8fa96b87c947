"""Qwen2-VL (arXiv 2409.12191), Qwen2.5-VL (arXiv 2502.13923) and Qwen3-VL (arXiv 2511.21631): a tower for images of any
size, a merger of four patches into one visual token, and a Qwen2 or Qwen3 decoder with rotary positions of three axes.

Axes: B batch, P patches of one prompt, C values of a patch, M visual tokens of one prompt, D width of the decoder, J
deepstack layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from sav_jax.errors import UserError
from sav_jax.models import decoder, qwen_vision
from sav_jax.models.batch import Batch
from sav_jax.models.decoder_config import DecoderConfig
from sav_jax.models.multimodal import MultimodalModel
from sav_jax.models.projectors import PrototypeConfig
from sav_jax.models.qwen_vision import QwenVision, QwenVisionConfig
from sav_jax.models.weights import Table, layers_from

_QWEN2_VIDEO = {
    "cap_pixels_per_frame": False,
    "max_video_tokens": 128_000,
    "size": {"shortest_edge": 128 * 28**2, "longest_edge": 768 * 28**2},
}
VIDEO_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2_vl": _QWEN2_VIDEO,
    "qwen2_5_vl": _QWEN2_VIDEO,
    "qwen3_vl": {
        "cap_pixels_per_frame": False,
        "size": {"shortest_edge": 128 * 32**2, "longest_edge": 768 * 32**2},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "max_video_tokens": 768,
    },
}
"""``model_type`` -> how transformers prepares frames of videos where a checkpoint does not say."""


@dataclass(frozen=True)
class QwenVLConfig:
    """Everything a ``config.json`` of the family says that changes the numbers.

    Attributes:
        tokens_per_second: steps of rotary time that a second of video takes (Qwen2.5-VL); None: every pair of frames
            takes one.
        timestamps: pairs of frames stand apart in the prompt, each behind its time in words (Qwen3-VL).
    """

    vision: QwenVisionConfig
    text: DecoderConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    tokens_per_second: float | None = None
    timestamps: bool = False

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> QwenVLConfig:
        """From a ``config.json`` whose defaults have been filled in (``models/registry.py`` does that).

        Raises:
            UserError: an option that would change the numbers and is not implemented.
        """
        interleaved = config["model_type"] == "qwen3_vl"
        vision = QwenVisionConfig.from_hf(config["vision_config"])
        if config.get("prototype_extractor") is not None:
            vision = replace(vision, prototypes=_prototypes(config["prototype_extractor"]))
        # How wavelengths are shared out is the release's, whether or not its config says so.
        rope = {
            "mrope_section": [24, 20, 20] if interleaved else [16, 24, 24],
            **config["text_config"]["rope_parameters"],
            "mrope_interleaved": interleaved,
        }
        text = {
            **config["text_config"],
            "rope_parameters": rope,
            "tie_word_embeddings": config["tie_word_embeddings"],
        }
        return cls(
            vision=vision,
            text=DecoderConfig.from_hf(text),
            image_token_id=config["image_token_id"],
            video_token_id=config["video_token_id"],
            vision_start_token_id=config["vision_start_token_id"],
            vision_end_token_id=config["vision_end_token_id"],
            tokens_per_second=(
                config["vision_config"]["tokens_per_second"] if config["model_type"] == "qwen2_5_vl" else None
            ),
            timestamps=config["model_type"] == "qwen3_vl",
        )


def _prototypes(config: Any) -> PrototypeConfig:
    """The merger behind them stays as it is, and images of any size leave one of the forms."""
    of_layout = {"form": "paper", "hidden_act": "gelu"}
    prototypes = PrototypeConfig.from_hf({**of_layout, **config} if isinstance(config, Mapping) else config)
    for name, only in of_layout.items():
        value = getattr(prototypes, name)
        if value != only:
            raise UserError(
                f"prototype_extractor.{name} {value!r}: in front of Qwen-VL's merger it can only be {only!r}"
            )
    return prototypes


class QwenVL(MultimodalModel):
    """A :class:`QwenVision` tower and a decoder; visual tables hold a zero row and the visual tokens of all images."""

    config: QwenVLConfig

    def setup(self) -> None:
        super().setup()
        self.visual = QwenVision(self.config.vision)

    def dummy_vision(self) -> dict[str, Any]:
        c = self.config.vision
        patches = c.merge_size**2
        index = jnp.zeros((1, patches), jnp.int32)
        return {
            "pixels": jnp.zeros((1, patches, c.patch_values), jnp.float32),
            "vision": {
                "segments": index,
                "places": jnp.zeros((1, patches, 2), jnp.int32),
                "order": index,
                "windows": index,
                "taps": jnp.zeros((1, patches, 4), jnp.int32),
                "tap_weights": jnp.zeros((1, patches, 4), jnp.float32),
            },
        }

    def encode_images(self, batch: Batch) -> tuple[jax.Array, jax.Array | None]:
        """Patches ``[B, P, C]`` -> tables ``[B, 1 + M, D]`` and ``[J, B, 1 + M, D]``."""
        assert batch.vision is not None
        patches = jnp.asarray(batch.pixels, self.language_model.embedding.dtype)
        tokens, deepstack = self.visual(patches, batch.vision)
        # There is no newline vector; its row is zero.
        tokens = jnp.pad(tokens, ((0, 0), (1, 0), (0, 0)))
        return tokens, None if deepstack is None else jnp.pad(deepstack, ((0, 0), (0, 0), (1, 0), (0, 0)))


def checkpoint_table(config: QwenVLConfig) -> Table:
    """The Hugging Face layout, as the hub's ``Qwen/*-VL-*-Instruct`` checkpoints store it; other key names are renamed
    to it.
    """
    c = config
    deepstack = c.vision.position_side is not None
    # Qwen3-VL was released with the names transformers has in memory, the others with those of a bare decoder; both are
    # read for all of them.
    visual, text = ("model.visual", "model.language_model") if deepstack else ("visual", "model")
    to_bare = ((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model."))
    to_nested = ((r"^visual\.", "model.visual."), (r"^model\.(?!visual\.|language_model\.)", "model.language_model."))
    return Table(
        entries=(
            *qwen_vision.checkpoint_entries(c.vision, visual, "visual"),
            *decoder.checkpoint_entries(c.text, text, "lm_head", "language_model"),
        ),
        renames=to_nested if deepstack else to_bare,
        # Layers behind the last one wanted.
        ignored=(layers_from(re.escape(text) + r"\.layers", c.text.num_layers),),
        module_names=to_nested,
    )
