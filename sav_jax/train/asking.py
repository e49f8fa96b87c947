"""The questions that a model asks about an image, once SQ-LLaVA's training has taught it to (arXiv 2403.11299).

As released (its ``demo/visual_questioning.py``): the model first describes the image, its likeliest tokens; then the
role ``VUSER`` follows, whose turn it writes several times over, drawn at temperature 1.2 from the 300 likeliest tokens
within the nucleus of 0.95. Prompts are beginnings of the conversations it was trained on (:mod:`sav_jax.train.chats`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sav_jax.errors import UserError
from sav_jax.examples import IMAGE_MARK, Example
from sav_jax.generation import check_sampling, generate
from sav_jax.lmm import LMM
from sav_jax.train.chats import VICUNA_SQ, Chat, ChatFormat, Turn, prompt_of

DESCRIBE = "Can you describe the image in detail?"
"""The released first question (part of the method: no first question of a conversation is one that a model asks)."""


@dataclass(frozen=True)
class Sampling:
    """How questions are drawn; the released settings.

    Attributes:
        temperature, top_k, top_p, max_new_tokens, seed: see :func:`sav_jax.generate`; temperature 0 asks the likeliest
            question every time.
        description_tokens: longest description.
    """

    temperature: float = 1.2
    top_k: int | None = 300
    top_p: float | None = 0.95
    max_new_tokens: int = 300
    seed: int = 0
    description_tokens: int = 1024


@dataclass(frozen=True)
class Asked:
    """What the model said about an image: its description, and the questions it then asked."""

    description: str
    questions: tuple[str, ...]


def ask(
    lmm: LMM,
    examples: Sequence[Example],
    num_questions: int = 5,
    form: ChatFormat = VICUNA_SQ,
    sampling: Sampling | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> list[Asked]:
    """Have a model ask about images.

    Args:
        lmm: the model; one that was trained to ask.
        examples: E examples of one or more images each; their questions and labels are not used.
        num_questions: how many questions are drawn for each.
        form: how conversations were written in training.
        sampling: how questions are drawn.
        batch_size: prompts decoded together.
        progress: show bars on stderr.

    Returns:
        E :class:`Asked`, in order. An example's questions depend on the seed and its place.

    Raises:
        UserError: an image cannot be read, an option is out of range, or there is no room for a question.
    """
    if num_questions < 1:
        raise UserError(f"num_questions must be at least 1, not {num_questions}")
    drawn = sampling or Sampling()
    if drawn.description_tokens < 1:
        raise UserError(f"description_tokens must be at least 1, not {drawn.description_tokens}")
    check_sampling(drawn.max_new_tokens, drawn.temperature, drawn.top_k, drawn.top_p, drawn.seed)  # before it describes
    chats = [Chat((Turn("user", DESCRIBE),), example) for example in examples]
    prompts = [prompt_of(lmm.processor, chat, form, "assistant") for chat in chats]
    headers = [len(prompt_of(lmm.processor, _told(chat, ""), form, "vuser").token_ids) for chat in chats]
    room = drawn.description_tokens
    if lmm.max_tokens is not None and headers:
        # Description and question share what the model's positions leave.
        room = min(room, lmm.max_tokens - max(headers) - drawn.max_new_tokens)
        if room < 1:
            raise UserError(
                f"{lmm.name} reads at most {lmm.max_tokens} tokens: too few for a prompt of {max(headers)} and "
                f"questions of {drawn.max_new_tokens}"
            )
    told = generate(lmm, examples, room, batch_size=batch_size, progress=progress, prompts=prompts)
    descriptions = [_said(one.text, form.assistant_end) for one in told]
    again = [
        prompt_of(lmm.processor, _told(chat, text), form, "vuser")
        for chat, text in zip(chats, descriptions, strict=True)
    ]
    questions = generate(
        lmm,
        [example for example in examples for _ in range(num_questions)],
        drawn.max_new_tokens,
        temperature=drawn.temperature,
        top_k=drawn.top_k,
        top_p=drawn.top_p,
        seed=drawn.seed,
        batch_size=batch_size,
        progress=progress,
        prompts=[prompt for prompt in again for _ in range(num_questions)],
    )
    texts = [_said(question.text, form.vuser_end) for question in questions]
    return [
        Asked(text, tuple(texts[row * num_questions : (row + 1) * num_questions]))
        for row, text in enumerate(descriptions)
    ]


def conversation_of(model: Path) -> str:
    """How a tuned model's conversations were written: as the run says that wrote the checkpoint, by default as
    SQ-LLaVA was released ("vicuna-sq").
    """
    try:
        run = json.loads((model.absolute().parent / "run.json").read_text())
        found = run["recipe"]["conversation"]
    except (OSError, ValueError, KeyError, TypeError):
        return "vicuna-sq"
    return found if found in ("template", "vicuna-sq") else "vicuna-sq"


def _told(chat: Chat, description: str) -> Chat:
    return Chat((*chat.turns, Turn("assistant", description)), chat.media)


def _said(text: str, end: str) -> str:
    """Without the end of the turn, should the tokenizer have no token for it, and what follows; nor marks of images."""
    end = end.strip()
    return (text.partition(end)[0] if end else text).replace(IMAGE_MARK, "").strip()
