"""Prompts that begin alike, read together: the images and the text before them once, then only the questions.

The prompts of a *pack* share their tokens up to the last visual one, and their images. They become one sequence, the
shared part and then the rest of every prompt, each with the rotary positions it has when alone; a question sees the
shared part and itself (``Batch.segments``). What is read at the end of each is what the prompt alone would give, up to
the order of additions.

Packs depend on the list of prompts and its order alone, so that a resumed run makes the same ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sav_jax.models.processor import Prompt

MAX_READS = 8
"""Prompts of a pack: a ninth would save an eighth of what the second saves."""


@dataclass(frozen=True)
class Pack:
    """Prompts that are read together.

    Attributes:
        prompt: their tokens in one sequence; of a lone prompt, itself.
        members: which prompts these are, in the order of ``prompt.reads``. The images are those of the first.
    """

    prompt: Prompt
    members: tuple[int, ...]


def pack(prompts: Sequence[Prompt], media: Sequence[Sequence[str]]) -> list[Pack]:
    """Put prompts together that share their images and all text before the last of them.

    Args:
        prompts: E prompts.
        media: digests of each prompt's images and videos.

    Returns:
        Packs that hold every prompt once, in the order of their first members.
    """
    groups: dict[str, list[int]] = {}
    for row, (prompt, digests) in enumerate(zip(prompts, media, strict=True)):
        shared = shared_length(prompt)
        # What is not shared must not be the most of it: then there is little to save, and much to look past.
        if prompt.virtual_index is not None or not 0 < len(prompt.token_ids) - shared <= 3 * shared:
            groups[str(row)] = [row]
            continue
        key = hashlib.sha256("\n".join(digests).encode() + b"\0" + prompt.token_ids[:shared].tobytes()).hexdigest()
        groups.setdefault(key, []).append(row)
    packs = []
    for rows in groups.values():
        for start in range(0, len(rows), MAX_READS):
            members = tuple(rows[start : start + MAX_READS])
            packs.append(Pack(_joined([prompts[row] for row in members]), members))
    return sorted(packs, key=lambda one: one.members)


def shared_length(prompt: Prompt) -> int:
    """Tokens up to the last visual one; 0 in a prompt without any."""
    visual = np.flatnonzero(prompt.visual_index[:, 0] >= 0)
    return int(visual[-1]) + 1 if len(visual) else 0


def _joined(prompts: Sequence[Prompt]) -> Prompt:
    """One sequence of prompts that share their beginning."""
    first = prompts[0]
    if len(prompts) == 1:
        return first
    shared = shared_length(first)
    rests = [len(prompt.token_ids) - shared for prompt in prompts]

    def join(parts: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([parts[0][:shared], *(part[shared:] for part in parts)])

    places = [np.arange(len(p.token_ids), dtype=np.int32) if p.positions is None else p.positions for p in prompts]
    return replace(
        first,
        token_ids=join([prompt.token_ids for prompt in prompts]),
        visual_index=join([prompt.visual_index for prompt in prompts]),
        visual_weight=join([prompt.visual_weight for prompt in prompts]),
        positions=join(places),
        segments=np.repeat(np.arange(len(prompts) + 1, dtype=np.int32), [shared, *rests]),
        reads=tuple((shared + np.cumsum(rests) - 1).tolist()),
    )
