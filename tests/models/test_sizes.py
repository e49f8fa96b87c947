"""The checkpoints people use, at their real sizes: parameters counted by shape alone, none is made.

Each count is compared with transformers' own class (but for the first Qwen-VL, which it has not), and with the number
the checkpoint is published with. ``SAFETENSORS`` numbers are exact: what the hub states for a checkpoint's safetensors
(``total_size`` of its index, or the number of parameters), looked up where public repositories quote it. ``ROUNDED``
are the billions or millions that the hub's model pages show, from memory: for these no exact number was found. Configs
say what differs from the defaults, as the hub's do.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoints_qwen1 as qwen1
import jax
import pytest
import torch

from sav_jax.dual_encoder import FAMILIES as DUAL_FAMILIES
from sav_jax.dual_encoder import dual_encoder_config, init_params
from sav_jax.models.dual_encoder import TwoTowers
from sav_jax.models.multimodal import init_params as init_lmm
from sav_jax.models.registry import FAMILIES, architecture, read_config

CLIP_336 = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
VICUNA_7B = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}
VICUNA_13B = {
    **VICUNA_7B,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 40,
}
MISTRAL_7B = {
    "model_type": "mistral",
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "vocab_size": 32064,
}


def llava(model_type: str, text: dict[str, Any]) -> dict[str, Any]:
    return {"model_type": model_type, "text_config": text, "vision_config": CLIP_336, "image_token_index": 32000}


def decoder(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
    }


def onevision(tie: bool, *sizes: int) -> dict[str, Any]:
    """Vocabularies by transformers' conversion script: that of Qwen2, and two, up to a multiple of 64."""
    vision = {
        "hidden_size": 1152,
        "image_size": 384,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 26,
        "patch_size": 14,
        "vision_use_head": False,
    }
    return {
        "model_type": "llava_onevision",
        "image_grid_pinpoints": [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)],
        "image_token_index": 151646,
        "vision_config": vision,
        "text_config": {
            **decoder(*sizes),
            "model_type": "qwen2",
            "rope_theta": 1e6,
            "tie_word_embeddings": tie,
            "sliding_window": 131072,
        },
        "tie_word_embeddings": tie,
    }


def qwen2(tie: bool, *sizes: int, **vision: Any) -> dict[str, Any]:
    """The flat ``config.json`` of the hub's Qwen2-VL and Qwen2.5-VL."""
    own = {"embed_dim": 1280, "mlp_ratio": 4, "hidden_size": sizes[0]}
    if vision:
        own = {"hidden_size": 1280, "out_hidden_size": sizes[0], **vision}
    shared = {"depth": 32, "num_heads": 16, "in_chans": 3, "patch_size": 14, "spatial_patch_size": 14}
    return {
        **decoder(*sizes),
        "model_type": "qwen2_5_vl" if vision else "qwen2_vl",
        "tie_word_embeddings": tie,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "sliding_window": 32768,
        "use_sliding_window": False,
        "vision_config": {**shared, **own, "spatial_merge_size": 2, "temporal_patch_size": 2},
    }


def qwen2_5(tie: bool, *sizes: int, inner: int = 3420) -> dict[str, Any]:
    windows = {"window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2}
    return qwen2(tie, *sizes, hidden_act="silu", intermediate_size=inner, **windows)


def qwen3(tie: bool, tower: tuple[Any, ...], *sizes: int) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]}
    text = {"model_type": "qwen3_vl_text", "head_dim": 128, "rope_theta": 5e6, "rope_scaling": rope}
    names = ("depth", "hidden_size", "intermediate_size", "deepstack_visual_indexes")
    return {
        "model_type": "qwen3_vl",
        "tie_word_embeddings": tie,
        "text_config": {**decoder(*sizes), **text},
        "vision_config": {
            **dict(zip(names, tower, strict=True)),
            "model_type": "qwen3_vl",
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": sizes[0],
            "patch_size": 16,
        },
    }


SMALL, LARGE = (24, 1024, 4096, [5, 11, 17]), (27, 1152, 4304, [8, 16, 24])

TEXT_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
VISION_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
}
SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27}


def clip_l(**vision: Any) -> dict[str, Any]:
    towers = {"text_config": TEXT_L, "vision_config": {**VISION_L, **vision}}
    return {"model_type": "clip", "projection_dim": 768, **towers}


def siglip_so400m(image_size: int, **text: Any) -> dict[str, Any]:
    vision = {**SO400M, "image_size": image_size, "patch_size": 14}
    return {"model_type": "siglip", "vision_config": vision, "text_config": {**SO400M, **text}}


@dataclass(frozen=True)
class Published:
    """A checkpoint's config, its number of parameters, and how far that is known."""

    config: dict[str, Any]
    parameters: float
    digits: int | None = None

    def agrees(self, count: int) -> bool:
        if self.digits is None:
            return count == self.parameters
        return round(count, self.digits - 1 - math.floor(math.log10(count))) == self.parameters


SAFETENSORS: dict[str, Published] = {
    "llava-hf/llava-1.5-7b-hf": Published(llava("llava", VICUNA_7B), 7_063_427_072),
    "Qwen/Qwen2-VL-2B-Instruct": Published(qwen2(True, 1536, 8960, 28, 12, 2, 151936), 2_208_985_600),
    "Qwen/Qwen2-VL-7B-Instruct": Published(qwen2(False, 3584, 18944, 28, 28, 4, 152064), 8_291_375_616),
    "Qwen/Qwen2-VL-72B-Instruct": Published(qwen2(False, 8192, 29568, 80, 64, 8, 152064), 73_405_560_320),
    "Qwen/Qwen2.5-VL-3B-Instruct": Published(qwen2_5(True, 2048, 11008, 36, 16, 2, 151936), 3_754_622_976),
    "Qwen/Qwen2.5-VL-7B-Instruct": Published(qwen2_5(False, 3584, 18944, 28, 28, 4, 152064), 8_292_166_656),
    "Qwen/Qwen3-VL-2B-Instruct": Published(qwen3(True, SMALL, 2048, 6144, 28, 16, 8, 151936), 2_127_532_032),
    "Qwen/Qwen3-VL-4B-Instruct": Published(qwen3(True, SMALL, 2560, 9728, 36, 32, 8, 151936), 4_437_815_808),
    "Qwen/Qwen3-VL-8B-Instruct": Published(qwen3(False, LARGE, 4096, 12288, 36, 32, 8, 151936), 8_767_123_696),
    # Not safetensors, but its weights as counted in public; its parts are in test_qwen1_vl.py.
    "Qwen/Qwen-VL-Chat": Published(qwen1.REAL, 9_656_935_168),
    "openai/clip-vit-base-patch32": Published({"model_type": "clip"}, 151_277_313),
    "openai/clip-vit-base-patch16": Published({"model_type": "clip", "vision_config": {"patch_size": 16}}, 149_620_737),
    "openai/clip-vit-large-patch14": Published(clip_l(), 427_616_513),
    "openai/clip-vit-large-patch14-336": Published(clip_l(image_size=336), 427_944_193),
    "google/siglip-base-patch16-224": Published({"model_type": "siglip"}, 203_155_970),
    # Its texts are of 16 tokens.
    "google/siglip-so400m-patch14-224": Published(siglip_so400m(224, max_position_embeddings=16), 877_360_306),
    "google/siglip-so400m-patch14-384": Published(siglip_so400m(384), 877_960_498),
    # The text towers of SigLIP 2 have the vocabulary of Gemma.
    "google/siglip2-base-patch16-224": Published(
        {"model_type": "siglip", "text_config": {"vocab_size": 256_000}}, 375_187_970
    ),
    "google/siglip2-so400m-patch14-384": Published(siglip_so400m(384, vocab_size=256_000), 1_136_008_498),
}
ROUNDED: dict[str, Published] = {
    "llava-hf/llava-1.5-13b-hf": Published(llava("llava", VICUNA_13B), 13.4e9, 3),
    "llava-hf/llava-v1.6-vicuna-7b-hf": Published(llava("llava_next", VICUNA_7B), 7.06e9, 3),
    "llava-hf/llava-v1.6-mistral-7b-hf": Published(llava("llava_next", MISTRAL_7B), 7.57e9, 3),
    "llava-hf/llava-v1.6-vicuna-13b-hf": Published(llava("llava_next", VICUNA_13B), 13.4e9, 3),
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": Published(onevision(True, 896, 4864, 24, 14, 2, 152000), 894e6, 3),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": Published(onevision(False, 3584, 18944, 28, 28, 4, 152128), 8.03e9, 3),
    "llava-hf/llava-onevision-qwen2-72b-ov-hf": Published(onevision(False, 8192, 29568, 80, 64, 8, 152128), 73.2e9, 3),
    "Qwen/Qwen2.5-VL-72B-Instruct": Published(qwen2_5(False, 8192, 29568, 80, 64, 8, 152064, inner=3456), 73.4e9, 3),
}
REAL = SAFETENSORS | ROUNDED


def parameters(config: dict[str, Any]) -> int:
    if config["model_type"] in DUAL_FAMILIES:
        module = TwoTowers(dual_encoder_config(config))
        tree = jax.eval_shape(lambda: init_params(module, jax.random.key(0)))
    else:
        arch = architecture(config)
        tree = jax.eval_shape(lambda: init_lmm(arch.module, jax.random.key(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_every_family_is_there() -> None:
    assert {published.config["model_type"] for published in REAL.values()} == {*FAMILIES, *DUAL_FAMILIES}


@pytest.mark.parametrize("name", REAL)
def test_parameters_of_real_checkpoints(name: str) -> None:
    config = REAL[name].config
    count = parameters(config)
    assert REAL[name].agrees(count), f"{count:,}"
    if config["model_type"] == "qwen":
        return
    from transformers import CONFIG_MAPPING, AutoModel, AutoModelForImageTextToText

    fields = {key: value for key, value in config.items() if key != "model_type"}
    kind = AutoModel if config["model_type"] in DUAL_FAMILIES else AutoModelForImageTextToText
    with torch.device("meta"):
        theirs = kind.from_config(CONFIG_MAPPING[config["model_type"]](**fields))
    assert count == sum(parameter.numel() for parameter in theirs.parameters())


@pytest.mark.parametrize("name", [name for name in REAL if name.startswith("Qwen/Qwen")])
def test_heads_of_the_qwen_families(name: str) -> None:
    assert architecture(REAL[name].config).config.text.head_dim == 128


def test_a_release_of_llava_names_its_tower(tmp_path: Path) -> None:
    """The sizes of the towers LLaVA used are known; the rest of liuhaotian/llava-v1.5-7b's config as it is."""
    text = {"model_type": "llava", "hidden_size": 4096, "vocab_size": 32000, "rms_norm_eps": 1e-5}
    mm = {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_projector_type": "mlp2x_gelu"}
    (tmp_path / "config.json").write_text(json.dumps({**text, **mm, "mm_vision_select_layer": -2}))
    whole = parameters(REAL["llava-hf/llava-1.5-7b-hf"].config)
    assert parameters(read_config(tmp_path)) == whole - 2 * 64 * 4096, "without the padding of the vocabulary"


def test_interleaved_wavelengths() -> None:
    """Qwen3-VL takes the axes in turns whatever its config says about it; Qwen2-VL in blocks."""
    config = qwen3(False, LARGE, 4096, 12288, 36, 32, 8, 151936)
    axes = architecture(config).config.text.rope_axes
    assert axes[:60] == (0, 1, 2) * 20
    assert axes[60:] == (0, 0, 0, 0)
    del config["text_config"]["rope_scaling"]
    config["text_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e6}
    assert architecture(config).config.text.rope_axes == axes
    blocks = architecture(qwen2(False, 3584, 18944, 28, 28, 4, 152064)).config.text.rope_axes
    assert blocks == (0,) * 16 + (1,) * 24 + (2,) * 24
