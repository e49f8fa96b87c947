"""Videos as models see them: which frames are shown, when they were taken, and how a frame becomes numbers.

A video is shown as a few of its frames; everything about its prompt is planned from a :class:`VideoShape`, before any
frame is decoded. Frames are resized by Pillow, as images are, so that a picture and a video of it give the same pixels
(transformers resizes videos with torchvision, whose rounding differs by one level of 255 here and there).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sav_jax.errors import UserError

_SETTINGS = (
    "cap_pixels_per_frame",
    "do_normalize",
    "do_rescale",
    "image_mean",
    "image_std",
    "max_pixels",
    "max_video_tokens",
    "min_pixels",
    "resample",
    "rescale_factor",
    "size",
)


@dataclass(frozen=True)
class VideoShape:
    """What is shown of a video.

    Attributes:
        height, width: of its frames in pixels.
        frames: numbers of the frames shown, counted from 0, ascending.
        total: how many frames it has.
        rate: its frames per second.
    """

    height: int
    width: int
    frames: tuple[int, ...]
    total: int
    rate: float

    @property
    def shown_rate(self) -> float:
        """Frames shown per second."""
        return len(self.frames) / self.total * self.rate

    def times(self, group: int) -> list[float]:
        """Of each ``group`` of frames shown (the last one filled up with its last frame) the time in seconds half way
        between its first and its last frame.
        """
        padded = [*self.frames, *[self.frames[-1]] * (-len(self.frames) % group)]
        seconds = [frame / self.rate for frame in padded]
        return [(seconds[i] + seconds[i + group - 1]) / 2 for i in range(0, len(seconds), group)]


def uniform_frames(total: int, count: int) -> tuple[int, ...]:
    """Numbers of ``count`` frames spread evenly over ``total``, first and last among them (rounded down, as the SAVs
    release samples for LLaVA-OneVision); all of them if there are no more.
    """
    return tuple(np.linspace(0, total - 1, min(count, total), dtype=int).tolist())


def frame_values(processor: Any, frame: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """A frame stretched to ``size`` (height, width) and normalised, float32 ``[3, height, width]``, by the arithmetic
    that images go through.

    Args:
        processor: a PIL image processor of transformers with the settings for videos.
        frame: RGB.
        size: (height, width).
    """
    resized = frame.resize(size[::-1], processor.resample) if frame.size != size[::-1] else frame
    values = np.asarray(resized).transpose(2, 0, 1)
    if processor.do_rescale:
        values = processor.rescale(values, processor.rescale_factor)
    if processor.do_normalize:
        values = processor.normalize(values, processor.image_mean, processor.image_std)
    return np.asarray(values, np.float32)


def video_settings(directory: Path) -> dict[str, Any]:
    """What a checkpoint says about frames of videos: in ``processor_config.json``, in
    ``video_preprocessor_config.json``, or, as transformers reads older releases, in the settings for images.

    Raises:
        UserError: a file is not JSON.
    """
    candidates = (
        (directory / "processor_config.json", "video_processor"),
        (directory / "video_preprocessor_config.json", None),
        (directory / "preprocessor_config.json", None),
    )
    for file, part in candidates:
        try:
            found = json.loads(file.read_text()) if file.exists() else None
        except ValueError as error:
            raise UserError(f"{file}: unreadable ({error})") from None
        if isinstance(found, Mapping) and part is not None:
            found = found.get(part)
        if isinstance(found, Mapping):
            return {name: found[name] for name in _SETTINGS if found.get(name) is not None}
    return {}
