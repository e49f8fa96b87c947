"""Rows of a data file, or pictures or videos in class folders, as :class:`Example` objects.

Three layouts are read, all by :func:`read_examples`:

* JSON Lines, one object per line, as the SAVs release documents its data:
  ``{"image": path | [path, ...] | [], "question": str, "label": str, "id": str}``. Only the question must be there.
  ``"video"``, also beside ``"image"``, takes the same; so does a path in ``"image"`` that ends like a video's.
* The same objects in one JSON list (``[{...}, {...}]``).
* A folder with one sub-folder per class, holding pictures, or else videos, at any depth; the question is then given by
  the caller.

Everything that can be checked without opening a picture or video is checked while reading, so that a bad row is
reported before any model runs. Every complaint is a :class:`~sav_jax.errors.UserError` of one line naming file, line
(and row, in a list) and field.
"""

from __future__ import annotations

import errno
import hashlib
import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL.Image
import PIL.ImageOps

from sav_jax._storage import AnyPath, BucketPath, Location, file_finder, is_url, location
from sav_jax.class_folders import is_video, media_of_folder
from sav_jax.errors import UserError
from sav_jax.jsonrows import json_kind, json_rows, misspelt
from sav_jax.models.video import VideoShape
from sav_jax.video import VIDEO_SUFFIXES, AnyVideo, Video, VideoError, video_digest, video_frames, video_shape

IMAGE_MARK = "<image>"
"""Written in a question, it says where one of the row's images belongs."""
VIDEO_MARK = "<video>"
"""The same for one of its videos."""
VIRTUAL_MARK = "<demonstration>"
"""The same for a demonstration that is shown as virtual tokens."""

DEFAULT_FRAMES = 16
"""How many frames of a video are shown, unless said otherwise: as the SAVs release shows LLaVA-OneVision."""

_ORIENTATION = 0x0112  # EXIF tag; values 5 to 8 turn the picture by a quarter, so width and height change places
# Formats whose size Pillow states as stored, before the orientation is applied.
_TURNED_WHEN_DECODED = ("JPEG", "MPO", "PNG", "WEBP")
# What Pillow's decoders raise on files that are damaged or not pictures at all.
_DECODE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
    zlib.error,
    PIL.Image.DecompressionBombError,
    VideoError,
)
# A PNG may carry its orientation after the pixels, and Pillow decodes the whole picture to find out. Without one of
# these keywords in the file there is none.
_PNG_EXIF_KEYWORDS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")


T = TypeVar("T")


@dataclass(frozen=True)
class EncodedImage:
    """A picture's file that lies in another file, such as a record of an archive; read anew whenever it is needed."""

    read_bytes: Callable[[], bytes]


@dataclass(frozen=True, eq=False)
class VirtualTokens:
    """Vectors that stand in a prompt as if they were embeddings of tokens.

    Attributes:
      values: float32 [W, D].
      key: a digest of all that they were made from.
    """

    values: np.ndarray
    key: str


@dataclass(frozen=True)
class Exchange:
    """A turn of the user that has been answered, such as a demonstration.

    Attributes:
      question: like an example's.
      answer: what the assistant has said.
      images, videos: how many are shown in this turn.
    """

    question: str
    answer: str
    images: int = 0
    videos: int = 0


AnyImage = Path | BucketPath | PIL.Image.Image | EncodedImage


@dataclass(frozen=True)
class Example:
    """One question about some images and videos, with the right answer where it is known.

    Attributes:
      question: the text. It may hold one ``<image>`` per image, and one ``<video>`` per video, where they belong;
        without these marks the images come first, then the videos, then the text.
      images: paths, PIL images or :class:`EncodedImage`, in order; empty for a question about text alone.
      label: the class name, or None if unknown.
      id: the row's name in the predictions file.
      source: where the example was read, ``file:line`` or a picture's path; only used in error messages.
      videos: paths or :class:`~sav_jax.Video` objects (or their frames alone, for 24 frames per second), in order.
      frames: how many frames of each video are shown, sampled uniformly; a shorter video is shown whole.
      virtual: virtual tokens, one for each ``<demonstration>`` mark in the question (:mod:`sav_jax.aim`). With them the
        question must hold marks for its images and videos, too.
      history: turns before the question's, written as the chat template writes a conversation. Their images and videos
        are the first of ``images`` and ``videos``.

    Raises:
      UserError: if the question is empty or holds marks that do not match images and videos, or no frames are shown.

    Example:
      >>> import sav_jax
      >>> from PIL import Image
      >>> blue = Image.new("RGB", (32, 32), "blue")
      >>> sav_jax.Example("what color is the background?", (blue,), label="blue").marked_question().splitlines()
      ['<image>', 'what color is the background?']
    """

    question: str
    images: tuple[AnyImage, ...] = ()
    label: str | None = None
    id: str = ""
    source: str = ""
    videos: tuple[AnyVideo, ...] = ()
    frames: int = DEFAULT_FRAMES
    virtual: tuple[VirtualTokens, ...] = ()
    history: tuple[Exchange, ...] = ()

    def __post_init__(self) -> None:
        # Whoever writes a path as a string means a path.
        images = tuple(location(item) if isinstance(item, str) else item for item in self.images)
        videos = tuple(Path(item) if isinstance(item, str) else item for item in self.videos)
        object.__setattr__(self, "images", images)
        object.__setattr__(self, "videos", tuple(v if isinstance(v, Path | Video) else Video(v) for v in videos))
        if not self.question.strip():
            raise UserError(f'{self.source or "example"}: field "question" is empty')
        for kind, mark, given in self._own_media():
            if given < 0:
                raise UserError(f'{self.source or "example"}: earlier turns show more {kind}s than field "{kind}" has')
            marks = self.question.count(mark)
            if marks and marks != given:
                raise UserError(
                    f'{self.source or "example"}: field "question" holds {marks} {mark} mark{"s"[: marks != 1]} '
                    f'for {given} {kind}{"s"[: given != 1]} in field "{kind}"'
                )
        if self.virtual:
            self._check_virtual()
        if self.frames < 1:
            raise UserError(f"{self.source or 'example'}: at least 1 frame of a video must be shown, not {self.frames}")

    def _check_virtual(self) -> None:
        where = self.source or "example"
        marks = self.question.count(VIRTUAL_MARK)
        if marks != len(self.virtual):
            raise UserError(f"{where}: the question holds {marks} {VIRTUAL_MARK} marks for {len(self.virtual)}")
        for mark, given in ((IMAGE_MARK, self.images), (VIDEO_MARK, self.videos)):
            if given and mark not in self.question:
                raise UserError(f"{where}: a question with {VIRTUAL_MARK} marks must hold {mark} marks, too")

    def marked_question(self) -> str:
        """The question with a mark for each of its images and videos: where it says, else before it."""
        marks = "".join(mark * given for _, mark, given in self._own_media() if mark not in self.question)
        return f"{marks}\n{self.question}" if marks else self.question

    def _own_media(self) -> tuple[tuple[str, str, int], ...]:
        """Kind, mark and number of what is shown with the question itself."""
        images = len(self.images) - sum(turn.images for turn in self.history)
        videos = len(self.videos) - sum(turn.videos for turn in self.history)
        return ("image", IMAGE_MARK, images), ("video", VIDEO_MARK, videos)

    def virtual_tokens(self) -> np.ndarray | None:
        """All virtual tokens in order, float32 [M, D]; None if there are none."""
        return np.concatenate([tokens.values for tokens in self.virtual]) if self.virtual else None

    def load_images(self) -> list[PIL.Image.Image]:
        """Decode the images, upright (EXIF orientation applied) and RGB, as transformers' ``load_image`` does.

        Raises:
          UserError: if a file is missing, truncated or not a picture.
        """
        images = []
        for image in self.images:
            try:
                if not isinstance(image, PIL.Image.Image):
                    with _open(image) as opened:
                        opened.load()  # Pillow reads lazily; a truncated file shows only here
                        images.append(_upright(opened).convert("RGB"))
                else:
                    images.append(_upright(image).convert("RGB"))
            except _DECODE_ERRORS as error:
                raise self._unreadable(image, error) from error
        return images

    def image_sizes(self) -> list[tuple[int, int]]:
        """Return (height, width) in pixels of each image that load_images would return, from its header if possible.

        Raises:
          UserError: if a file is missing or its header is not a picture's.
        """
        sizes = []
        for image in self.images:
            try:
                if not isinstance(image, PIL.Image.Image):
                    with _open(image) as opened:
                        sizes.append(_upright_size(opened, image))
                else:
                    sizes.append(_upright_size(image, None))
            except _DECODE_ERRORS as error:
                raise self._unreadable(image, error) from error
        return sizes

    def image_digests(self) -> list[str]:
        """Return each image's SHA-256 in hexadecimal: of the file's bytes or of a PIL image's upright RGB pixels.

        Raises:
          UserError: if a file cannot be read.
        """
        digests = []
        for image in self.images:
            try:
                if isinstance(image, Path):
                    with image.open("rb") as file:
                        digests.append(hashlib.file_digest(file, "sha256").hexdigest())
                elif isinstance(image, EncodedImage | BucketPath):
                    digests.append(hashlib.sha256(image.read_bytes()).hexdigest())
                else:
                    # What load_images gives: no palette or EXIF detail counts.
                    digests.append(_pixel_digest(_upright(image).convert("RGB")))
            except _DECODE_ERRORS as error:
                raise self._unreadable(image, error) from error
        return digests

    def pixel_digests(self) -> list[str]:
        """Return each image's SHA-256 in hexadecimal, of its upright RGB pixels: the same however it was stored.

        Raises:
          UserError: as :meth:`load_images`.
        """
        return [_pixel_digest(image) for image in self.load_images()]

    def video_shapes(self) -> list[VideoShape]:
        """Return size, length and sampled frames of each video, without decoding more than its first frame.

        Raises:
          UserError: if a file is missing, damaged, truncated or not a video, or PyAV is not installed.
        """
        return [self._read_video(video, lambda video: video_shape(video, self.frames)) for video in self.videos]

    def load_videos(self) -> list[list[PIL.Image.Image]]:
        """Decode the sampled frames of each video, upright and RGB.

        Raises:
          UserError: as :meth:`video_shapes`.
        """
        return [self._read_video(video, lambda video: video_frames(video, self.frames)) for video in self.videos]

    def video_digests(self) -> list[str]:
        """Return each video's SHA-256 in hexadecimal: of the file's bytes, or of a video in memory.

        Raises:
          UserError: if a file cannot be read.
        """
        return [self._read_video(video, video_digest) for video in self.videos]

    def _read_video(self, video: AnyVideo, read: Callable[[AnyVideo], T]) -> T:
        try:
            return read(video)
        except _DECODE_ERRORS as error:
            raise self._unreadable(video, error) from error

    def _unreadable(self, item: AnyImage | Video, error: BaseException) -> UserError:
        where = f"{self.source}: " if self.source and self.source != str(item) else ""
        kind = "video" if item in self.videos else "image"
        what = str(item) if isinstance(item, Path | BucketPath) else f"a{'n' * (kind == 'image')} {kind} in memory"
        if isinstance(error, FileNotFoundError):
            return UserError(f'{where}field "{kind}": {what} does not exist')
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if isinstance(error, PIL.UnidentifiedImageError):
            reason = "not a picture in a format that Pillow knows"
        return UserError(f'{where}field "{kind}": {what} cannot be read: {_one_line(reason)}')


def read_examples(
    path: AnyPath,
    question: str | None = None,
    *,
    require_labels: bool = False,
    frames: int = DEFAULT_FRAMES,
    media_folder: AnyPath | None = None,
) -> list[Example]:
    """Read a JSON Lines file, a JSON list or a folder of class folders.

    Relative paths are relative to the file that names them. Rows come in file order; a folder's in the sorted
    order of class names and of paths within a class. Hidden files are ignored. Files and pictures may lie in a bucket
    (``gs://bucket/name``), videos may not.

    Args:
      path: the file or folder. A folder with pictures or videos but no sub-folders is read as examples without labels.
      question: asked of every picture or video of a folder, and of every row that has no question of its own.
      require_labels: if True, a row without a label is an error.
      frames: how many frames of each video are shown.
      media_folder: what relative paths in a file are relative to, if it is not the file's own folder.

    Returns:
      At least one example. ``id`` is the row's own ``"id"``, else its running number from 0; in a folder the picture's
      relative path.

    Raises:
      UserError: naming file, line and field of the first problem, and how many more rows are bad.

    Example:
      >>> import json, pathlib, sav_jax
      >>> from PIL import Image
      >>> Image.new("RGB", (32, 32), "red").save("red.png")
      >>> row = {"image": "red.png", "question": "what color is the background?", "label": "red"}
      >>> _ = pathlib.Path("rows.jsonl").write_text(json.dumps(row))
      >>> (example,) = sav_jax.read_examples("rows.jsonl")
      >>> example.label, example.source, example.load_images()[0].size
      ('red', 'rows.jsonl:1', (32, 32))
    """
    root = location(path)
    if question is not None and not question.strip():
        raise UserError("the question for rows without one (--question) is empty")
    if frames < 1:
        raise UserError(f"at least 1 frame of a video must be shown (--frames), not {frames}")
    try:
        if root.is_dir():
            return _folder_examples(root, question, require_labels, frames)
    except OSError as error:
        raise UserError(f"{root}: cannot be read: {error.strerror}") from None
    base, is_file = root.parent if media_folder is None else location(media_folder), file_finder()
    examples: list[Example] = []
    problems: list[str] = []
    number = 0
    for number, (source, row) in enumerate(json_rows(root), start=1):
        try:
            examples.append(_example(base, source, number - 1, row, question, require_labels, frames, is_file))
        except UserError as problem:
            problems.append(str(problem))
    if problems:
        more = len(problems) - 1
        raise UserError(problems[0] + (f" (and {more} more bad row{'s'[: more != 1]})" if more else ""))
    if not number:
        raise UserError(f"{root}: holds no rows")
    return examples


# Rows


def _example(
    folder: Location,
    source: str,
    number: int,
    row: Any,
    question: str | None,
    require_labels: bool,
    frames: int,
    is_file: Callable[[Location], bool],
) -> Example:
    """Check one parsed row and make it an Example; raise UserError naming file, line and field."""
    if isinstance(row, UserError):
        raise row
    if not isinstance(row, dict):
        raise UserError(f"{source}: a JSON object is expected, not {json_kind(row)}")

    def bad(field: str, problem: str) -> UserError:
        return UserError(f'{source}: field "{field}" {problem}')

    asked = row.get("question")
    if asked is None:
        asked = question
    if asked is None:
        raise bad("question", "is missing (--question gives one to every row that has none)")
    if not isinstance(asked, str):
        raise bad("question", f"must be a string, not {json_kind(asked)}")

    label = row.get("label")
    if label is None:
        if require_labels:
            raise bad("label", "is missing")
    elif not isinstance(label, str):
        raise bad("label", f"must be a string, not {json_kind(label)}")
    elif not label.strip():
        raise bad("label", "is empty")

    name = row.get("id")
    if name is None:
        name = str(number)
    elif isinstance(name, bool) or not isinstance(name, str | int):
        raise bad("id", f"must be a string or an integer, not {json_kind(name)}")

    paths: dict[str, list[Any]] = {"image": [], "video": []}
    for field in paths:
        if wrong := misspelt(row, (field,)):
            raise bad(wrong[0], f'is not known; "{field}" takes a path or a list of paths')
        items = row.get(field)
        if items is None:
            items = []
        for item in items if isinstance(items, list) else [items]:
            if not isinstance(item, str):
                raise bad(field, f"must be a path or a list of paths, not {json_kind(item)}")
            if not item.strip():
                raise bad(field, "holds an empty path")
            if problem := path_problem(folder, item, is_file):
                raise bad(field, problem)
            # The SAVs release names videos in "image", too.
            kind = "video" if item.lower().endswith(VIDEO_SUFFIXES) else field
            place = place_of(folder, item)
            if kind == "video" and isinstance(place, BucketPath):
                raise bad(field, f"names {item!r}: a video must lie on a local disk (a bucket may be mounted: gcsfuse)")
            paths[kind].append(place)
    return Example(
        question=asked,
        images=tuple(paths["image"]),
        label=label,
        id=str(name),
        source=source,
        videos=tuple(paths["video"]),
        frames=frames,
    )


def place_of(root: Location, item: str) -> Location:
    """Where a row's path leads, which is relative to ``root`` or absolute."""
    return location(item) if is_url(item) else Path(item) if item.startswith("/") else root / item


def path_problem(
    root: Location, item: str, is_file: Callable[[Location], bool] = lambda path: path.is_file()
) -> str | None:
    """What is wrong with a row's path of a file, relative to ``root``; None if it is there."""
    shown = repr(item if len(item) <= 200 else item[:200] + "...")
    if "\0" in item or item.startswith("data:") or ("://" in item and not item.startswith("gs://")):
        return f"must be the path of a local file, or gs://bucket/name, not {shown}"
    try:
        place = place_of(root, item)
        if is_file(place):
            return None
        exists = place.exists()
    except OSError as error:  # a name too long for the file system: pixels in base64, perhaps
        if error.errno == errno.EIO:
            return f"names {shown}, which cannot be read: {error.strerror}"
        exists = False
    return f"names {shown}, which {'is not a file' if exists else 'does not exist'} (looked for from {root})"


# Folders


def _folder_examples(root: Location, question: str | None, require_labels: bool, frames: int) -> list[Example]:
    if question is None:
        raise UserError(f"{root}: is a folder of pictures; --question must say what to ask about each of them")
    return [
        Example(
            question,
            () if is_video(path) else (path,),
            label,
            id=path.relative_to(root).as_posix(),
            source=str(path),
            videos=(path,) if is_video(path) else (),
            frames=frames,
        )
        for path, label in media_of_folder(root, require_labels)
    ]


# Pictures


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    return PIL.ImageOps.exif_transpose(image)


def _pixel_digest(rgb: PIL.Image.Image) -> str:
    return hashlib.sha256(f"RGB {rgb.width}x{rgb.height}:".encode() + rgb.tobytes()).hexdigest()


def _open(image: Location | EncodedImage) -> PIL.Image.Image:
    return PIL.Image.open(image if isinstance(image, Path) else io.BytesIO(image.read_bytes()))


def _upright_size(image: PIL.Image.Image, path: Location | EncodedImage | None) -> tuple[int, int]:
    if image.format == "PNG" and path is not None:
        content = path.read_bytes()
        oriented = any(keyword in content for keyword in _PNG_EXIF_KEYWORDS)
    else:
        oriented = True
    if not (oriented and image.getexif().get(_ORIENTATION) in (5, 6, 7, 8)):
        return image.height, image.width
    if image.format in _TURNED_WHEN_DECODED:
        return image.width, image.height
    image.load()  # Pillow's TIFF reader, for one, turns the size when it opens the file, the pixels when it loads them
    image = _upright(image)
    return image.height, image.width


def _one_line(text: str) -> str:
    return " ".join(text.split())
