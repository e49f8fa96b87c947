"""Small videos made with PyAV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np

FORMATS: dict[str, tuple[str, str]] = {
    ".avi": ("mpeg4", "yuv420p"),
    ".mkv": ("ffv1", "bgr0"),
    ".mov": ("png", "rgb24"),
    ".mp4": ("libx264", "yuv420p"),
    ".webm": ("libvpx-vp9", "yuv420p"),
}
"""Suffix -> codec and pixel format; .mkv and .mov are lossless."""


def write_video(
    path: Path, frames: Sequence[np.ndarray], *, rate: int = 10, turned: int = 0, **container_options: str
) -> Path:
    """Write frames, uint8 ``[height, width, 3]``, by the suffix of ``path``, with a keyframe every 12.

    Args:
        path: the file.
        frames: all of one size.
        rate: frames per second.
        turned: degrees by which players turn the frames counter-clockwise.
        container_options: of the container, such as ``movflags``.
    """
    codec, pixels = FORMATS[path.suffix]
    with av.open(str(path), "w", options=container_options) as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        stream.bit_rate = 4_000_000  # so much that neighbouring frames stay different
        stream.codec_context.gop_size = 12
        if turned:
            stream.set_display_rotation(turned)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def counting(number: int, height: int = 24, width: int = 32) -> list[np.ndarray]:
    """Frames that say by their brightness (4 levels apart) which they are, on a lighter left half."""
    frames = []
    for i in range(number):
        frame = np.full((height, width, 3), 4 * i, np.uint8)
        frame[:, : width // 2] += 20
        frames.append(frame)
    return frames


def number_of(image: Any) -> int:
    """Which frame of :func:`counting` an image is."""
    return round(float(np.asarray(image, np.float64)[:, -8:].mean()) / 4)
