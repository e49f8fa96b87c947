"""Tiny random Hugging Face checkpoints on disk, and the PyTorch models they came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sav_jax.models.processor import quiet_transformers

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TILE = 30  # with patches of 4: seven to a side and two pixels more, as SigLIP's 384 = 27 * 14 + 6
PINPOINTS = [[TILE * rows, TILE * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]


@dataclass(frozen=True)
class Reference:
    """A checkpoint directory and its PyTorch model."""

    directory: Path
    model: Any
    image_processor: Any
    tokenizer: Any

    def inputs(self, text: str, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        """What transformers' combined processor would give (it cannot be built here): expansion by its own method."""
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

    def run(self, inputs: dict[str, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """Heads ``[L, N, H]`` at the last token (the input of every o_proj) and its logits ``[V]``."""
        layers = self.model.model.language_model.layers
        config = self.model.config.text_config
        captured: list[torch.Tensor] = []
        hooks = [
            layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: captured.append(args[0][0, -1].clone()))
            for layer in layers
        ]
        with torch.no_grad():
            logits = self.model(**inputs).logits[0, -1]
        for hook in hooks:
            hook.remove()
        heads = torch.stack(captured).reshape(len(layers), config.num_attention_heads, -1)
        return heads.numpy(), logits.numpy()


def build_reference(directory: Path, *, tie: bool = False, seed: int = 0, **overrides: Any) -> Reference:
    """A LLaVA-OneVision of a few thousand weights, scaled up so that every value is of order one, saved as
    transformers does.
    """
    with quiet_transformers():
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import (
            LlavaOnevisionConfig,
            LlavaOnevisionForConditionalGeneration,
            PreTrainedTokenizerFast,
            Qwen2Config,
            SiglipVisionConfig,
        )
        from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
            LlavaOnevisionImageProcessorPil,
        )

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<image>", "<video>"]})
    tokenizer.chat_template = TEMPLATE
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=TILE,
            patch_size=4,
            vision_use_head=False,
        ),
        text_config=Qwen2Config(
            hidden_size=40,  # not heads * head_dim of the vision tower, nor of the decoder
            intermediate_size=72,
            num_hidden_layers=4,
            num_attention_heads=10,
            num_key_value_heads=2,
            vocab_size=len(tokenizer) + 3,
            rope_theta=5e4,
            rms_norm_eps=1e-5,
            max_position_embeddings=4096,
            tie_word_embeddings=tie,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_4",
        tie_word_embeddings=tie,
        **overrides,
    )
    torch.manual_seed(seed)
    model = LlavaOnevisionForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                fan_in = parameter[0].numel() if "embed" not in name or "patch" in name else 1
                parameter.normal_(std=1.5 * fan_in**-0.5)
            elif "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.3)
    image_processor = LlavaOnevisionImageProcessorPil(
        size={"height": TILE, "width": TILE},
        image_grid_pinpoints=PINPOINTS,
        image_mean=[0.4, 0.5, 0.6],
        image_std=[0.3, 0.25, 0.2],
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    image_processor.save_pretrained(directory)
    return Reference(directory, model, image_processor, tokenizer)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth random colours: not so noisy that resizing decides everything."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
