"""Conversations about images, and which of their tokens a model is trained to predict.

Two kinds of files are read: LLaVA's instruction data (a JSON list or JSON Lines of ``{"id", "image", "conversations":
[{"from": "human" | "gpt", "value": text}, ...]}``) and the labelled rows of :func:`sav_jax.read_examples`, whose answer
is the label.

A conversation is written out as one text; characters that are to be predicted are noted as spans, and a token is a
target if it covers any of them. So masks follow the text and not the habits of a tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sav_jax._storage import AnyPath, Location, file_finder, location, storage_errors
from sav_jax.errors import UserError
from sav_jax.examples import IMAGE_MARK, Example, path_problem, place_of, read_examples
from sav_jax.jsonrows import json_kind, json_rows, misspelt
from sav_jax.models.processor import Processor, Prompt

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class Turn:
    """What one side says: ``role`` is "user", "assistant" or "vuser" (a question that the model learns to ask)."""

    role: str
    text: str


@dataclass(frozen=True)
class Chat:
    """A conversation that begins with the user and ends with the assistant.

    Attributes:
        turns: user and assistant in turn. Texts may hold ``<image>`` marks; without any the images come first.
        media: the images, as an :class:`Example` whose question is not used.
    """

    turns: tuple[Turn, ...]
    media: Example

    @property
    def source(self) -> str:
        return self.media.source

    @property
    def has_image(self) -> bool:
        return bool(self.media.images or self.media.videos)


def read_chats(path: AnyPath, image_folder: AnyPath | None = None) -> list[Chat]:
    """Read a file of conversations or of labelled examples.

    Args:
        path: the file.
        image_folder: what relative image paths are relative to; the file's own folder by default.

    Raises:
        UserError: naming file, line and field of the first problem, and how many more rows are bad.
    """
    path = location(path)
    with storage_errors(path):
        if path.is_dir():
            raise UserError(f"{path}: is a folder; a file of conversations or labelled rows is expected")
    first = next((row for _, row in json_rows(path)), None)
    if not isinstance(first, dict) or not ("conversations" in first or misspelt(first, ("conversations",))):
        return [chat_of(example) for example in read_examples(path, require_labels=True, media_folder=image_folder)]
    folder, is_file = location(image_folder or path.parent), file_finder()
    chats, problems = [], []
    for number, (source, row) in enumerate(json_rows(path)):
        try:
            chats.append(_chat(source, number, row, folder, is_file))
        except UserError as error:
            problems.append(str(error))
    if problems:
        more = len(problems) - 1
        raise UserError(problems[0] + (f" (and {more} more bad row{'s'[: more != 1]})" if more else ""))
    return chats


def chat_of(example: Example, answer: str | None = None) -> Chat:
    """The question of a labelled example and its answer, by default its label."""
    answer = example.label if answer is None else answer
    if answer is None:
        raise UserError(f'{example.source or "example"}: field "label" is missing')
    return Chat((Turn("user", example.question), Turn("assistant", answer)), example)


def _chat(source: str, number: int, row: Any, folder: Location, is_file: Callable[[Location], bool]) -> Chat:
    if isinstance(row, UserError):
        raise row
    if not isinstance(row, dict):
        raise UserError(f"{source}: a JSON object is expected, not {json_kind(row)}")
    if wrong := misspelt(row, ("conversations", "image")):
        raise UserError(f'{source}: field "{wrong[0]}" is not known; is "{wrong[1]}" meant?')
    if row.get("video") or row.get("videos"):
        raise UserError(f'{source}: field "video" is read from labelled rows only, not from conversations')
    said = row.get("conversations")
    if not isinstance(said, list) or not said:
        raise UserError(f'{source}: field "conversations" must be a list of turns')
    turns = []
    for place, turn in enumerate(said):
        where = f'{source}: field "conversations", turn {place}'
        if not isinstance(turn, dict):
            raise UserError(f'{where}: must be an object with "from" and "value", not {json_kind(turn)}')
        for key in ("from", "value"):
            if key not in turn:
                raise UserError(f'{where}: "{key}" is missing')
        if not isinstance(turn["value"], str):
            raise UserError(f'{where}: "value" must be a string, not {json_kind(turn["value"])}')
        role = ROLES.get(str(turn.get("from")))
        if role is None:
            raise UserError(f"{where}: speaker {turn.get('from')!r} is not known (known: human, gpt)")
        if role != ("user", "assistant")[place % 2]:
            raise UserError(f"{where}: human and gpt must take turns, human first")
        if not turn["value"].strip():
            raise UserError(f"{where}: says nothing")
        turns.append(Turn(role, turn["value"]))
    if len(turns) % 2:
        # LLaVA's own data has a few: what is asked last is never answered.
        turns.pop()
    if not turns:
        raise UserError(f"{source}: nothing is answered")
    given = row.get("image")
    images = given if isinstance(given, list) else [] if given is None else [given]
    for item in images:
        if not isinstance(item, str):
            raise UserError(f'{source}: field "image" must be a path or a list of paths, not {json_kind(item)}')
        if problem := path_problem(folder, item, is_file):
            raise UserError(f'{source}: field "image" {problem}')
    marks = sum(turn.text.count(IMAGE_MARK) for turn in turns)
    if marks not in (0, len(images)):
        raise UserError(
            f'{source}: field "conversations" holds {marks} {IMAGE_MARK} mark{"s"[: marks != 1]} for {len(images)} '
            f'image{"s"[: len(images) != 1]} in field "image"'
        )
    name = str(row.get("id", number))
    media = Example("-", tuple(place_of(folder, item) for item in images), id=name, source=source)
    return Chat(tuple(turns), media)


@dataclass(frozen=True)
class ChatFormat:
    """What stands between the turns.

    Attributes:
        system: in front of everything.
        user, vuser: in front of a question, asked by the user or by the model.
        vuser_end: behind a question the model asks: the part it learns to write.
        vuser_after: and what then follows, up to the answer.
        assistant: between a question and its answer.
        answer_lead: what the model writes before the answer's own text (a space, in some templates).
        assistant_end: behind an answer: the part it learns to write, so that it stops.
        assistant_after: and what then follows.
        first: whole text up to the first answer, from the question and the number of images, where the checkpoint's
            own template writes it; None: written like the other turns, with the images' marks in front.
    """

    system: str
    user: str
    assistant: str
    assistant_end: str
    vuser: str
    vuser_end: str
    vuser_after: str
    answer_lead: str = ""
    assistant_after: str = ""
    first: Callable[[str, int], str] | None = None


_SYSTEM_SQ = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
    "Also, the artificial intelligence assistant is a curious virtual user. The virtual user asks complex questions "
    "that are relevant to the content in the image, for example, asking about background knowledge of the objects in "
    "the image, asking to discuss about events happening in the image, etc. Again, do not ask about uncertain details."
)
VICUNA_SQ = ChatFormat(
    system=_SYSTEM_SQ + " ",
    user="USER: ",
    assistant=" ASSISTANT:",
    answer_lead=" ",
    assistant_end="</s>",
    vuser="VUSER: ",
    vuser_end="</s>",
    vuser_after=" ASSISTANT:",
)
"""SQ-LLaVA's conversations as released (its ``conv_vicuna_v1_sq``; the prompt is part of the method)."""


def chat_format(processor: Processor, stop_token_ids: Sequence[int] = ()) -> ChatFormat:
    """How the checkpoint's own chat template writes conversations, found out by having it write one.

    Args:
        processor: of the model.
        stop_token_ids: tokens that end an answer; the first is put behind answers if the template puts none there.

    Raises:
        UserError: the template does not keep turns apart.
    """
    said = "Question one", "Answer one", "Question two", "Answer two"
    whole = _applied(processor, said, False)
    try:
        head, between, after, between_again, tail = _split(whole, said)
        opening, prompt = _split(_applied(processor, said[:1], True), said[:1])
    except ValueError:
        raise UserError("the chat template does not write out a conversation turn by turn") from None
    # What the model is given before it answers; the rest of what stands before an answer it has to write.
    lead = between[len(prompt) :] if between.startswith(prompt) else ""
    stop_texts = [processor.tokenizer.convert_ids_to_tokens(token) for token in stop_token_ids]
    stops = [text for text in stop_texts if text]
    found = [tail.find(stop) + len(stop) for stop in stops if stop in tail]
    user = after[len(tail) :] if after.startswith(tail) else after.lstrip()
    if between != between_again or opening != head or not user or not head.endswith(user):
        raise UserError("the chat template does not write every turn alike")
    end = tail[: min(found)] if found else (stops[0] if stops else "")
    asking = _asking(user)
    return ChatFormat(
        system=head.removesuffix(user),
        user=user,
        assistant=prompt,
        answer_lead=lead,
        assistant_end=end,
        assistant_after=tail.removeprefix(end),
        vuser=asking,
        # A question ends as an answer does; if the template has ended it so already, not twice.
        vuser_end=end,
        vuser_after=prompt.removeprefix(end),
        first=lambda question, images: processor.text(question, images),
    )


def format_called(name: str, processor: Processor, stop_token_ids: Sequence[int] = ()) -> ChatFormat:
    """``"vicuna-sq"``: as SQ-LLaVA was released; ``"template"``: as the checkpoint's own template writes it."""
    return VICUNA_SQ if name == "vicuna-sq" else chat_format(processor, stop_token_ids)


def _asking(user: str) -> str:
    """The header of a question that the model asks itself: "VUSER: " for "USER: "."""
    for name, own in (
        ("USER", "VUSER"),
        ("User", "Vuser"),
        ("user", "vuser"),
        ("HUMAN", "VHUMAN"),
        ("human", "vhuman"),
    ):
        if name in user:
            return user.replace(name, own, 1)
    return "VUSER: " + user


def _applied(processor: Processor, said: Sequence[str], prompt: bool) -> str:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": [{"type": "text", "text": text}]} for i, text in enumerate(said)]
    try:
        return processor.tokenizer.apply_chat_template(
            messages, chat_template=processor.chat_template, add_generation_prompt=prompt, tokenize=False
        )
    except Exception as error:  # a template is a program
        raise UserError(f"the chat template refuses a conversation: {' '.join(str(error).split())[:200]}") from None


def _split(text: str, parts: Sequence[str]) -> Iterator[str]:
    pieces = []
    for part in parts:
        piece, found, text = text.partition(part)
        if not found:
            raise ValueError(part)
        pieces.append(piece)
    return iter([*pieces, text])


def written(chat: Chat, form: ChatFormat, image_mark: str) -> tuple[str, list[tuple[int, int]]]:
    """The whole conversation as one text, and the spans of it that the model learns to write.

    Args:
        chat: turns; those of role "vuser" are learned, too.
        form: what stands between them.
        image_mark: what the model's text has for an image.
    """
    marked = any(IMAGE_MARK in turn.text for turn in chat.turns)
    number = len(chat.media.images)
    text, spans = "", []
    for place, turn in enumerate(chat.turns):
        said = turn.text
        if place == 0:
            if form.first is not None:
                # Marks of images that come later must not be counted here.
                text = form.first(said, said.count(IMAGE_MARK) if marked else number)
                continue
            text = form.system
            said = said if marked else f"{IMAGE_MARK}\n" * number + said
        said = said.replace(IMAGE_MARK, image_mark)
        if turn.role == "user":
            text += form.user + said + form.assistant
        elif turn.role == "vuser":
            text += form.vuser
            start = len(text)
            text += said + form.vuser_end
            spans.append((start, len(text)))
            text += form.vuser_after
        else:
            start = len(text)
            text += form.answer_lead + said + form.assistant_end
            spans.append((start, len(text)))
            text += form.assistant_after
    return text, spans


def with_questions(chat: Chat, ratio: float, rng: np.random.Generator) -> Chat:
    """Turn questions into ones the model learns to ask, each with probability ``ratio``: of a conversation about an
    image, all but the first (SQ-LLaVA, arXiv 2403.11299, section 3.1).
    """
    turns = [
        replace(turn, role="vuser")
        if chat.has_image and place and turn.role == "user" and rng.random() < ratio
        else turn
        for place, turn in enumerate(chat.turns)
    ]
    return replace(chat, turns=tuple(turns))


@dataclass(frozen=True)
class Lesson:
    """A conversation ready for training.

    Attributes:
        prompt: tokens and visual plan.
        targets: int32 ``[T]``: the token itself where it is to be predicted, else -1.
    """

    prompt: Prompt
    targets: np.ndarray


def lesson(processor: Processor, chat: Chat, form: ChatFormat, max_tokens: int | None = None) -> Lesson:
    """Tokens, visual plan and targets of a conversation.

    Args:
        processor: of the model.
        chat: the conversation.
        form: how it is written.
        max_tokens: cut behind so many.

    Raises:
        UserError: an image cannot be read, or nothing to be learned is left after the cut.
    """
    text, spans = written(chat, form, processor.image_mark)
    bos = processor.tokenizer.bos_token
    encoded = processor.tokenizer(
        text,
        add_special_tokens=bos is None or not text.startswith(bos),
        return_offsets_mapping=True,
        verbose=False,
    )
    ids = np.asarray(encoded["input_ids"], np.int32)
    offsets = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    learned = np.zeros(len(ids), bool)
    for start, stop in spans:
        learned |= (offsets[:, 0] < stop) & (start < offsets[:, 1])
    prompt = processor.expand(encoded["input_ids"], chat.media.image_sizes())
    placeholder = ids == processor.config.image_token_id
    targets = np.full(len(prompt.token_ids), -1, np.int32)
    targets[prompt.visual_index[:, 0] < 0] = np.where(learned, ids, -1)[~placeholder]
    cut = len(targets) if max_tokens is None else max_tokens
    if not (targets[:cut] >= 0).any():
        raise UserError(f"{chat.source or 'a conversation'}: nothing is to be learned within {cut} tokens")
    return Lesson(prompt.cut(cut), targets[:cut])


def prompt_of(processor: Processor, chat: Chat, form: ChatFormat, role: str) -> Prompt:
    """What a model is given to say the next turn of a conversation: the tokens of the conversation it was trained on,
    up to the first that it would have learned.

    A prompt of its own text would not do: where a header ends in a space, as "VUSER: " does, tokenizers join the space
    to the word that follows.

    Args:
        processor: of the model.
        chat: what has been said.
        form: how it is written.
        role: who speaks next: "assistant" or "vuser" (the model asks).

    Raises:
        UserError: an image cannot be read.
    """
    made = lesson(processor, replace(chat, turns=(*chat.turns, Turn(role, "What"))), form)
    learned = made.targets >= 0
    last = int(np.flatnonzero(learned & ~np.append(False, learned[:-1]))[-1])
    return made.prompt.cut(last)
