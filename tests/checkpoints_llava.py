"""Tiny random checkpoints of the LLaVA families, and the PyTorch models they came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import Reference, byte_tokenizer, scale_weights
from PIL import Image

from sav_jax.models.quiet import quiet_transformers

TILE = 30  # with patches of 4: seven to a side and two pixels more, as SigLIP's 384 = 27 * 14 + 6
PINPOINTS = [[TILE * rows, TILE * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]
PIXELS = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.25, 0.2]}
VIDEO_PIXELS = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.25, 0.2, 0.3]}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": TILE,
    "patch_size": 4,
}
TEXT = {
    "hidden_size": 40,  # not heads * head_dim of the vision tower, nor of the decoder
    "intermediate_size": 72,
    "num_hidden_layers": 4,
    "num_attention_heads": 10,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
}
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% elif part['type'] == 'video' %}<video>\n"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VICUNA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
INSTRUCT = VICUNA.replace("message['role'].upper() + ': '", "'<s>[INST] '").replace("ASSISTANT:", "[/INST]")


class OneVisionReference(Reference):
    """LLaVA-OneVision, whose combined processor cannot be built here: it wants a video processor."""

    def inputs(self, text: str, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        """Expansion by transformers' own method."""
        from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

        if not images:
            return {"input_ids": torch.tensor([self.tokenizer(text, add_special_tokens=False)["input_ids"]])}
        values = self.image_processor([images], return_tensors="np")
        shell = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
        shell.image_processor, shell.image_token = self.image_processor, "<image>"
        vision = self.model.config.vision_config
        shell.num_image_tokens = (vision.image_size // vision.patch_size) ** 2
        shell.vision_feature_select_strategy = "full"
        shell.vision_aspect_ratio = self.model.config.vision_aspect_ratio
        parts = text.split("<image>")
        expanded = parts[0]
        for i, part in enumerate(parts[1:]):
            expanded += shell.replace_image_token(values, i) + part
        return {
            "input_ids": torch.tensor([self.tokenizer(expanded, add_special_tokens=False)["input_ids"]]),
            "pixel_values": torch.tensor(np.asarray(values["pixel_values"])),
            "image_sizes": torch.tensor(np.asarray(values["image_sizes"])),
            "batch_num_images": torch.tensor(np.asarray(values["batch_num_images"])),
        }

    def pixels(self, inputs: dict[str, torch.Tensor]) -> np.ndarray:
        """All tiles of a lone image, else the base views."""
        values = inputs["pixel_values"].numpy()
        return (values[0] if len(values) == 1 else values[:, 0]).transpose(0, 2, 3, 1)


class LlavaReference(Reference):
    """LLaVA-1.5 and LLaVA-NeXT: by transformers' combined processor."""

    def inputs(self, text: str, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        """What the combined processor gives, the text being written by the chat template."""
        from transformers.models.llava.processing_llava import LlavaProcessor
        from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

        config = self.model.config
        processor = {"llava": LlavaProcessor, "llava_next": LlavaNextProcessor}[config.model_type](
            self.image_processor,
            self.tokenizer,
            patch_size=config.vision_config.patch_size,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            num_additional_image_tokens=int(config.vision_config.model_type == "clip_vision_model"),
        )
        values = processor(
            images=images or None,
            text=text,
            # As its apply_chat_template decides.
            add_special_tokens=not text.startswith(self.tokenizer.bos_token),
            return_tensors="pt",
        )
        return {key: value for key, value in values.items() if key != "attention_mask"}

    def pixels(self, inputs: dict[str, torch.Tensor]) -> np.ndarray:
        """Views, or the tiles of all images without the padding to the largest count."""
        values = inputs["pixel_values"].numpy()
        if values.ndim == 5:
            real = [self._num_tiles(size) for size in inputs["image_sizes"]]
            values = np.concatenate([tiles[:count] for tiles, count in zip(values, real, strict=True)])
        return values.transpose(0, 2, 3, 1)

    def _num_tiles(self, size: torch.Tensor) -> int:
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        return image_size_to_num_patches(size, PINPOINTS, TILE)


def build_llava_onevision(directory: Path, *, seed: int = 0, tie: bool = False, **overrides: Any) -> Reference:
    """A LLaVA-OneVision of a few thousand weights, scaled up so that every value is of order one, saved as
    transformers does.

    Args:
        directory: where it is saved.
        seed: of its weights.
        tie: tied embeddings.
        overrides: of the config.
    """
    with quiet_transformers():
        from transformers import LlavaOnevisionConfig as Config
        from transformers import LlavaOnevisionForConditionalGeneration as Model
        from transformers import Qwen2Config, SiglipVisionConfig
        from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
            LlavaOnevisionImageProcessorPil as ImageProcessor,
        )

    tokenizer = byte_tokenizer(["<|im_start|>", "<image>", "<video>"], eos="<|im_end|>", pad="<|pad|>")
    tokenizer.chat_template = CHATML
    text = {**TEXT, "rope_theta": 5e4, "vocab_size": len(tokenizer) + 3, "tie_word_embeddings": tie}
    config = Config(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=Qwen2Config(**text),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_4",
        tie_word_embeddings=tie,
        **overrides,
    )
    size = {"height": TILE, "width": TILE}
    image_processor = ImageProcessor(size=size, image_grid_pinpoints=PINPOINTS, **PIXELS)
    model = scale_weights(Model(config), seed)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "video_preprocessor_config.json").write_text(json.dumps({"size": size, **VIDEO_PIXELS}))
    return _save(OneVisionReference(directory, model, image_processor, tokenizer))


def build_llava(directory: Path, *, seed: int = 0, tie: bool = False, **overrides: Any) -> Reference:
    """A LLaVA-1.5 with a CLIP tower and a Llama decoder; see :func:`build_llava_onevision`.

    Args:
        directory, seed, tie: as there.
        overrides: of the config; ``vision_config`` and ``text_config`` replace fields of theirs.
    """
    with quiet_transformers():
        from transformers import LlavaConfig, LlavaForConditionalGeneration
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = _llama_tokenizer(VICUNA)
    config = LlavaConfig(**_clip_llama(tokenizer, tie, overrides))
    image_processor = CLIPImageProcessorPil(**_crop(), **PIXELS)
    model = scale_weights(LlavaForConditionalGeneration(config), seed)
    return _save(LlavaReference(directory, model, image_processor, tokenizer))


def build_llava_next(
    directory: Path, *, seed: int = 0, tie: bool = False, mistral: bool = False, **overrides: Any
) -> Reference:
    """A LLaVA-NeXT with a CLIP tower; see :func:`build_llava`.

    Args:
        directory, seed, tie, overrides: as there.
        mistral: a Mistral decoder and its chat template, which writes the first token itself, instead of Llama.
    """
    with quiet_transformers():
        from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    tokenizer = _llama_tokenizer(INSTRUCT if mistral else VICUNA)
    if mistral:
        decoder = {"model_type": "mistral", "sliding_window": None, "head_dim": 6}
        overrides["text_config"] = {**decoder, **overrides.get("text_config", {})}
    config = LlavaNextConfig(**_clip_llama(tokenizer, tie, overrides), image_grid_pinpoints=PINPOINTS)
    image_processor = LlavaNextImageProcessorPil(**_crop(), image_grid_pinpoints=PINPOINTS, **PIXELS)
    model = scale_weights(LlavaNextForConditionalGeneration(config), seed)
    return _save(LlavaReference(directory, model, image_processor, tokenizer))


def _llama_tokenizer(chat_template: str) -> Any:
    tokenizer = byte_tokenizer(["<image>"], eos="</s>", pad="<pad>", bos="<s>")
    tokenizer.chat_template = chat_template
    return tokenizer


def _clip_llama(tokenizer: Any, tie: bool, overrides: dict[str, Any]) -> dict[str, Any]:
    """The config's fields that LLaVA-1.5 and LLaVA-NeXT have in common."""
    text = {**TEXT, "model_type": "llama", "vocab_size": len(tokenizer) + 3, "tie_word_embeddings": tie}
    return {
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "tie_word_embeddings": tie,
        **overrides,
        "vision_config": {**VISION, "model_type": "clip_vision_model", **overrides.get("vision_config", {})},
        "text_config": {**text, **overrides.get("text_config", {})},
    }


def _crop() -> dict[str, Any]:
    return {"size": {"shortest_edge": TILE}, "crop_size": {"height": TILE, "width": TILE}}


def _save(reference: Reference) -> Reference:
    for part in (reference.model, reference.tokenizer, reference.image_processor):
        part.save_pretrained(reference.directory)
    return reference
