"""Tiny random Qwen-VL checkpoints on disk, and the PyTorch models they came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from checkpoints import Reference, byte_tokenizer, scale_weights
from PIL import Image

from sav_jax.models.quiet import quiet_transformers

TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
PATCH = 4  # pixels; a visual token is 2 x 2 patches
MIN_TOKENS, MAX_TOKENS = 6, 200
# Bounds for videos, in visual tokens: of one frame, or (Qwen3-VL) of all of them.
VIDEO_TOKENS = {"qwen2_vl": (4, 40), "qwen2_5_vl": (4, 40), "qwen3_vl": (16, 200)}
VIDEO_PIXELS = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.25, 0.2, 0.3]}


class QwenReference(Reference):
    """A checkpoint directory of the family and its PyTorch model."""

    def inputs(self, text: str, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        """What transformers' combined processor would give (it cannot be built here): expansion by its own method."""
        values = self.image_processor(images, return_tensors="pt") if images else {}
        shell = self._processor_class().__new__(self._processor_class())
        shell.image_processor, shell.image_token = self.image_processor, "<|image_pad|>"
        parts = text.split("<|image_pad|>")
        expanded = parts[0]
        for i, part in enumerate(parts[1:]):
            expanded += shell.replace_image_token(values, i) + part
        ids = torch.tensor([self.tokenizer(expanded, add_special_tokens=False)["input_ids"]])
        types = (ids == self.model.config.image_token_id).int()
        return {"input_ids": ids, "mm_token_type_ids": types, **values}

    def _processor_class(self) -> Any:
        from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
        from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
        from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

        classes = {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor, "qwen3_vl": Qwen3VLProcessor}
        return classes[self.model.config.model_type]


def build_qwen2_vl(directory: Path, *, seed: int = 0, tie: bool = False, **overrides: Any) -> Reference:
    """A Qwen2-VL of a few thousand weights, scaled up so that every value is of order one, saved as transformers does.

    Args:
        directory: where it is saved.
        seed: of its weights.
        tie: tied embeddings.
        overrides: of the vision config.
    """
    with quiet_transformers():
        from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {"depth": 3, "embed_dim": 24, "num_heads": 3, "mlp_ratio": 2, "hidden_size": 72}
    text = {"hidden_size": 72, "rope_parameters": _rope([1, 2, 3])}
    return _build(directory, (Qwen2VLConfig, Qwen2VLForConditionalGeneration), vision | overrides, text, tie, seed)


def build_qwen2_5_vl(directory: Path, *, seed: int = 0, tie: bool = False, **overrides: Any) -> Reference:
    """A Qwen2.5-VL with windows of 3 x 3 visual tokens; see :func:`build_qwen2_vl`."""
    with quiet_transformers():
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        "depth": 4,
        "hidden_size": 24,
        "num_heads": 3,
        "intermediate_size": 44,
        "out_hidden_size": 72,
        "window_size": 3 * 2 * PATCH + 1,  # the rest is cut off
        "fullatt_block_indexes": [1, 3],
    }
    text = {"hidden_size": 72, "rope_parameters": _rope([1, 2, 3])}
    classes = Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    return _build(directory, classes, vision | overrides, text, tie, seed)


def build_qwen3_vl(directory: Path, *, seed: int = 0, tie: bool = False, **overrides: Any) -> Reference:
    """A Qwen3-VL whose heads together are wider than the decoder; see :func:`build_qwen2_vl`."""
    with quiet_transformers():
        from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = {
        "depth": 4,
        "hidden_size": 24,
        "num_heads": 3,
        "intermediate_size": 44,
        "out_hidden_size": 40,
        "num_position_embeddings": 49,
        "deepstack_visual_indexes": [0, 2],
    }
    rope = _rope([4, 2, 2], mrope_interleaved=True)
    text = {"hidden_size": 40, "head_dim": 16, "rope_parameters": rope}
    return _build(directory, (Qwen3VLConfig, Qwen3VLForConditionalGeneration), vision | overrides, text, tie, seed)


def _build(
    directory: Path, classes: tuple[Any, Any], vision: dict[str, Any], text: dict[str, Any], tie: bool, seed: int
) -> Reference:
    """A checkpoint of a (config, model) class: what the families have in common, and these fields of their parts."""
    tokenizer = byte_tokenizer(SPECIAL, eos="<|im_end|>", pad="<|endoftext|>")
    tokenizer.chat_template = TEMPLATE
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": "<|vision_start|>"}
    names["vision_end"] = "<|vision_end|>"
    decoder = {
        "intermediate_size": 60,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer) + 3,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = classes[0](
        **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in names.items()},
        tie_word_embeddings=tie,
        vision_config={"patch_size": PATCH, "temporal_patch_size": 2, "spatial_merge_size": 2, **vision},
        text_config={**decoder, **text},
    )
    return _save(directory, classes[1], config, tokenizer, seed)


def _rope(sections: list[int], **options: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 5e4, "mrope_section": sections, **options}


def _save(directory: Path, model_class: Any, config: Any, tokenizer: Any, seed: int) -> Reference:
    with quiet_transformers():
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model = scale_weights(model_class(config), seed)
    token = (2 * PATCH) ** 2
    image_processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": MIN_TOKENS * token, "longest_edge": MAX_TOKENS * token},
        patch_size=PATCH,
        image_mean=[0.4, 0.5, 0.6],
        image_std=[0.3, 0.25, 0.2],
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    image_processor.save_pretrained(directory)
    least, most = (tokens * token for tokens in VIDEO_TOKENS[config.model_type])
    video = {"size": {"shortest_edge": least, "longest_edge": most}, **VIDEO_PIXELS}
    (directory / "video_preprocessor_config.json").write_text(json.dumps(video))
    return QwenReference(directory, model, image_processor, tokenizer)
