"""Videos in files (decoded with PyAV, the extra ``sav-jax[video]``) and in memory: their shapes, frames and digests.

A file is looked through twice: :func:`video_shape` reads its packets without decoding them (all but the first), to know
how many frames there are and when they are shown; :func:`video_frames` decodes what lies between the last keyframe and
each frame that is wanted, and keeps nothing else.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import PIL.Image

from sav_jax.errors import UserError
from sav_jax.models.video import VideoShape, uniform_frames

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv")
"""Files with one of these endings (in any case) are videos in class folders and among the images of a row."""

_UNKNOWN_RATE = 24.0  # frames per second, as transformers assumes
# A file whose packets (or frames) end before this part of the time that its header (or its packets) speak of has been
# cut off. Not all of it: a header may count what is shown of the last frame, and decoders may withhold a last one.
_WHOLE = 0.9


class VideoError(Exception):
    """A video cannot be read; the message says why."""


@dataclass(frozen=True, eq=False)
class Video:
    """A video in memory.

    Attributes:
      frames: all of its frames, PIL images of one size or uint8 ``[frames, height, width, 3]``.
      fps: frames per second.

    Raises:
      UserError: if there are no frames, they differ in size or are not such an array, or ``fps`` is not positive.
    """

    frames: Sequence[PIL.Image.Image] | np.ndarray
    fps: float = _UNKNOWN_RATE

    def __post_init__(self) -> None:
        if isinstance(self.frames, np.ndarray):
            if self.frames.dtype != np.uint8 or self.frames.ndim != 4 or self.frames.shape[3] != 3:
                raise UserError(
                    f"a video in memory must be uint8 [frames, height, width, 3], not {self.frames.dtype} "
                    f"{list(self.frames.shape)}"
                )
        elif len({frame.size for frame in self.frames}) > 1:
            raise UserError("the frames of a video in memory must all have one size")
        if not len(self.frames):
            raise UserError("a video in memory holds no frames")
        if not self.fps > 0:
            raise UserError(f"a video's frames per second must be positive, not {self.fps}")

    def image(self, number: int) -> PIL.Image.Image:
        """A frame as an RGB image."""
        frame = self.frames[number]
        return PIL.Image.fromarray(frame) if isinstance(frame, np.ndarray) else frame.convert("RGB")


AnyVideo: TypeAlias = Path | Video


def video_shape(video: AnyVideo, count: int) -> VideoShape:
    """What is shown of a video when ``count`` frames are sampled uniformly.

    Raises:
      VideoError: if it is damaged, truncated or no video.
      OSError: if the file cannot be opened.
      UserError: if PyAV is not installed.
    """
    if isinstance(video, Video):
        width, height = video.image(0).size
        return VideoShape(height, width, uniform_frames(len(video.frames), count), len(video.frames), float(video.fps))
    return _probe(video, count).shape


def video_frames(video: AnyVideo, count: int) -> list[PIL.Image.Image]:
    """Decode the frames that :func:`video_shape` says are shown, upright and RGB.

    Raises:
      VideoError, OSError, UserError: as there.
    """
    if isinstance(video, Video):
        return [video.image(number) for number in video_shape(video, count).frames]
    probe = _probe(video, count)
    return _decode(video, probe, seek=True) or _decode(video, probe, seek=False) or []


def video_digest(video: AnyVideo) -> str:
    """SHA-256 in hexadecimal of the file's bytes, or of the RGB pixels and the rate of a video in memory.

    Raises:
      OSError: if the file cannot be read.
    """
    if isinstance(video, Path):
        with video.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    width, height = video.image(0).size
    digest = hashlib.sha256(f"RGB {len(video.frames)}x{width}x{height} {float(video.fps)}:".encode())
    for number in range(len(video.frames)):
        digest.update(video.image(number).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Probe:
    """A file as its packets describe it.

    Attributes:
      shape: what is shown.
      times: when each frame shown is shown, in the stream's time base.
      keys: the last keyframe at or before each, likewise.
    """

    shape: VideoShape
    times: tuple[int, ...]
    keys: tuple[int, ...]


def _probe(path: Path, count: int) -> _Probe:
    status = path.stat()
    return _cached_probe(path, count, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1 << 14)
def _cached_probe(path: Path, count: int, size: int, changed: int) -> _Probe:
    """Read all packets of a file; remembered until the file changes, as frames are decoded long after planning."""
    shown: list[int] = []
    keys: list[int] = []
    begin, end = float("inf"), float("-inf")
    with _opened(path) as (container, stream):
        for packet in container.demux():
            if packet.size == 0 or packet.time_base is None:
                continue
            if packet.pts is None:
                if packet.stream.index == stream.index:
                    raise VideoError("its frames bear no times; a container such as .mp4 gives them some")
                continue
            begin = min(begin, float(packet.pts * packet.time_base))
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream.index != stream.index:
                continue
            if packet.is_corrupt:
                raise VideoError("it is truncated or damaged")
            if packet.is_keyframe:
                keys.append(packet.pts)
            if not packet.is_discard:
                shown.append(packet.pts)
        stated = (container.duration or 0) / 1e6  # microseconds
        rate = stream.average_rate or stream.guessed_rate
    if not shown or not keys:
        raise VideoError("it holds no frames")
    if end - begin < _WHOLE * stated:
        raise VideoError(f"it is truncated: {max(end - begin, 0):.1f} of {stated:.1f} seconds are there")
    shown.sort()  # packets come in the order of decoding
    keys.sort()
    with _opened(path) as (container, stream):
        first = next(container.decode(stream), None)
        if first is None:
            raise VideoError("it holds no frames")
        turned = first.rotation % 180 != 0
        height, width = (first.width, first.height) if turned else (first.height, first.width)
    frames = uniform_frames(len(shown), count)
    times = tuple(shown[number] for number in frames)
    before = tuple(keys[max(bisect.bisect_right(keys, time) - 1, 0)] for time in times)
    return _Probe(VideoShape(height, width, frames, len(shown), float(rate) if rate else _UNKNOWN_RATE), times, before)


def _decode(path: Path, probe: _Probe, *, seek: bool) -> list[PIL.Image.Image] | None:
    """The frames that ``probe`` says are shown, decoded from the beginning or, with ``seek``, from the keyframes before
    them; None if seeking went too far.
    """
    found: list[PIL.Image.Image] = []
    begin = probe.times[0]
    with _opened(path) as (container, stream):
        stream.thread_type = "AUTO"
        frames = container.decode(stream)
        last: Any = None
        for time, key in zip(probe.times, probe.keys, strict=True):
            if seek and key > (begin if last is None else last.pts):
                container.seek(key, stream=stream)
                frames = container.decode(stream)
                last = next(frames, None)
                if last is None or last.pts > time:
                    return None
            # Frames that cannot be decoded (before the first keyframe of a cut) are stood in for by the next.
            while last is None or last.pts < time:
                following = next(frames, None)
                if following is None:
                    if last is None or last.pts - begin < _WHOLE * (time - begin):
                        number, total = probe.shape.frames[len(found)], probe.shape.total
                        raise VideoError(f"it is truncated or damaged: frame {number} of {total} is not there")
                    break
                last = following
            found.append(_upright(last))
    return found


def _upright(frame: Any) -> PIL.Image.Image:
    """As RGB, turned as the file says it is shown."""
    turns = {
        90: PIL.Image.Transpose.ROTATE_90,
        180: PIL.Image.Transpose.ROTATE_180,
        270: PIL.Image.Transpose.ROTATE_270,
    }
    image = frame.to_image()
    turn = turns.get(round(frame.rotation) % 360)
    return image if turn is None else image.transpose(turn)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """A container and its video stream; what PyAV raises becomes a :class:`VideoError`."""
    try:
        import av
    except ImportError:
        raise UserError('reading videos needs PyAV, the extra "video" of sav-jax: pip install av') from None
    try:
        with av.open(str(path)) as container:
            stream = container.streams.best("video")  # cover pictures are video streams, too
            if stream is None:
                raise VideoError("it holds no video")
            yield container, stream
    except av.error.FFmpegError as error:
        raise VideoError(error.strerror) from None
