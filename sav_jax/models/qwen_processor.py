"""Prompts of the Qwen-VL families."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from einops import rearrange
from PIL import Image

from sav_jax.errors import UserError
from sav_jax.models.anyres import VisualPlan
from sav_jax.models.processor import Processor, Prompt
from sav_jax.models.qwen_plan import fitted_size, plan_visual, rope_positions
from sav_jax.models.qwen_vl import QwenVLConfig
from sav_jax.models.video import VideoShape, frame_values


class QwenVLProcessor(Processor):
    """Images, and frames of videos, at about their own size, between the smallest and largest number of pixels of
    their settings.
    """

    config: QwenVLConfig

    def __init__(
        self,
        config: QwenVLConfig,
        tokenizer: Any,
        image_processor: Any,
        chat_template: str,
        video_processor: Any = None,
    ):
        # Patches must be the model's: the two files could disagree, and the plan is made from config.json.
        image_processor.patch_size = config.vision.patch_size
        image_processor.temporal_patch_size = config.vision.temporal_patch_size
        image_processor.merge_size = config.vision.merge_size
        image_processor.do_resize = True
        size = dict(image_processor.size)
        if not all(isinstance(size.get(edge), int) for edge in ("shortest_edge", "longest_edge")):
            raise UserError(f"preprocessor_config.json: size {size} must have shortest_edge and longest_edge in pixels")
        super().__init__(config, tokenizer, image_processor, chat_template, video_processor)

    @property
    def image_mark(self) -> str:
        return self._enclosed(self.image_token)

    @property
    def video_mark(self) -> str:
        return self._enclosed(str(self.video_token))

    def _enclosed(self, token: str) -> str:
        c = self.config
        start, end = self.tokenizer.convert_ids_to_tokens([c.vision_start_token_id, c.vision_end_token_id])
        return f"{start}{token}{end}"

    def video_text(self, video: VideoShape) -> str:
        """With timestamps, every pair of frames stands enclosed for itself behind its time, within what the chat
        template encloses: what transformers makes of it since version 5.
        """
        if not self.config.timestamps:
            return super().video_text(video)
        times = video.times(self.config.vision.temporal_patch_size)
        return "".join(f"<{seconds:.1f} seconds>{self.video_mark}" for seconds in times)

    def plan_images(self, image_sizes: Sequence[tuple[int, int]]) -> list[VisualPlan]:
        bounds = self.image_processor.size["shortest_edge"], self.image_processor.size["longest_edge"]
        plans: list[VisualPlan] = []
        for size in image_sizes:
            fitted = fitted_size(size, self._token_side, *bounds)
            plans.append(self._plan(1, fitted, sum(plan.num_rows for plan in plans)))
        return plans

    def plan_video(self, video: VideoShape, first_row: int) -> list[VisualPlan]:
        c = self.config
        size = self._frame_size(len(video.frames), (video.height, video.width))
        pairs = -(-len(video.frames) // c.vision.temporal_patch_size)
        if c.timestamps:
            rows = size[0] * size[1] // c.vision.patch_size**2
            return [self._plan(1, size, first_row + i * rows) for i in range(pairs)]
        if c.tokens_per_second is None:
            return [self._plan(pairs, size, first_row)]
        # float32 like the reference: times are cut off, not rounded.
        seconds = np.float32(c.vision.temporal_patch_size / video.shown_rate)
        return [self._plan(pairs, size, first_row, float(np.float32(c.tokens_per_second) * seconds))]

    def _plan(self, frames: int, size: tuple[int, int], first_patch: int, frame_step: float = 1.0) -> VisualPlan:
        c = self.config.vision
        return plan_visual(
            (frames, size[0] // self._token_side, size[1] // self._token_side),
            merge=c.merge_size,
            first_patch=first_patch,
            window_side=c.window_side,
            position_side=c.position_side,
            frame_step=frame_step,
        )

    def vision_of(self, prompt: Prompt, start: int, stop: int) -> dict[str, np.ndarray]:
        # These three speak of rows of the prompt (models/qwen_plan.py).
        first = {"segments": start, "order": start, "windows": start}
        return {name: values - first.get(name, 0) for name, values in super().vision_of(prompt, start, stop).items()}

    @property
    def _token_side(self) -> int:
        """Pixels along a side of a visual token."""
        return self.config.vision.patch_size * self.config.vision.merge_size

    def _frame_size(self, frames: int, size: tuple[int, int]) -> tuple[int, int]:
        """What the frames of a video are resized to. Qwen3-VL bounds the pixels of all frames together, the others
        those of one; ``cap_pixels_per_frame`` lowers the upper bound as Qwen's own tools do.
        """
        least, most = self.video_processor.size["shortest_edge"], self.video_processor.size["longest_edge"]
        budget = self.video_processor.max_video_tokens * self._token_side**2
        capped = self.video_processor.cap_pixels_per_frame
        if self.config.timestamps:
            if capped:
                most = frames * max(min(budget, most // frames), int(least * 1.05))
            group = self.config.vision.temporal_patch_size
            # Fewer frames than a patch holds are filled up.
            return fitted_size(size, self._token_side, least, most, max(frames, group), group)
        if capped:
            share = int(budget * 0.9) * self.config.vision.temporal_patch_size // frames
            most = max(min(most, share), int(least * 1.05))
        return fitted_size(size, self._token_side, least, most)

    def pixels(self, images: Sequence[Image.Image], videos: Sequence[Sequence[Image.Image]] = ()) -> np.ndarray:
        """Normalised patches, float32 ``[P, C]``; a still image is a video of two equal frames."""
        patches = [np.zeros((0, self.config.vision.patch_values), np.float32)]
        if images:
            values = self.image_processor(list(images), return_tensors="np")["pixel_values"]
            patches.append(np.asarray(values, np.float32))
        return np.concatenate([*patches, *map(self._video_patches, videos)])

    def _video_patches(self, frames: Sequence[Image.Image]) -> np.ndarray:
        c = self.config.vision
        size = self._frame_size(len(frames), (frames[0].height, frames[0].width))
        values = [frame_values(self.video_processor, frame, size) for frame in frames]
        values += [values[-1]] * (-len(values) % c.temporal_patch_size)
        return rearrange(
            np.stack(values),
            "(t k) c (i m p) (j n q) -> (t i j m n) (c k p q)",
            k=c.temporal_patch_size,
            m=c.merge_size,
            n=c.merge_size,
            p=c.patch_size,
            q=c.patch_size,
        )

    def positions(self, is_visual: np.ndarray, plans: Sequence[VisualPlan]) -> np.ndarray:
        return rope_positions(is_visual, plans)
