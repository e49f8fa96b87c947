"""The ``config.json`` of LLaVA's own releases (github.com/haotian-liu/LLaVA), and of SQ-LLaVA's which follow them,
rewritten to Hugging Face's layout.

There the config is the decoder's, with fields ``mm_...`` for everything visual. The sizes of the vision tower are not
in it, and often its weights are not in the checkpoint either: both are in the repository ``mm_vision_tower`` names.
(For the names of weights see ``models/llava.py``.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sav_jax.errors import UserError
from sav_jax.models.projectors import PrototypeConfig

TOWERS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14": {"image_size": 224},
    "openai/clip-vit-large-patch14-336": {"image_size": 336},
    # The same, trained further by ShareGPT4V (arXiv 2311.12793); SQ-LLaVA's published models stand on them.
    "Lin-Chen/ShareGPT4V-7B_Pretrained_vit-large336-l12": {"image_size": 336},
    "Lin-Chen/ShareGPT4V-13B_Pretrained_vit-large336-l12": {"image_size": 336},
}
"""Vision towers by repository; what all have in common is below."""
_LARGE = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
_DECODERS = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
_FEATURES = {"patch": "default", "cls_patch": "full"}
# The sizes of SQ-LLaVA's extractor ("cluster") are in its code, not in its config.
_PROJECTORS: dict[str, dict[str, Any]] = {
    "mlp2x_gelu": {},
    "cluster": {"prototype_extractor": PrototypeConfig(256, 2, "released", "quick_gelu").to_hf()},
}


def is_release(config: Mapping[str, Any]) -> bool:
    """Whether a raw ``config.json`` is in the layout of LLaVA's releases."""
    return "mm_vision_tower" in config


def as_hugging_face(config: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """The same model in Hugging Face's layout: ``llava``, or ``llava_next`` where the release cuts images into tiles.

    Args:
        config: the raw ``config.json``.
        directory: where it is; a relative ``mm_vision_tower`` that is a folder there is read.

    Raises:
        UserError: an option that is not implemented, or a vision tower of unknown size.
    """
    file = directory / "config.json"
    _require(file, config, "model_type", tuple(_DECODERS))
    _require(file, config, "mm_projector_type", tuple(_PROJECTORS))
    _require(file, config, "mm_use_im_start_end", (False,), default=False)
    _require(file, config, "mm_vision_select_feature", tuple(_FEATURES), default="patch")
    visual = ("mm_", "image_", "tune_mm_", "freeze_mm_", "unfreeze_mm_", "use_mm_", "architectures", "model_type")
    text = {key: value for key, value in config.items() if not key.startswith(visual)}
    result: dict[str, Any] = {
        "model_type": "llava",
        "text_config": {**text, "model_type": _DECODERS[config["model_type"]]},
        "vision_config": _vision_config(file, config["mm_vision_tower"]),
        # The releases have no token for an image; Hugging Face's conversions put it behind the vocabulary.
        "image_token_index": config["vocab_size"],
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": _FEATURES[config.get("mm_vision_select_feature", "patch")],
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        **_PROJECTORS[config["mm_projector_type"]],
    }
    if config.get("image_aspect_ratio") == "anyres":
        _require(file, config, "mm_patch_merge_type", ("spatial_unpad",))
        # Theirs are (width, height).
        pinpoints = [[height, width] for width, height in config["image_grid_pinpoints"]]
        result |= {"model_type": "llava_next", "image_grid_pinpoints": pinpoints}
    return result


def _require(file: Path, config: Mapping[str, Any], key: str, known: tuple[Any, ...], default: Any = None) -> None:
    value = config.get(key, default)
    if value not in known:
        raise UserError(f"{file}: {key} {value!r} is not supported (known: {', '.join(map(str, known))})")


def _vision_config(file: Path, name: str) -> dict[str, Any]:
    if name in TOWERS:
        return {**_LARGE, **TOWERS[name]}
    local = file.parent / name / "config.json"
    if not local.exists():
        raise UserError(
            f"{file}: mm_vision_tower {name!r} is neither a folder with a config.json nor one of: {', '.join(TOWERS)}"
        )
    config = json.loads(local.read_text())
    return {"model_type": "clip_vision_model", **config.get("vision_config", config)}
