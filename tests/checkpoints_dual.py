"""Tiny random checkpoints of CLIP and SigLIP, and the PyTorch models they came from."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import byte_tokenizer, picture, scale_weights
from checkpoints_llava import PIXELS, TILE, VISION
from PIL import Image

from sav_jax.models.quiet import quiet_transformers

TEXT = {"hidden_size": 20, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 5}
LENGTH = 16

SIZES = [(30, 30), (30, 90), (11, 400), (91, 33), (37, 53), (300, 260), (13, 11)]
TEXTS = [
    "a cat",
    "A photo of a dog!",
    "x",
    "",
    "much longer than the sixteen tokens that any text can have",
    " Über-large\t(red)  DOG's <house> ",
]


def images() -> list[Image.Image]:
    """Pictures of all shapes, a grey and a transparent one."""
    rgb = [picture(height, width, seed) for seed, (height, width) in enumerate(SIZES)]
    return [*rgb, rgb[0].convert("L"), rgb[1].convert("RGBA")]


@dataclass(frozen=True)
class DualReference:
    """A checkpoint directory and its PyTorch model."""

    directory: Path
    model: Any
    image_processor: Any
    tokenizer: Any

    def run(self, images: list[Image.Image], texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Unit image and text embeddings, and the logits per image."""
        tokens = self.tokenizer(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
        if self.model.config.model_type == "siglip":
            tokens.pop("attention_mask")  # real SigLIP tokenizers give none: padding was seen in training
        with torch.no_grad():
            output = self.model(**tokens, **self.image_processor(images, return_tensors="pt"))
        return output.image_embeds.numpy(), output.text_embeds.numpy(), output.logits_per_image.numpy()


def build_clip(directory: Path, *, seed: int = 0, legacy_eos: bool = False) -> DualReference:
    """A CLIP of a few thousand weights.

    Args:
        directory: where it is saved.
        seed: of its weights.
        legacy_eos: its config names the wrong end of text, as OpenAI's do.
    """
    with quiet_transformers():
        from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    symbols = sorted(byte_tokenizer([], eos="<|endoftext|>", pad="<|endoftext|>").get_vocab())
    symbols = [symbol for symbol in symbols if not symbol.startswith("<|")]
    vocabulary = [*symbols, *(f"{symbol}</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={symbol: i for i, symbol in enumerate(vocabulary)}, merges=[])
    text = {
        **TEXT,
        "vocab_size": len(vocabulary),
        "max_position_embeddings": LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": 2 if legacy_eos else tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = CLIPModel(CLIPConfig(vision_config=VISION, text_config=text, projection_dim=12))
    crop = {"size": {"shortest_edge": TILE}, "crop_size": {"height": TILE, "width": TILE}}
    return _save(directory, model, CLIPImageProcessorPil(**crop, **PIXELS), tokenizer, seed)


def build_siglip(directory: Path, *, seed: int = 0) -> DualReference:
    """A SigLIP of a few thousand weights, whose tokenizer is a sentencepiece model trained here; see
    :func:`build_clip`.
    """
    with quiet_transformers():
        from sentencepiece import SentencePieceTrainer
        from transformers import SiglipTokenizer

    SentencePieceTrainer.train(
        sentence_iterator=iter([text.lower() for text in TEXTS] * 20),
        model_prefix=str(directory / "spiece"),
        vocab_size=40,
        eos_id=1,  # as released: no padding and no first token
        unk_id=2,
        bos_id=-1,
        pad_id=-1,
        minloglevel=2,
    )
    (directory / "spiece.vocab").unlink()
    tokenizer = SiglipTokenizer(str(directory / "spiece.model"), model_max_length=LENGTH)
    return _save_siglip(directory, tokenizer, seed)


def build_siglip2(directory: Path, *, seed: int = 0) -> DualReference:
    """A fixed-resolution SigLIP 2, the same model with Gemma's tokenizer: bytes, and a merge; see :func:`build_clip`.

    Its files call the tokenizer ``GemmaTokenizer``, as the hub's do, which would keep capitals.
    """
    with quiet_transformers():
        from transformers import GemmaTokenizer, Siglip2Tokenizer

    symbols = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    symbols += ["▁", *string.ascii_letters, "▁a"]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    options = {"add_bos_token": False, "add_eos_token": True, "padding_side": "right", "model_max_length": LENGTH}
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=[("▁", "a")], **options)
    reference = _save_siglip(directory, tokenizer, seed)
    return replace(reference, tokenizer=Siglip2Tokenizer.from_pretrained(directory))


def _save_siglip(directory: Path, tokenizer: Any, seed: int) -> DualReference:
    with quiet_transformers():
        from transformers import SiglipConfig, SiglipModel
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    text = {
        **TEXT,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": LENGTH,
        "projection_size": VISION["hidden_size"],
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    model = SiglipModel(SiglipConfig(vision_config=VISION, text_config=text))
    image_processor = SiglipImageProcessorPil(size={"height": TILE, "width": TILE}, **PIXELS)
    return _save(directory, model, image_processor, tokenizer, seed)


BUILDERS: dict[str, Callable[..., DualReference]] = {
    "clip": build_clip,
    "clip, legacy end of text": partial(build_clip, legacy_eos=True),
    "siglip": build_siglip,
    "siglip 2, fixed resolution": build_siglip2,
}


def _save(directory: Path, model: Any, image_processor: Any, tokenizer: Any, seed: int) -> DualReference:
    scale_weights(model, seed)
    with torch.no_grad():
        model.logit_scale.fill_(np.log(20.0))
        if hasattr(model, "logit_bias"):
            model.logit_bias.fill_(-3.0)
    for part in (model, image_processor, tokenizer):
        part.save_pretrained(directory)
    return DualReference(directory, model, image_processor, tokenizer)
