"""Prompts of the first Qwen-VL, whose checkpoints carry neither a chat template nor a tokenizer or image processor that
transformers could load without running their code: all three are here, from what that code does.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sav_jax.errors import UserError
from sav_jax.models.anyres import VisualPlan, plan_base_view
from sav_jax.models.processor import Processor
from sav_jax.models.quiet import quiet_transformers
from sav_jax.models.qwen1_vl import Qwen1VLConfig

VOCABULARY = "qwen.tiktoken"
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_END, _TURN_START, _TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_TAGS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>")
_SPECIAL = (_END, _TURN_START, _TURN_END, *(f"<|extra_{i}|>" for i in range(205)), *_TAGS)
_MEAN, _STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]

_CONTENT = (
    "{%- set pictures = namespace(count=0) -%}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for part in message['content'] -%}{%- if part['type'] == 'image' -%}"
    "{%- set pictures.count = pictures.count + 1 -%}"
    "{{- 'Picture ' ~ pictures.count ~ ': <img><imgpad></img>\n' -}}"
    "{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}{%- endfor -%}{%- endif -%}"
)
PLAIN = "{%- for message in messages -%}" + _CONTENT + "{%- endfor -%}"
"""What base models are prompted with: ``Picture 1: <img>...</img>`` and a line break for each image, then the text."""
CHATML = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' -}}{%- endif -%}"
    "{%- for message in messages -%}{{- '<|im_start|>' ~ message['role'] ~ '\n' -}}"
    + _CONTENT
    + "{{- '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
"""The same as a turn of a conversation, as ``chat`` of the published code writes it."""


class Qwen1VLProcessor(Processor):
    """Every image at one square size, as many visual tokens each."""

    config: Qwen1VLConfig

    def __init__(self, config: Qwen1VLConfig, tokenizer: Any, image_processor: Any, chat_template: str):
        tags = tokenizer.convert_ids_to_tokens([config.image_token_id - 2 + i for i in range(3)])
        if tags != list(_TAGS[-3:]):
            raise UserError(f"config.json: visual.image_start_id is not the token of <img> in {VOCABULARY}")
        image_processor.size = config.vision.image_size
        super().__init__(config, tokenizer, image_processor, chat_template)

    @property
    def image_mark(self) -> str:
        return "<img><imgpad></img>"

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Chat models end a turn with a token that no file of theirs names; some begin the next one instead."""
        if _TURN_START not in self.chat_template:
            return ()
        return tuple(self.tokenizer.convert_tokens_to_ids([_TURN_END, _TURN_START]))

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a whole prompt; as released, a turn's content is tokenised apart from the line with its role."""
        pieces = re.split(rf"({re.escape(_TURN_START)}\w+\n)", text)
        return [token for piece in pieces if piece for token in self.encode(piece)]

    def plan_images(self, image_sizes: Sequence[tuple[int, int]]) -> list[VisualPlan]:
        tokens = self.config.vision.num_queries
        return [plan_base_view(first_tile=i, tokens=tokens, newline=False) for i in range(len(image_sizes))]

    def pixels(self, images: Sequence[Image.Image], videos: Sequence[Sequence[Image.Image]] = ()) -> np.ndarray:
        """Normalised images, float32 ``[P, height, width, 3]``; there are no videos."""
        return self.image_processor(images)


@dataclass
class SquareImages:
    """Resizes to a square whatever the aspect ratio, and normalises; the numbers are in the published code, not in a
    file.
    """

    size: int = 448

    @classmethod
    def from_pretrained(cls, directory: Path) -> SquareImages:
        """For every checkpoint the same; the size comes from its config."""
        return cls()

    def to_dict(self) -> dict[str, Any]:
        return {"size": self.size, "mean": _MEAN, "std": _STD}

    def __call__(self, images: Sequence[Image.Image]) -> np.ndarray:
        """float32 ``[P, size, size, 3]``."""
        values = np.empty((len(images), self.size, self.size, 3), np.float32)
        for i, image in enumerate(images):
            resized = image.convert("RGB").resize((self.size, self.size), Image.Resampling.BICUBIC)
            values[i] = np.asarray(resized, np.float32) / np.float32(255)
        return (values - np.array(_MEAN, np.float32)) / np.array(_STD, np.float32)


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of ``qwen.tiktoken`` as a fast tokenizer of transformers; its chat template is what
    ``generation_config.json`` says the model was trained for ("chatml", else plain text).

    Raises:
        UserError: the vocabulary is missing or unreadable.
    """
    with quiet_transformers():
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

    ranks = read_ranks(directory / VOCABULARY)
    symbols = _byte_symbols()

    def written(token: bytes) -> str:
        return "".join(symbols[byte] for byte in token)

    merges = [(written(left), written(right)) for left, right in merges_of(ranks)]
    # A piece of text that is itself a token is taken whole, as tiktoken does.
    model = models.BPE({written(token): rank for token, rank in ranks.items()}, merges, ignore_merges=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in _SPECIAL])
    file = directory / "generation_config.json"
    chat = file.exists() and json.loads(file.read_text()).get("chat_format") == "chatml"
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=_END,
        pad_token=_END,
        chat_template=CHATML if chat else PLAIN,
        clean_up_tokenization_spaces=False,
    )


def read_ranks(file: Path) -> dict[bytes, int]:
    """A vocabulary in tiktoken's format: a token in base 64 and its rank on each line.

    Raises:
        UserError: missing, or not in that format.
    """
    try:
        lines = [line.split() for line in file.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except FileNotFoundError:
        raise UserError(f"{file}: missing (the vocabulary of the first Qwen-VL)") from None
    except (OSError, ValueError, binascii.Error) as error:
        raise UserError(f"{file}: unreadable ({error})") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise UserError(f"{file}: ranks must count from 0, and every byte must be a token")
    return ranks


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs that make each token, most urgent first. tiktoken merges whatever two neighbours make the token of the
    lowest rank, so every pair counts, not only the one a token was made of in training.
    """
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        merges += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def _byte_symbols() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE (GPT-2's)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(256 + others.index(byte)) if byte in others else chr(byte) for byte in range(256)]
