"""Documents of AIM's training: several pairs of images and text each.

Three kinds of files are read: interleaved documents (JSON list or JSON Lines of ``{"segments": [{"image": path, "text":
str, "question"?: str}, ...]}``), conversations in LLaVA's format (the first answer of each about its images; captions,
for example) and labelled rows. Rows of the last two are put together, so many in a document, in an order drawn by seed.

For the bundled model documents are drawn (:func:`drawn_documents`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sav_jax._storage import AnyPath, Location, file_finder, location, storage_errors
from sav_jax.errors import UserError
from sav_jax.examples import IMAGE_MARK, Example, path_problem, place_of
from sav_jax.jsonrows import json_kind, json_rows, misspelt
from sav_jax.train.aim import Document
from sav_jax.train.chats import read_chats
from sav_jax.world.scene import Scene, draw, sample_scene

_ORDER = 29  # distinguishes the draws of rows that share a document
_SEEDS = 40 * 10**9  # first seed of drawn documents, beyond those of training and tasks


def read_documents(path: AnyPath, image_folder: AnyPath | None = None, pairs: int = 9, seed: int = 0) -> list[Document]:
    """Read a file of documents, or put the rows of one together.

    Args:
        path: the file.
        image_folder: what relative image paths are relative to; the file's own folder by default.
        pairs: of a document that is made of single rows; what is left over at the end is left out.
        seed: of the order of the rows.

    Raises:
        UserError: naming file, line and field of the first problem, and how many more rows are bad.
    """
    path = location(path)
    with storage_errors(path):
        first = None if path.is_dir() else next(iter(json_rows(path)), None)
    if first is None or not (isinstance(first[1], dict) and "segments" in first[1]):
        rows = [_pair_of(chat.turns[0].text, chat.turns[1].text, chat.media) for chat in read_chats(path, image_folder)]
        if len(rows) < pairs:
            raise UserError(f"{path}: {len(rows)} rows do not fill a document of {pairs} pairs")
        return grouped(rows, pairs, seed)
    folder, is_file = location(image_folder or path.parent), file_finder()
    documents, problems = [], []
    for source, row in json_rows(path):
        try:
            documents.append(_document(source, row, folder, is_file))
        except UserError as error:
            problems.append(str(error))
    if problems:
        more = len(problems) - 1
        raise UserError(problems[0] + (f" (and {more} more bad row{'s'[: more != 1]})" if more else ""))
    return documents


def grouped(rows: Sequence[Example], pairs: int, seed: int) -> list[Document]:
    """Documents of ``pairs`` rows each, in an order drawn by seed."""
    order = np.random.default_rng([seed, _ORDER]).permutation(len(rows)).tolist()
    return [tuple(rows[i] for i in order[at : at + pairs]) for at in range(0, len(rows) - pairs + 1, pairs)]


def _pair_of(question: str, answer: str, media: Example) -> Example:
    return dataclasses.replace(media, question=question, label=answer)


def _document(source: str, row: Any, folder: Location, is_file: Callable[[Location], bool]) -> Document:
    if isinstance(row, UserError):
        raise row
    segments = row.get("segments") if isinstance(row, dict) else None
    if not isinstance(segments, list) or len(segments) < 2:
        raise UserError(f'{source}: field "segments" must be a list of at least two objects')
    pairs = []
    for place, segment in enumerate(segments):
        where = f'{source}: field "segments", item {place}'
        if not isinstance(segment, dict):
            raise UserError(f"{where}: must be an object, not {json_kind(segment)}")
        if wrong := misspelt(segment, ("image", "text", "question")):
            raise UserError(f'{where}: field "{wrong[0]}" is not known; is "{wrong[1]}" meant?')
        image, text, question = segment.get("image"), segment.get("text"), segment.get("question", IMAGE_MARK)
        if not isinstance(text, str) or not text.strip():
            raise UserError(f'{where}: field "text" must be a text that is not empty')
        if not isinstance(question, str):
            raise UserError(f'{where}: field "question" must be a text, not {json_kind(question)}')
        if not isinstance(image, str):
            raise UserError(f'{where}: field "image" must be a path, not {json_kind(image)}')
        if problem := path_problem(folder, image, is_file):
            raise UserError(f'{where}: field "image" {problem}')
        shown = (place_of(folder, image),)
        pairs.append(Example(question, shown, text, id=str(place), source=f"{source}, item {place}"))
    return tuple(pairs)


ATTRIBUTES: Mapping[str, Callable[[Scene], str | None]] = {
    "name": lambda scene: scene.thing.name,
    "category": lambda scene: scene.thing.category,
    "color": lambda scene: scene.thing.color,
    "background": lambda scene: scene.background,
    "size": lambda scene: scene.thing.size if scene.kind == "shape" else None,
    "texture": lambda scene: scene.thing.texture if scene.kind == "shape" and scene.thing.size == "large" else None,
    "place": lambda scene: (scene.place or None) if scene.kind == "shape" else None,
}
"""What may be asked about a scene of one thing; None where the scene does not say."""
UNSAID = ("what is it?", "what is this?", "say it.", "answer.")
"""Questions that do not say which of them is meant: only the demonstrations do."""


def drawn_pairs(
    attribute: str, kinds: Sequence[tuple[str, str]], number: int, first: int, question: str, held_out: bool = False
) -> Document:
    """Scenes with one attribute as their text.

    Args:
        attribute: of :data:`ATTRIBUTES`.
        kinds: (kind of scene, what it shows), taking turns at random.
        number: how many.
        first: seeds of the scenes count from here.
        question: the same about all.
        held_out: glyphs in faces that the bundled model has not seen.
    """
    pairs: list[Example] = []
    seed = first
    while len(pairs) < number:
        kind, category = kinds[int(np.random.default_rng([seed, 3]).integers(len(kinds)))]
        scene = sample_scene(seed, kind, category=None if kind == "shape" else category, held_out=held_out)
        text = ATTRIBUTES[attribute](scene)
        if text is not None:
            pairs.append(Example(question, (draw(scene),), text, id=str(seed), source=f"drawn scene {seed}"))
        seed += 1
    return tuple(pairs)


TRAINING_KINDS = (("shape", "shape"), ("glyph", "letter"))
"""What drawn documents show: shapes and letters, no digits."""


def drawn_documents(number: int, pairs: int, seed: int) -> list[Document]:
    """Documents for the bundled model: scenes whose texts all say the same kind of thing, which no question names.

    Args:
        number: of documents.
        pairs: of each.
        seed: of everything.
    """
    documents = []
    for i in range(number):
        rng = np.random.default_rng([seed, i, 23])
        attribute = list(ATTRIBUTES)[int(rng.integers(len(ATTRIBUTES)))]
        kinds = TRAINING_KINDS[:1] if attribute in ("size", "texture", "place") else TRAINING_KINDS
        question = UNSAID[int(rng.integers(len(UNSAID)))]
        first = _SEEDS + (seed * 10**6 + i) * 10**3
        documents.append(drawn_pairs(attribute, kinds, pairs, first, question))
    return documents
