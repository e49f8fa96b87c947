"""Prompts of the LLaVA families."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from sav_jax.models.anyres import VisualPlan, plan_anyres, plan_base_view, plan_frames
from sav_jax.models.llava import LlavaConfig
from sav_jax.models.processor import Processor
from sav_jax.models.video import VideoShape, frame_values


class LlavaProcessor(Processor):
    """LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision: anyres or the base view, by the config and the number of images."""

    config: LlavaConfig

    def __init__(
        self,
        config: LlavaConfig,
        tokenizer: Any,
        image_processor: Any,
        chat_template: str,
        video_processor: Any = None,
    ):
        if config.image_grid_pinpoints:
            # The grid must be the model's: the two files could disagree, and the plan is made from config.json.
            image_processor.image_grid_pinpoints = [list(p) for p in config.image_grid_pinpoints]
        super().__init__(config, tokenizer, image_processor, chat_template, video_processor)

    def plan_images(self, image_sizes: Sequence[tuple[int, int]]) -> list[VisualPlan]:
        c = self.config
        anyres = bool(c.image_grid_pinpoints) and (c.anyres_for_several or len(image_sizes) == 1)
        plans: list[VisualPlan] = []
        for size in image_sizes:
            first_tile = sum(plan.num_rows for plan in plans)
            if anyres:
                plan = plan_anyres(
                    size,
                    first_tile=first_tile,
                    tile_size=c.vision.image_size,
                    patches_per_side=c.vision.patches_per_side,
                    pinpoints=c.image_grid_pinpoints,
                    max_tiles=c.max_tiles,
                )
            else:
                plan = plan_base_view(first_tile, c.tokens_per_tile, c.newline)
            plans.append(plan)
        return plans

    def plan_video(self, video: VideoShape, first_row: int) -> list[VisualPlan]:
        side = self.config.vision.patches_per_side
        return [plan_frames(len(video.frames), first_tile=first_row, patches_per_side=side)]

    def pixels(self, images: Sequence[Image.Image], videos: Sequence[Sequence[Image.Image]] = ()) -> np.ndarray:
        """Normalised tiles, float32 ``[P, height, width, 3]``."""
        size = self.config.vision.image_size
        tiles = [np.zeros((0, 3, size, size), np.float32)]
        if images and self.config.image_grid_pinpoints:
            # Nested: images of one prompt are told from images of several, which decides on base view or anyres.
            tiles += self.image_processor([list(images)], return_tensors=None, do_pad=False)["pixel_values"]
        elif images:
            views = self.image_processor(list(images), return_tensors=None)["pixel_values"]
            tiles += [view[None] for view in views]
        for frames in videos:
            tiles += [frame_values(self.video_processor, frame, (size, size))[None] for frame in frames]
        return np.ascontiguousarray(np.concatenate(tiles).transpose(0, 2, 3, 1), np.float32)
