"""Sizes and options of a decoder, from a ``config.json``: what is not supported is refused here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sav_jax.errors import UserError
from sav_jax.models.layers import ACTIVATIONS


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder; field by field Hugging Face's text configs.

    Attributes:
        qkv_bias: biases on q, k and v (Qwen2).
        qk_norm: RMSNorm of every query and key head before rotation (Qwen3).
        rope_axes: with M-RoPE, the axis (0 time, 1 height, 2 width) each of the H / 2 wavelengths counts along.
        fused_qkv: q, k and v are one projection (the first Qwen).
        trained_length: tokens of the longest prompts seen in training, for the two options that follow.
        log_n: queries beyond it are scaled up, see :func:`decoder.log_n_scale` (the first Qwen).
        dynamic_ntk: prompts beyond it turn more slowly, see :func:`decoder.stretched_theta` (the first Qwen).
        remat: what a layer keeps for its backward pass, a name in ``layers.REMAT_POLICIES``.
    """

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
    tie_word_embeddings: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_axes: tuple[int, ...] | None = None
    fused_qkv: bool = False
    trained_length: int = 0
    log_n: bool = False
    dynamic_ntk: bool = False
    remat: str = "none"

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """From the ``text_config`` of a ``config.json`` whose defaults have been filled in.

        Raises:
            UserError: an option that would change the numbers and is not implemented.
        """
        model_type = config["model_type"]
        if model_type not in _DECODERS:
            raise UserError(f"text_config.model_type {model_type!r} is not known (known: {', '.join(_DECODERS)})")
        rope = config["rope_parameters"]
        # "mrope" is the default scaling under the name Qwen2-VL's first configs gave it.
        if rope.get("rope_type", "default") not in ("default", "mrope"):
            raise UserError(f"text_config: rope_type {rope['rope_type']!r} is not supported (known: default)")
        if "sliding_attention" in (config.get("layer_types") or ()):
            raise UserError("text_config: sliding-window attention is not supported")
        if model_type == "mistral" and config.get("sliding_window") is not None:
            raise UserError("text_config: sliding-window attention is not supported")
        if config["hidden_act"] not in ACTIVATIONS:
            raise UserError(
                f"text_config.hidden_act {config['hidden_act']!r} is not known (known: {', '.join(ACTIVATIONS)})"
            )
        qkv_bias, qk_norm = _DECODERS[model_type]
        if config.get("attention_bias") or config.get("mlp_bias"):
            raise UserError("text_config: attention_bias and mlp_bias are not supported")
        if config["num_attention_heads"] % config["num_key_value_heads"]:
            raise UserError(
                f"text_config: {config['num_attention_heads']} heads cannot share "
                f"{config['num_key_value_heads']} key/value heads"
            )
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config["num_key_value_heads"],
            head_dim=head_dim,
            rms_norm_eps=config["rms_norm_eps"],
            rope_theta=float(rope["rope_theta"]),
            hidden_act=config["hidden_act"],
            tie_word_embeddings=bool(config["tie_word_embeddings"]),
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            rope_axes=_rope_axes(rope, head_dim),
        )


_DECODERS = {
    # model_type: (biases on q, k, v; norms of q and k)
    "llama": (False, False),
    "mistral": (False, False),
    "qwen2": (True, False),
    "qwen3": (False, True),
    "qwen2_vl_text": (True, False),
    "qwen2_5_vl_text": (True, False),
    "qwen3_vl_text": (False, True),
}


def _rope_axes(rope: Mapping[str, Any], head_dim: int) -> tuple[int, ...] | None:
    """Which axis each wavelength counts along: in three blocks (Qwen2-VL), or interleaved (Qwen3-VL)."""
    sections = rope.get("mrope_section")
    if sections is None:
        return None
    if sum(sections) != head_dim // 2:
        raise UserError(f"text_config: mrope_section {sections} does not add up to {head_dim // 2}")
    if not rope.get("mrope_interleaved"):
        return tuple(axis for axis, size in enumerate(sections) for _ in range(size))
    axes = [0] * (head_dim // 2)
    for axis in (1, 2):
        for i in range(axis, 3 * sections[axis], 3):
            axes[i] = axis
    return tuple(axes)
