"""Text and images -> :class:`Prompt`: tokenizer, chat template, placeholder expansion and PIL image processors, all
without torch.

transformers' combined LLaVA-OneVision processor cannot be built without torchvision; this thin one gives the same input
ids and pixels.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sav_jax.errors import UserError
from sav_jax.models.anyres import plan_image
from sav_jax.models.llava_onevision import LlavaOnevisionConfig
from sav_jax.models.registry import architecture, read_config

IMAGE_MARK = "<image>"
"""Stands in a question where an image belongs."""


@dataclass(frozen=True)
class Prompt:
    """One prompt, planned from its text and the sizes of its images; pixels come later.

    Attributes:
        token_ids: int32 ``[T]``.
        num_tiles: P, tiles of all its images.
        visual_index, visual_weight: ``[T, S]``, see :class:`sav_jax.models.batch.Batch`.
    """

    token_ids: np.ndarray
    num_tiles: int
    visual_index: np.ndarray
    visual_weight: np.ndarray

    def extended(self, token_ids: Sequence[int]) -> Prompt:
        """The prompt followed by more text tokens."""
        extra = np.asarray(token_ids, np.int32)
        pad = ((0, len(extra)), (0, 0))
        return Prompt(
            np.concatenate([self.token_ids, extra]),
            self.num_tiles,
            np.pad(self.visual_index, pad, constant_values=-1),
            np.pad(self.visual_weight, pad),
        )


class LlavaOnevisionProcessor:
    """Prompts for LLaVA-OneVision.

    Attributes:
        tokenizer: transformers' fast tokenizer.
        digest: sha256 over everything that decides what pixels and tokens the model sees.
    """

    def __init__(self, config: LlavaOnevisionConfig, tokenizer: Any, image_processor: Any, chat_template: str):
        self.config = config
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self._image_processor = image_processor
        settings = {
            k: v for k, v in image_processor.to_dict().items() if isinstance(v, (int, float, str, bool, list, dict))
        }
        text = json.dumps(
            [chat_template, settings, config.image_grid_pinpoints, config.max_tiles], sort_keys=True, default=str
        )
        self.digest = hashlib.sha256(text.encode()).hexdigest()

    def text(self, question: str, num_images: int) -> str:
        """The prompt as the model reads it: chat template with generation prompt, one image token per image.

        ``<image>`` marks in the question say where its images belong; without marks the images come first.
        """
        marks = question.count(IMAGE_MARK)
        if marks not in (0, num_images):
            raise UserError(f"question has {marks} {IMAGE_MARK} marks for {num_images} images: {question!r}")
        content = [] if marks else [{"type": "image"}] * num_images
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, add_generation_prompt=True, tokenize=False
        )

    def plan(self, question: str, image_sizes: Sequence[tuple[int, int]]) -> Prompt:
        """Tokens and visual plan of a prompt, from the (height, width) of its images alone."""
        ids = self.tokenizer(self.text(question, len(image_sizes)), add_special_tokens=False)["input_ids"]
        return self.expand(ids, image_sizes)

    def expand(self, token_ids: Sequence[int], image_sizes: Sequence[tuple[int, int]]) -> Prompt:
        """Widen each image token of ``token_ids`` to the visual tokens of its image."""
        c = self.config
        plans = []
        num_tiles = 0
        for size in image_sizes:
            plans.append(
                plan_image(
                    size,
                    first_tile=num_tiles,
                    tile_size=c.vision.image_size,
                    patches_per_side=c.vision.patches_per_side,
                    pinpoints=c.image_grid_pinpoints,
                    max_tiles=c.max_tiles,
                    base_only=len(image_sizes) > 1,
                )
            )
            num_tiles += plans[-1].num_tiles
        ids = np.asarray(token_ids, np.int32)
        places = np.flatnonzero(ids == c.image_token_id)
        if len(places) != len(plans):
            raise UserError(
                f"the prompt has {len(places)} image tokens for {len(plans)} images; "
                f"does its text contain {IMAGE_MARK!r}?"
            )
        taps = max((plan.index.shape[1] for plan in plans), default=1)
        pieces: list[tuple[np.ndarray, ...]] = []
        start = 0
        for place, plan in zip(places.tolist(), plans, strict=True):
            pieces.append(_text_piece(ids[start:place], taps))
            short = ((0, 0), (0, taps - plan.index.shape[1]))
            token = np.full(len(plan.index), c.image_token_id, np.int32)
            pieces.append((token, np.pad(plan.index, short), np.pad(plan.weight, short)))
            start = place + 1
        pieces.append(_text_piece(ids[start:], taps))
        expanded, index, weight = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
        return Prompt(expanded, num_tiles, index, weight)

    def tiles(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Normalised pixels of a prompt's tiles, float32 ``[P, height, width, 3]``."""
        size = self.config.vision.image_size
        if not images:
            return np.zeros((0, size, size, 3), np.float32)
        # Nested: images of one prompt are told from images of several, which decides on base view or anyres.
        values = self._image_processor([list(images)], return_tensors=None, do_pad=False)["pixel_values"]
        return np.ascontiguousarray(np.concatenate(values).transpose(0, 2, 3, 1), np.float32)

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, no special tokens added."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def _text_piece(ids: np.ndarray, taps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    shape = (len(ids), taps)
    return ids, np.full(shape, -1, np.int32), np.zeros(shape, np.float32)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers advises on stderr to install torch and torchvision while processors are imported; users need
    neither.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def load_processor(directory: str | Path, config: Mapping[str, Any] | None = None) -> LlavaOnevisionProcessor:
    """The processor of a checkpoint directory.

    Args:
        directory: holds the tokenizer, a chat template and ``preprocessor_config.json``.
        config: its raw ``config.json``, read if not given.

    Raises:
        UserError: a file is missing or unreadable.
    """
    directory = Path(directory)
    parsed = architecture(read_config(directory) if config is None else config).config
    with quiet_transformers():
        from transformers import AutoTokenizer
        from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
            LlavaOnevisionImageProcessorPil,
        )

        try:
            tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        except Exception as error:  # the tokenizer library raises many types
            raise UserError(f"{directory}: cannot load its tokenizer ({' '.join(str(error).split())[:200]})") from None
        try:
            image_processor = LlavaOnevisionImageProcessorPil.from_pretrained(directory)
        except Exception as error:
            raise UserError(
                f"{directory}: cannot load its image processor ({' '.join(str(error).split())[:200]})"
            ) from None
    # The grid must be the model's: the two files could disagree, and the plan is made from config.json.
    image_processor.image_grid_pinpoints = [list(p) for p in parsed.image_grid_pinpoints]
    return LlavaOnevisionProcessor(parsed, tokenizer, image_processor, _chat_template(directory, tokenizer))


def _chat_template(directory: Path, tokenizer: Any) -> str:
    """From the tokenizer, or from where processors keep it (``chat_template.jinja``, older ``chat_template.json``)."""
    jinja, older = directory / "chat_template.jinja", directory / "chat_template.json"
    if older.exists() and not jinja.exists():
        return json.loads(older.read_text())["chat_template"]
    if jinja.exists():
        return jinja.read_text()
    if isinstance(tokenizer.chat_template, str):
        return tokenizer.chat_template
    raise UserError(
        f"{directory}: no chat template (chat_template.jinja, chat_template.json or in tokenizer_config.json)"
    )
