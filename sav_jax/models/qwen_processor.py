"""Prompts of the Qwen-VL families."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from sav_jax.models.anyres import VisualPlan
from sav_jax.models.processor import Processor
from sav_jax.models.qwen_plan import fitted_size, plan_visual, rope_positions
from sav_jax.models.qwen_vl import QwenVLConfig


class QwenVLProcessor(Processor):
    """Images at about their own size, between the image processor's smallest and largest number of pixels."""

    config: QwenVLConfig

    def __init__(self, config: QwenVLConfig, tokenizer: Any, image_processor: Any, chat_template: str):
        # Patches must be the model's: the two files could disagree, and the plan is made from config.json.
        image_processor.patch_size = config.vision.patch_size
        image_processor.temporal_patch_size = config.vision.temporal_patch_size
        image_processor.merge_size = config.vision.merge_size
        image_processor.do_resize = True
        super().__init__(config, tokenizer, image_processor, chat_template)

    @property
    def image_mark(self) -> str:
        c = self.config
        start, end = self.tokenizer.convert_ids_to_tokens([c.vision_start_token_id, c.vision_end_token_id])
        return f"{start}{self.image_token}{end}"

    def plan_images(self, image_sizes: Sequence[tuple[int, int]]) -> list[VisualPlan]:
        c = self.config.vision
        multiple = c.patch_size * c.merge_size
        bounds = self.image_processor.size["shortest_edge"], self.image_processor.size["longest_edge"]
        plans: list[VisualPlan] = []
        for size in image_sizes:
            height, width = fitted_size(size, multiple, *bounds)
            plans.append(
                plan_visual(
                    (1, height // multiple, width // multiple),
                    merge=c.merge_size,
                    first_patch=sum(plan.num_rows for plan in plans),
                    window_side=c.window_side,
                    position_side=c.position_side,
                )
            )
        return plans

    def pixels(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Normalised patches, float32 ``[P, C]``; a still image is a video of two equal frames."""
        if not images:
            return np.zeros((0, self.config.vision.patch_values), np.float32)
        return np.asarray(self.image_processor(list(images), return_tensors="np")["pixel_values"], np.float32)

    def positions(self, token_ids: np.ndarray, plans: Sequence[VisualPlan]) -> np.ndarray:
        return rope_positions(token_ids == self.config.image_token_id, plans)
