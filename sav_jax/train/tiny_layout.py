"""How drawn images and chats become the arrays of each layout: LLaVA-OneVision's tiles, Qwen2-VL's patches.

In a bucket all prompts begin alike (the images come first and have one size), so that which visual token stands where
is the same for every row: a :class:`Plan` is made once by the checkpoint's own processor and broadcast on the device.
Only bytes of pixels and text travel.

Axes: B prompts, N images of a prompt, T tokens, S taps of a visual token (1), P rows of pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image

from sav_jax.models.batch import Array, Batch
from sav_jax.models.llava import LlavaConfig
from sav_jax.models.processor import load_processor
from sav_jax.models.qwen_vl import QwenVLConfig
from sav_jax.world.scene import SIZE


@dataclass(frozen=True)
class Plan:
    """What all prompts of a bucket have in common.

    Attributes:
        head: token ids before the first question, with image tokens widened.
        visual_index, visual_weight: ``[T, S]``, see :class:`sav_jax.models.batch.Batch`.
        positions: int32 ``[T, 3]`` or None.
        vision: the tower's plans, each ``[P, ...]``.
    """

    head: tuple[int, ...]
    visual_index: NDArray[np.int32]
    visual_weight: NDArray[np.float32]
    positions: NDArray[np.int32] | None
    vision: Mapping[str, NDArray[np.int32]] = field(default_factory=dict)


class Layout:
    """The token and pixel side of one checkpoint directory."""

    def __init__(self, directory: Path):
        self.processor = load_processor(directory)
        self._encode = self.processor.tokenizer.backend_tokenizer.encode
        self.end = int(self.processor.tokenizer.convert_tokens_to_ids("<|im_end|>"))
        self._starts: dict[int, tuple[str, str]] = {}
        _, self._after = self._frame(0)
        self._between = self._separator()

    def _frame(self, images: int) -> tuple[str, str]:
        """Text of a first turn before and after its question."""
        if images not in self._starts:
            before, after = self.processor.text("\x00", images).split("\x00")
            self._starts[images] = before, after
        return self._starts[images]

    def _separator(self) -> str:
        """What the chat template puts between the end of an answer and the next turn."""
        messages = [{"role": "assistant", "content": [{"type": "text", "text": "x"}]}]
        text = self.processor.tokenizer.apply_chat_template(
            messages, chat_template=self.processor.chat_template, tokenize=False
        )
        return str(text).rpartition("<|im_end|>")[2]

    def tokens(self, text: str) -> tuple[int, ...]:
        """Token ids of text, special tokens written in it read as such."""
        return tuple(self._encode(text, add_special_tokens=False).ids)

    @lru_cache(maxsize=50000)  # noqa: B019  one instance per process, lives as long as it
    def first_question(self, question: str, images: int) -> tuple[int, ...]:
        """Token ids of a first turn behind its images, up to where the answer begins."""
        before, after = self._frame(images)
        head = before[: self._head_end(before)]
        return self.tokens(before[len(head) :] + question + after)

    @lru_cache(maxsize=50000)  # noqa: B019
    def next_question(self, question: str) -> tuple[int, ...]:
        """Token ids from an answer's end (not with it) to where the next answer begins."""
        before, after = self._frame(0)
        return self.tokens(self._between + before + question + after)

    @lru_cache(maxsize=50000)  # noqa: B019
    def answer(self, answer: str) -> tuple[int, ...]:
        """Token ids of an answer with its end."""
        return (*self.tokens(answer), self.end)

    def _head_end(self, before: str) -> int:
        """Where the images end: behind the last special token of what stands before a question."""
        return before.rindex(">") + 1

    @lru_cache(maxsize=16)  # noqa: B019
    def plan(self, images: int, side: int, length: int) -> Plan:
        """The plan of prompts of ``length`` tokens that begin with so many square images."""
        before, _ = self._frame(images)
        ids = self.tokens(before[: self._head_end(before)])
        prompt = self.processor.expand(ids, [(side, side)] * images)
        head = tuple(prompt.token_ids.tolist())
        prompt = prompt.extended([0] * (length - len(head)))
        config, index = self.processor.config, prompt.visual_index
        if isinstance(config, LlavaConfig) and images == 1 and side == SIZE:
            # The base view and the only tile of the grid are the same pixels: one tile serves both.
            tokens = config.tokens_per_tile
            index = np.where(index > tokens, index - tokens, index)
        return Plan(head, index, prompt.visual_weight, prompt.positions, dict(prompt.vision))

    def pack(self, images: Sequence[Image.Image]) -> NDArray[np.uint8]:
        """What of a prompt's images has to be sent, uint8 ``[N, height, width, 3]``."""
        views = list(images)
        if isinstance(self.processor.config, LlavaConfig) and views[0].width > SIZE:
            (image,) = views
            corners = [(x, y) for y in range(0, image.height, SIZE) for x in range(0, image.width, SIZE)]
            base = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            views = [base, *(image.crop((x, y, x + SIZE, y + SIZE)) for x, y in corners)]
        return np.stack([np.asarray(view) for view in views])

    def views(self, images: int, side: int) -> tuple[int, int]:
        """N and the side of what :meth:`pack` makes of so many images."""
        if isinstance(self.processor.config, LlavaConfig) and side > SIZE:
            return 1 + (side // SIZE) ** 2, SIZE
        return images, side

    def pixels(self, packed: Array) -> jax.Array:
        """Packed images uint8 ``[B, N, height, width, 3]`` -> what the tower takes, float32 ``[B, P, ...]``."""
        values = jnp.asarray(packed).astype(jnp.float32) / 127.5 - 1.0
        config = self.processor.config
        if not isinstance(config, QwenVLConfig):
            return values
        m, p = config.vision.merge_size, config.vision.patch_size
        patches = rearrange(values, "b n (i m p) (j k q) c -> b (n i j m k) c p q", m=m, p=p, k=m, q=p)
        # A still image is a video of two equal frames.
        frames = jnp.stack([patches] * config.vision.temporal_patch_size, axis=3)
        return frames.reshape(*frames.shape[:2], -1)

    def images_only(self, packed: Array, plan: Plan) -> Batch:
        """A batch that only the tower can read."""
        size = packed.shape[0]
        none = jnp.zeros((size, 1), jnp.int32)
        return Batch(none, jnp.ones(size, jnp.int32), none, self.pixels(packed), _repeated(plan.vision, size))

    def batch(self, token_ids: Array, lengths: Array, reads: Array, packed: Array, plan: Plan) -> Batch:
        """The model's batch, on the device."""
        size = token_ids.shape[0]
        return replace(
            self.images_only(packed, plan),
            token_ids=jnp.asarray(token_ids),
            lengths=jnp.asarray(lengths),
            read_positions=jnp.asarray(reads),
            visual_index=_repeated(plan.visual_index, size),
            visual_weight=_repeated(plan.visual_weight, size),
            positions=None if plan.positions is None else _repeated(plan.positions, size),
        )


def _repeated(tree: Any, size: int) -> Any:
    return jax.tree.map(lambda x: jnp.broadcast_to(jnp.asarray(x)[None], (size, *x.shape)), tree)
