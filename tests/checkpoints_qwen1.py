"""Tiny first-generation Qwen-VL checkpoints, rebuilt from nothing: the published code cannot run here, so what it gave
on these very weights is kept in ``data/qwen1_vl`` (see the README there).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file

import sav_jax

DATA = Path(__file__).parent / "data" / "qwen1_vl"
OUTPUTS = load_file(DATA / "outputs.safetensors")
QUESTIONS = json.loads((DATA / "questions.json").read_text())
PROMPTS: dict[str, dict[str, Any]] = QUESTIONS["prompts"]
"""``config/what it is`` -> question, images, and whether it is put to a chat model."""

IMAGE_START = 256 + 512 + 3 + 205 + 6  # bytes, merges, three special tokens, the extra ones, and <ref> to </quad>

_VISUAL = {
    "heads": 4,
    "image_size": 64,
    "image_start_id": IMAGE_START,
    "layers": 2,
    "mlp_ratio": 1.9375,
    "output_dim": 256,
    "patch_size": 2,
    "width": 64,
}
_CONFIG = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "fp32": True,
    "hidden_size": 256,
    "intermediate_size": 176,
    "kv_channels": 32,
    "layer_norm_epsilon": 1e-6,
    "no_bias": True,
    "num_attention_heads": 8,
    "num_hidden_layers": 3,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "seq_length": 2048,
    "tie_word_embeddings": False,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "visual": _VISUAL,
    "vocab_size": 1024,
}

CONFIGS: dict[str, dict[str, Any]] = {
    # As released: both options are on, and nothing reaches the length they act from. Patches are 32 to a side, learnt
    # positions 16, as at 448 pixels.
    "released": _CONFIG,
    "long": {**_CONFIG, "seq_length": 96},
    "long, log-n only": {**_CONFIG, "seq_length": 96, "use_dynamic_ntk": False},
    "long, NTK only": {**_CONFIG, "seq_length": 96, "use_logn_attn": False, "rotary_emb_base": 500},
    # No projection before the resampler; its positions are interpolated, the tower's are not.
    "as many patches as positions": {
        **_CONFIG,
        "visual": {**_VISUAL, "patch_size": 4, "width": 256, "layers": 1, "n_queries": 64},
    },
    # 10 patches to a side and two pixels more.
    "fewer patches than positions": {**_CONFIG, "visual": {**_VISUAL, "patch_size": 4, "image_size": 42, "heads": 2}},
}


REAL: dict[str, Any] = {  # config.json of Qwen/Qwen-VL-Chat, as far as it is about sizes
    "model_type": "qwen",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "kv_channels": 128,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "seq_length": 2048,
    "visual": {
        "heads": 16,
        "image_size": 448,
        "image_start_id": 151857,
        "layers": 48,
        "mlp_ratio": 4.9231,
        "output_dim": 4096,
        "patch_size": 14,
        "width": 1664,
    },
}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every key of the hub's layout and its shape."""
    c, v = config, config["visual"]
    width, inner = c["hidden_size"], c["intermediate_size"] // 2
    found: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (c["vocab_size"], width),
        "transformer.ln_f.weight": (width,),
        "lm_head.weight": (c["vocab_size"], width),
    }
    for i in range(c["num_hidden_layers"]):
        h = f"transformer.h.{i}"
        found |= {
            f"{h}.ln_1.weight": (width,),
            f"{h}.ln_2.weight": (width,),
            f"{h}.attn.c_attn.weight": (3 * width, width),
            f"{h}.attn.c_attn.bias": (3 * width,),
            f"{h}.attn.c_proj.weight": (width, width),
            f"{h}.mlp.w1.weight": (inner, width),
            f"{h}.mlp.w2.weight": (inner, width),
            f"{h}.mlp.c_proj.weight": (width, inner),
        }
    tower, inner = v["width"], int(v["width"] * v["mlp_ratio"])

    def linear(name: str, rows: int, columns: int) -> None:
        found[f"transformer.visual.{name}.weight"] = rows, columns
        found[f"transformer.visual.{name}.bias"] = (rows,)

    def norm(name: str, size: int) -> None:
        found[f"transformer.visual.{name}.weight"] = (size,)
        found[f"transformer.visual.{name}.bias"] = (size,)

    found["transformer.visual.conv1.weight"] = tower, 3, v["patch_size"], v["patch_size"]
    found["transformer.visual.positional_embedding"] = 256, tower
    norm("ln_pre", tower)
    for i in range(v["layers"]):
        block = f"transformer.resblocks.{i}"
        norm(f"{block}.ln_1", tower)
        norm(f"{block}.ln_2", tower)
        linear(f"{block}.attn.in_proj", 3 * tower, tower)
        linear(f"{block}.attn.out_proj", tower, tower)
        linear(f"{block}.mlp.c_fc", inner, tower)
        linear(f"{block}.mlp.c_proj", tower, inner)
    queries = v.get("n_queries", 256)
    pool = "transformer.visual.attn_pool"
    found |= {f"{pool}.query": (queries, width), f"{pool}.pos_embed": (queries, width)}
    if tower != width:
        found[f"{pool}.kv_proj.weight"] = width, tower
    found |= {f"{pool}.attn.in_proj_weight": (3 * width, width), f"{pool}.attn.in_proj_bias": (3 * width,)}
    linear("attn_pool.attn.out_proj", width, width)
    norm("attn_pool.ln_q", width)
    norm("attn_pool.ln_kv", width)
    norm("ln_post", width)
    found["transformer.visual.proj"] = width, width
    return found


def weight(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform float32 weights of a size that keeps every value of the forward pass of order one; the same on every
    machine, now and later: raw bits of a counter-based generator, and arithmetic that is exact.
    """
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "big")
    bits = np.random.Philox(key=seed).random_raw(int(np.prod(shape))) >> np.uint64(40)
    values = bits.astype(np.float32).reshape(shape) / np.float32(2**23) - np.float32(1)  # in [-1, 1)
    name = key.removesuffix(".weight")
    if len(shape) == 1:
        is_norm = name.rsplit(".", 1)[-1].startswith("ln_") and key.endswith(".weight")
        return np.float32(1) + values / np.float32(2) if is_norm else values / np.float32(2)
    table = name.endswith(("wte", "positional_embedding", "pos_embed", "query"))
    fan_in = 1 if table else int(np.prod(shape[1:]))
    return values * np.float32(2.5 * fan_in**-0.5)


def build(directory: Path, config: dict[str, Any], chat: bool) -> Path:
    """A checkpoint as the hub has them, in safetensors.

    Args:
        directory: where it is written; made if missing.
        config: its ``config.json``.
        chat: what it says of itself: a chat model, or a base model.
    """
    directory.mkdir(parents=True, exist_ok=True)
    save_file({key: weight(key, shape) for key, shape in shapes(config).items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    generation = {"chat_format": "chatml" if chat else "raw", "eos_token_id": 256 + 512}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "QWenTokenizer"}))
    shutil.copy(DATA / "qwen.tiktoken", directory)
    return directory


def prompts_of(config: str) -> list[str]:
    """The names of the prompts that were recorded with a config."""
    return [key for key in PROMPTS if key.split("/")[0] == config]


def is_chat(config: str) -> bool:
    """Whether a config was recorded as a chat model."""
    return PROMPTS[prompts_of(config)[0]]["chat"]


def example_of(prompt: str) -> sav_jax.Example:
    images = tuple(Image.fromarray(OUTPUTS[f"image/{name}"]) for name in PROMPTS[prompt]["images"])
    return sav_jax.Example(PROMPTS[prompt]["question"], images)
