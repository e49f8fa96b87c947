"""Qwen-VL and Qwen-VL-Chat, the first generation (arXiv 2308.12966): a ViT whose patches a resampler sums up in 256
visual tokens, and the decoder of the first Qwen (arXiv 2309.16609).

The family is not in transformers; facts are those of the modelling code published with the checkpoints.

Axes: B batch, P images of one prompt, Q visual tokens of an image, E width of the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from sav_jax.errors import UserError
from sav_jax.models import qwen1_vision
from sav_jax.models.batch import Batch
from sav_jax.models.decoder_config import DecoderConfig
from sav_jax.models.multimodal import MultimodalModel
from sav_jax.models.qwen1_vision import Qwen1VisionConfig, Qwen1VisionTower
from sav_jax.models.weights import Entry, Table, layers_from

_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "layer_norm_epsilon": 1e-6,
    "kv_channels": 128,
    "rotary_pct": 1.0,
    "rotary_emb_base": 10000,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "intermediate_size": 22016,
    "no_bias": True,
    "tie_word_embeddings": False,
}


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with every field the published config class would default, the decoder's under ``text_config`` as in
    other families.

    Raises:
        UserError: a Qwen that sees nothing, or one whose weights are quantised.
    """
    if not isinstance(config.get("visual"), Mapping):
        raise UserError(
            'config.json: model_type "qwen" without a "visual" part is a language model; of this type only Qwen-VL and '
            "Qwen-VL-Chat are supported"
        )
    if config.get("quantization_config"):
        raise UserError("config.json: quantised weights (quantization_config) are not supported")
    text = {**_DEFAULTS, **{key: value for key, value in config.items() if key != "visual"}}
    return {"model_type": config["model_type"], "text_config": text, "visual": dict(config["visual"])}


@dataclass(frozen=True)
class Qwen1VLConfig:
    """Everything a ``config.json`` of the family says that changes the numbers.

    Attributes:
        image_token_id: what stands at image positions; the tokens of two and one less open and close an image.
    """

    vision: Qwen1VisionConfig
    text: DecoderConfig
    image_token_id: int

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Qwen1VLConfig:
        """From a ``config.json`` whose defaults have been filled in (:func:`with_defaults`).

        Raises:
            UserError: an option that would change the numbers and is not implemented.
        """
        text, vision = config["text_config"], Qwen1VisionConfig.from_hf(config["visual"])
        known = {"rotary_pct": 1.0, "no_bias": True}
        for name, value in known.items():
            if text[name] != value:
                raise UserError(f"config.json: {name} {text[name]!r} is not supported (known: {value})")
        if text["kv_channels"] * text["num_attention_heads"] != text["hidden_size"]:
            raise UserError("config.json: kv_channels times num_attention_heads must be hidden_size")
        if vision.out_size != text["hidden_size"]:
            raise UserError("config.json: visual.output_dim must be hidden_size")
        stretched = text["use_dynamic_ntk"] or text["use_logn_attn"]
        if stretched and not isinstance(text.get("seq_length"), int):
            raise UserError("config.json: seq_length is missing, which use_dynamic_ntk and use_logn_attn need")
        if not isinstance(config["visual"].get("image_start_id"), int):
            raise UserError("config.json: visual has no image_start_id")
        return cls(
            vision=vision,
            text=DecoderConfig(
                vocab_size=text["vocab_size"],
                hidden_size=text["hidden_size"],
                # It counts both of the projections that are multiplied.
                intermediate_size=text["intermediate_size"] // 2,
                num_layers=text["num_hidden_layers"],
                num_heads=text["num_attention_heads"],
                num_kv_heads=text["num_attention_heads"],
                head_dim=text["kv_channels"],
                rms_norm_eps=text["layer_norm_epsilon"],
                rope_theta=float(text["rotary_emb_base"]),
                hidden_act="silu",
                tie_word_embeddings=bool(text["tie_word_embeddings"]),
                qkv_bias=True,
                fused_qkv=True,
                trained_length=text["seq_length"] if stretched else 0,
                log_n=bool(text["use_logn_attn"]),
                dynamic_ntk=bool(text["use_dynamic_ntk"]),
            ),
            image_token_id=config["visual"]["image_start_id"] + 2,
        )


class Qwen1VL(MultimodalModel):
    """A tower with a resampler and a decoder; visual tables hold a row of zeros and the visual tokens of all images."""

    config: Qwen1VLConfig

    def setup(self) -> None:
        super().setup()
        self.visual = Qwen1VisionTower(self.config.vision)

    def dummy_vision(self) -> dict[str, Any]:
        size = self.config.vision.image_size
        return {"pixels": jnp.zeros((1, 1, size, size, 3), jnp.float32)}

    def encode_images(self, batch: Batch) -> tuple[jax.Array, None]:
        """Images ``[B, P, height, width, 3]`` -> tables ``[B, 1 + P * Q, E]``."""
        pixels = jnp.asarray(batch.pixels, self.language_model.embedding.dtype)
        features = self.visual(rearrange(pixels, "b p h w c -> (b p) h w c"))
        table = rearrange(features, "(b p) q e -> b (p q) e", p=pixels.shape[1])
        # No newline vector in this family.
        return jnp.pad(table, ((0, 0), (1, 0), (0, 0))), None


def checkpoint_table(config: Qwen1VLConfig) -> Table:
    """The layout of the hub's ``Qwen/Qwen-VL`` and ``Qwen/Qwen-VL-Chat``."""
    c = config.text
    target, source, count = "language_model", "transformer.h.{layer}", c.num_layers
    fused = {"a": 3, "h": c.head_dim}
    layers = f"{target}/layers"
    entries = [
        Entry(f"{target}/embed_tokens", "transformer.wte.weight", "v d -> v d"),
        Entry(f"{target}/norm/scale", "transformer.ln_f.weight", "d -> d"),
        Entry(f"{layers}/input_layernorm/scale", f"{source}.ln_1.weight", "d -> d", {}, count),
        Entry(f"{layers}/post_attention_layernorm/scale", f"{source}.ln_2.weight", "d -> d", {}, count),
        # All queries, then all keys, then all values.
        Entry(f"{layers}/self_attn/qkv/kernel", f"{source}.attn.c_attn.weight", "(a n h) d -> a n h d", fused, count),
        Entry(f"{layers}/self_attn/qkv/bias", f"{source}.attn.c_attn.bias", "(a n h) -> a n h", fused, count),
        Entry(
            f"{layers}/self_attn/o_proj/kernel",
            f"{source}.attn.c_proj.weight",
            "d (n h) -> d n h",
            {"h": c.head_dim},
            count,
        ),
        *qwen1_vision.checkpoint_entries(config.vision, "transformer.visual", "visual"),
    ]
    # The second of the two projections is the one that goes through the activation.
    for name, key in (("gate_proj", "w2"), ("up_proj", "w1"), ("down_proj", "c_proj")):
        entries.append(Entry(f"{layers}/mlp/{name}/kernel", f"{source}.mlp.{key}.weight", "o i -> o i", {}, count))
    if c.tie_word_embeddings:
        entries.append(Entry(f"{target}/embed_tokens", "lm_head.weight", "v d -> v d", copy=True))
    else:
        entries.append(Entry(f"{target}/lm_head/kernel", "lm_head.weight", "v d -> v d"))
    return Table(
        entries=tuple(entries),
        ignored=(
            # Buffers that earlier releases of the modelling code stored: constants, computed here.
            r"transformer\.h\.\d+\.attn\.(bias|masked_bias|rotary_emb\.inv_freq)",
            r"transformer\.rotary_emb\.inv_freq",
            layers_from(r"transformer\.h", c.num_layers),
        ),
    )
