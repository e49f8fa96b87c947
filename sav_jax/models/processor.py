"""Text, images and videos -> :class:`Prompt`: tokenizer, chat template, placeholder expansion and PIL image
processors, all without torch.

transformers' combined processors cannot be built without torchvision; these thin ones give the same input ids and
pixels. A family adds how an image becomes visual tokens (:meth:`Processor.plan_images`) and pixels
(:meth:`Processor.pixels`), and the same for videos if it reads any (``models/video.py``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from sav_jax.errors import UserError
from sav_jax.models.anyres import VisualPlan
from sav_jax.models.quiet import quiet_transformers
from sav_jax.models.video import VideoShape, video_settings

if TYPE_CHECKING:
    from sav_jax.examples import Exchange

IMAGE_MARK = "<image>"
"""Stands in a question where an image belongs, whatever the model's own image token is."""
VIDEO_MARK = "<video>"
"""The same for a video."""
VIRTUAL_MARK = "<demonstration>"
"""Stands in a question where virtual tokens belong: vectors that take the place of embeddings, such as AIM's."""
_NOWHERE = "\ue001"
"""Stands in no text, and a template has no opinion on it."""


@dataclass(frozen=True)
class Prompt:
    """One prompt, planned from its text and the sizes of its images and videos; pixels come later.

    Attributes:
        token_ids: int32 ``[T]``.
        num_rows: P, rows of pixels: those of all its images, then those of all its videos.
        visual_index, visual_weight: ``[T, S]``, see :class:`sav_jax.models.batch.Batch`.
        vision: the family's further plans, each ``[P, ...]``.
        positions: int32 ``[T, 3]`` rotary positions, or None to count tokens.
        virtual_index: int32 ``[T]`` which of the prompt's virtual tokens stands at each position, -1 where a real one
            does; None if it has none. Their values come later, as pixels do.
        segments: int32 ``[T]`` of several prompts in one sequence (``sav_jax/packing.py``), see
            :class:`sav_jax.models.batch.Batch`; None if it is one. ``positions`` may then be ``[T]``.
        reads: where each of them ends; of a single one, nothing: it is read at its last token.
        media_rows: rows of pixels of each image, then of each video.
    """

    token_ids: np.ndarray
    num_rows: int
    visual_index: np.ndarray
    visual_weight: np.ndarray
    vision: Mapping[str, np.ndarray] = field(default_factory=dict)
    positions: np.ndarray | None = None
    virtual_index: np.ndarray | None = None
    segments: np.ndarray | None = None
    reads: tuple[int, ...] = ()
    media_rows: tuple[int, ...] = ()

    @property
    def num_virtual(self) -> int:
        """Virtual tokens of the prompt."""
        return 0 if self.virtual_index is None else int(self.virtual_index.max()) + 1

    def extended(self, token_ids: Sequence[int]) -> Prompt:
        """The prompt followed by more text tokens."""
        extra = np.asarray(token_ids, np.int32)
        pad = ((0, len(extra)), (0, 0))
        positions = self.positions
        if positions is not None:
            following = positions.max() + 1 + np.arange(len(extra), dtype=np.int32)
            positions = np.concatenate([positions, np.repeat(following[:, None], positions.shape[1], axis=1)])
        virtual = self.virtual_index
        return replace(
            self,
            token_ids=np.concatenate([self.token_ids, extra]),
            visual_index=np.pad(self.visual_index, pad, constant_values=-1),
            visual_weight=np.pad(self.visual_weight, pad),
            positions=positions,
            virtual_index=None if virtual is None else np.pad(virtual, (0, len(extra)), constant_values=-1),
        )

    def cut(self, length: int) -> Prompt:
        """The first ``length`` tokens."""
        return replace(
            self,
            token_ids=self.token_ids[:length],
            visual_index=self.visual_index[:length],
            visual_weight=self.visual_weight[:length],
            positions=None if self.positions is None else self.positions[:length],
            virtual_index=None if self.virtual_index is None else self.virtual_index[:length],
        )


class Processor:
    """What all families do alike.

    Attributes:
        tokenizer: transformers' fast tokenizer.
        image_processor: transformers' PIL image processor.
        image_token: the model's placeholder for an image, one token.
        video_processor: an image processor with the settings for frames of videos.
        video_token: the model's placeholder for a video, one token; None if it reads no videos.
    """

    def __init__(
        self,
        config: Any,
        tokenizer: Any,
        image_processor: Any,
        chat_template: str,
        video_processor: Any = None,
    ):
        self.config = config
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.video_processor = image_processor if video_processor is None else video_processor
        self.chat_template = chat_template
        self.image_token = tokenizer.convert_ids_to_tokens(config.image_token_id)
        self.video_token_id: int | None = getattr(config, "video_token_id", None)
        video_token = None if self.video_token_id is None else tokenizer.convert_ids_to_tokens(self.video_token_id)
        self.video_token: str | None = video_token

    def plan_images(self, image_sizes: Sequence[tuple[int, int]]) -> list[VisualPlan]:
        """The visual tokens of each image of a prompt, from the (height, width) of all of them."""
        raise NotImplementedError

    def plan_video(self, video: VideoShape, first_row: int) -> list[VisualPlan]:
        """The visual tokens of a video, one plan for each video token in :meth:`video_text`.

        Args:
            video: what is shown of it.
            first_row: how many rows of pixels of the prompt come before its own.
        """
        raise NotImplementedError

    def vision_of(self, prompt: Prompt, start: int, stop: int) -> dict[str, np.ndarray]:
        """The family's further plans of some rows of a prompt's pixels, whole images, as if they were all it has."""
        return {name: values[start:stop] for name, values in prompt.vision.items()}

    def pixels(self, images: Sequence[Image.Image], videos: Sequence[Sequence[Image.Image]] = ()) -> np.ndarray:
        """What the tower takes, float32 ``[P, ...]``, for all images and then all videos (their frames) of a prompt."""
        raise NotImplementedError

    def positions(self, is_visual: np.ndarray, plans: Sequence[VisualPlan]) -> np.ndarray | None:
        """Rotary positions of an expanded prompt, int32 ``[T, 3]``, from the places ``[T]`` of its visual tokens and
        their plans in order; None counts tokens.
        """
        return None

    def text(
        self,
        question: str,
        num_images: int,
        videos: Sequence[VideoShape] = (),
        history: Sequence[Exchange] = (),
    ) -> str:
        """The prompt as the model reads it: chat template with generation prompt, one image token per image.

        ``<image>`` and ``<video>`` marks in the question say where its images and videos belong; without marks the
        images come first, then the videos.

        Args:
            question: what the model is to answer.
            num_images, videos: of the whole prompt.
            history: turns before it; the first images and videos are theirs.

        Raises:
            UserError: marks do not match what there is, the model reads no videos, or the template writes no earlier
                answers.
        """
        self.check_videos(len(videos))
        messages = []
        for turn in history:
            messages.append(self._user(turn.question, turn.images, turn.videos))
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        earlier = sum(turn.images for turn in history), sum(turn.videos for turn in history)
        messages.append(self._user(question, num_images - earlier[0], len(videos) - earlier[1]))
        text = self._templated(messages)
        if history:
            # A template may leave out what the assistant said, which no error tells. An answer of one letter may stand
            # elsewhere in the prompt, too; this one stands nowhere.
            said = [{"role": "assistant", "content": [{"type": "text", "text": _NOWHERE}]}] * len(history)
            asked = messages[::2]
            blank = [message for pair in zip(asked, said, strict=False) for message in pair] + asked[-1:]
            if self._templated(blank).count(_NOWHERE) != len(history):
                raise UserError("the chat template leaves out what was answered before")
        if not videos or self.video_token is None:
            return text
        pieces = text.split(self.video_token)
        if len(pieces) != len(videos) + 1:
            raise UserError(
                f"the prompt has {len(pieces) - 1} video tokens for {len(videos)} videos; does its text contain "
                f"{self.video_token!r}, or does the chat template leave videos out?"
            )
        rest = (self.video_text(video) + piece for video, piece in zip(videos, pieces[1:], strict=True))
        return "".join([pieces[0], *rest])

    def _templated(self, messages: Sequence[Mapping[str, Any]]) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, chat_template=self.chat_template, add_generation_prompt=True, tokenize=False
                )
            )
        except Exception as error:  # a template is a program: it may be damaged, or raise on its own account
            raise UserError(f"the chat template refuses the prompt: {' '.join(str(error).split())[:200]}") from None

    def _user(self, question: str, num_images: int, num_videos: int) -> dict[str, Any]:
        """A message of the user."""
        content: list[dict[str, str]] = []
        for kind, mark, number in (("image", IMAGE_MARK, num_images), ("video", VIDEO_MARK, num_videos)):
            marks = question.count(mark)
            if marks not in (0, number):
                raise UserError(f"question has {marks} {mark} marks for {number} {kind}s: {question!r}")
            content += [] if marks else [{"type": kind}] * number
        text = question.replace(IMAGE_MARK, self.image_mark)
        if num_videos:
            text = text.replace(VIDEO_MARK, self.video_mark)
        return {"role": "user", "content": [*content, {"type": "text", "text": text}]}

    def check_videos(self, number: int) -> None:
        """Raise UserError if there are videos and the model reads none."""
        if number and self.video_token is None:
            raise UserError(
                "this model reads no videos (those that do: LLaVA-OneVision, Qwen2-VL, Qwen2.5-VL, Qwen3-VL)"
            )

    def video_text(self, video: VideoShape) -> str:
        """What stands for a video where the chat template has put its token."""
        return str(self.video_token)

    @property
    def image_mark(self) -> str:
        """What the chat template writes for an image."""
        return self.image_token

    @property
    def video_mark(self) -> str:
        """What the chat template writes for a video."""
        return str(self.video_token)

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Tokens that end an answer although no file of the checkpoint says so."""
        return ()

    def plan(
        self,
        question: str,
        image_sizes: Sequence[tuple[int, int]],
        videos: Sequence[VideoShape] = (),
        virtual: Sequence[int] = (),
        history: Sequence[Exchange] = (),
    ) -> Prompt:
        """Tokens and visual plan of a prompt, from the (height, width) of its images, the shapes of its videos, the
        number of virtual tokens at each of its marks, and the turns before it.
        """
        text = self.text(question, len(image_sizes), videos, history)
        if not virtual:
            return self.expand(self.encode_prompt(text), image_sizes, videos)
        # Where they go the tokenizer finds an image token: a token of its own in every vocabulary.
        ids = self.encode_prompt(text.replace(VIRTUAL_MARK, self.image_token))
        return self.expand(ids, image_sizes, videos, virtual_places(question, virtual))

    def expand(
        self,
        token_ids: Sequence[int] | np.ndarray,
        image_sizes: Sequence[tuple[int, int]],
        videos: Sequence[VideoShape] = (),
        virtual: Mapping[int, int] | None = None,
    ) -> Prompt:
        """Widen each image or video token of ``token_ids`` to the visual tokens that it stands for.

        Args:
            token_ids: of the whole prompt.
            image_sizes, videos: what is shown.
            virtual: image tokens that stand for virtual tokens instead: place among the image tokens -> how many.
        """
        if virtual:
            return self._with_virtual(np.asarray(token_ids, np.int32), image_sizes, videos, virtual)
        images = self.plan_images(image_sizes)
        clips: list[VisualPlan] = []
        media_rows = [plan.num_rows for plan in images]
        for video in videos:
            clips += (parts := self.plan_video(video, sum(media_rows)))
            media_rows.append(sum(part.num_rows for part in parts))
        ids = np.asarray(token_ids, np.int32)
        is_image = ids == self.config.image_token_id
        # In a prompt without videos their token is text like any other.
        is_clip = (ids == self.video_token_id) & bool(videos)
        if is_image.sum() != len(images):
            found = f"the prompt has {is_image.sum()} image tokens for {len(images)} images"
            named = f"{self.image_token!r} (token {self.config.image_token_id}, which config.json names for images)"
            if is_image.sum() > len(images):
                raise UserError(f"{found}; does its text contain {named}?")
            raise UserError(f"{found}: the chat template leaves images out, or writes something else than {named}")
        assert is_clip.sum() == len(clips)  # text() made sure
        stored = [*images, *clips]
        taps = max((plan.index.shape[1] for plan in stored), default=1)
        pieces: list[tuple[np.ndarray, ...]] = []
        start = 0
        places = np.flatnonzero(is_image | is_clip)
        plans = list(_in_order(is_clip[places], images, clips))
        for place, plan in zip(places.tolist(), plans, strict=True):
            pieces.append(_text_piece(ids[start:place], taps))
            short = ((0, 0), (0, taps - plan.index.shape[1]))
            token = np.full(len(plan.index), ids[place], np.int32)
            pieces.append((token, np.pad(plan.index, short), np.pad(plan.weight, short)))
            start = place + 1
        pieces.append(_text_piece(ids[start:], taps))
        expanded, index, weight = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
        names = stored[0].vision if stored else {}
        vision = {name: np.concatenate([plan.vision[name] for plan in stored]) for name in names}
        positions = self.positions(index[:, 0] >= 0, plans)
        return Prompt(expanded, sum(media_rows), index, weight, vision, positions, media_rows=tuple(media_rows))

    def _with_virtual(
        self,
        ids: np.ndarray,
        image_sizes: Sequence[tuple[int, int]],
        videos: Sequence[VideoShape],
        virtual: Mapping[int, int],
    ) -> Prompt:
        """Virtual tokens are text to everything else: they count one position each."""
        media = (self.config.image_token_id, self.video_token_id)
        filler = next(i for i in range(3) if i not in media)  # never looked at
        index = np.full(len(ids), -1, np.int32)
        places = np.flatnonzero(ids == self.config.image_token_id)
        start = sum(virtual.values())
        for which in sorted(virtual, reverse=True):
            start -= virtual[which]
            numbers = np.arange(start, start + virtual[which], dtype=np.int32)
            at = places[which]
            ids = np.concatenate([ids[:at], np.full(len(numbers), filler, np.int32), ids[at + 1 :]])
            index = np.concatenate([index[:at], numbers, index[at + 1 :]])
        prompt = self.expand(ids, image_sizes, videos)
        whole = np.full(len(prompt.token_ids), -1, np.int32)
        whole[prompt.visual_index[:, 0] < 0] = index[~self.is_media(ids, videos)]
        return replace(prompt, virtual_index=whole)

    def is_media(self, ids: np.ndarray, videos: Sequence[VideoShape] = ()) -> np.ndarray:
        """Which tokens stand for an image or a video, bool like ``ids``."""
        return (ids == self.config.image_token_id) | ((ids == self.video_token_id) & bool(videos))

    def encode(self, text: str) -> list[int]:
        """Token ids of text as it stands; no special tokens are added, but those written in it are read as such."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a whole prompt: with the tokenizer's first token (Llama's), unless the template wrote it."""
        bos = self.tokenizer.bos_token
        return self.tokenizer(text, add_special_tokens=bos is None or not text.startswith(bos), verbose=False)[
            "input_ids"
        ]


def virtual_places(question: str, virtual: Sequence[int]) -> dict[int, int]:
    """Where virtual tokens stand among a prompt's image tokens: place -> how many.

    Args:
        question: with a ``<demonstration>`` mark for each, and marks for its images if it has any.
        virtual: their numbers.

    Raises:
        UserError: there are not as many marks.
    """
    marks = re.findall(f"{re.escape(IMAGE_MARK)}|{re.escape(VIRTUAL_MARK)}", question)
    places = [place for place, mark in enumerate(marks) if mark == VIRTUAL_MARK]
    if len(places) != len(virtual):
        raise UserError(f"question has {len(places)} {VIRTUAL_MARK} marks for {len(virtual)}: {question!r}")
    return dict(zip(places, virtual, strict=True))


def _in_order(is_clip: np.ndarray, images: list[VisualPlan], clips: list[VisualPlan]) -> Iterator[VisualPlan]:
    """The plans in the order of the prompt."""
    remaining = {False: iter(images), True: iter(clips)}
    for which in is_clip.tolist():
        yield next(remaining[which])


def _text_piece(ids: np.ndarray, taps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    shape = (len(ids), taps)
    return ids, np.full(shape, -1, np.int32), np.zeros(shape, np.float32)


def image_settings(image_processor: Any) -> dict[str, Any]:
    """Everything that decides what an image processor of transformers does."""
    kinds = (int, float, str, bool, list, dict)
    return {key: value for key, value in image_processor.to_dict().items() if isinstance(value, kinds)}


class NamedImageProcessor:
    """Loads transformers' PIL image processor of the class that ``preprocessor_config.json`` names."""

    @staticmethod
    def from_pretrained(directory: Path) -> Any:
        from transformers import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(directory, backend="pil", trust_remote_code=False)


def load_processor(directory: str | Path, config: Mapping[str, Any] | None = None) -> Processor:
    """The processor of a checkpoint directory.

    Args:
        directory: holds the tokenizer, a chat template and ``preprocessor_config.json``.
        config: its raw ``config.json``, read if not given.

    Raises:
        UserError: a file is missing or unreadable.
    """
    from sav_jax.models.registry import architecture, read_config

    directory = Path(directory)
    arch = architecture(read_config(directory) if config is None else config)
    with quiet_transformers():
        from transformers import AutoTokenizer

        tokenizer = load_part(directory, "tokenizer", arch.load_tokenizer or AutoTokenizer.from_pretrained)
        image_processor = load_part(directory, "image processor", arch.image_processor_class().from_pretrained)
    token_id = arch.config.image_token_id
    if tokenizer.convert_ids_to_tokens(token_id) is None:
        raise UserError(f"{directory}: its tokenizer has no image token (no token {token_id}, which config.json names)")
    template = _chat_template(directory, tokenizer)
    if arch.video_defaults is None:
        return arch.processor(arch.config, tokenizer, image_processor, template)
    video_processor = load_part(
        directory,
        "settings for videos",
        lambda _: type(image_processor)(**{**arch.video_defaults, **video_settings(directory)}),
    )
    return arch.processor(arch.config, tokenizer, image_processor, template, video_processor)


def load_part(directory: Path, what: str, loader: Any) -> Any:
    """``loader(directory)``.

    Raises:
        UserError: it fails; says that ``what`` cannot be loaded, and why.
    """
    try:
        return loader(directory)
    except Exception as error:  # transformers and tokenizers raise many types
        raise UserError(f"{directory}: cannot load its {what} ({' '.join(str(error).split())[:200]})") from None


def _chat_template(directory: Path, tokenizer: Any) -> str:
    """From where processors keep it (a file of its own, by newer and older names) or from the tokenizer."""
    jinja = directory / "chat_template.jinja"
    if jinja.exists():
        return _not_empty(jinja.read_text(), jinja)
    for file in (directory / "chat_template.json", directory / "processor_config.json"):
        try:
            template = json.loads(file.read_text()).get("chat_template") if file.exists() else None
        except ValueError as error:
            raise UserError(f"{file}: unreadable ({error})") from None
        if isinstance(template, str):
            return _not_empty(template, file)
    if isinstance(tokenizer.chat_template, str):
        return _not_empty(tokenizer.chat_template, directory / "tokenizer_config.json")
    raise UserError(
        f"{directory}: no chat template (chat_template.jinja, chat_template.json or in tokenizer_config.json)"
    )


def _not_empty(template: str, file: Path) -> str:
    if not template.strip():
        raise UserError(f"{file}: the chat template is empty")
    return template
