"""Embeddings of dual encoders, kept by content: every distinct image and text is embedded once.

Axes: X images or texts, W width of the embeddings.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import PIL.Image
from tqdm import tqdm

from sav_jax.dual_encoder import DualEncoder
from sav_jax.examples import Example
from sav_jax.headstore import HeadStore

_VERSION = "embedding 1"
"""Part of every cache key; raised when the meaning or the numbers of embeddings change."""

_BATCH = 32  # an encoder's rows are short; an LMM's batch size says nothing about it


class Embeddings:
    """A dual encoder, and what it has made of images and texts so far.

    Attributes:
      encoder: the encoder.
      computed: images and texts that were run through it; all others were known or in the cache.
    """

    def __init__(self, encoder: DualEncoder, cache: str | None = None) -> None:
        self.encoder = encoder
        self.computed = 0
        self._store = HeadStore.open(f"{cache.rstrip('/')}/embeddings") if cache else None
        self._known: dict[str, np.ndarray] = {}

    def images(self, examples: Sequence[Example]) -> list[np.ndarray]:
        """Unit vectors of each example's images, float32 [X, W] per example.

        Raises:
          UserError: an image cannot be read.
        """
        keys = [[self._key("image", digest) for digest in example.image_digests()] for example in examples]
        missing = self._missing([key for of_example in keys for key in of_example])
        waiting: dict[str, PIL.Image.Image] = {}
        bar = tqdm(
            total=len(missing),
            desc="images",
            unit=" images",
            file=sys.stderr,
            disable=not missing or jax.process_index() != 0,
            mininterval=0.5,
        )
        with bar:
            for of_example, example in zip(keys, examples, strict=True):
                if missing.isdisjoint(of_example):
                    continue
                for key, image in zip(of_example, example.load_images(), strict=True):
                    if key in missing:
                        missing.remove(key)
                        waiting[key] = image
                if len(waiting) >= _BATCH or not missing:
                    self._embed(waiting, self.encoder.embed_images)
                    bar.update(len(waiting))
                    waiting = {}
        width = self.encoder.config.embedding_size
        return [np.array([self._known[key] for key in of]).reshape(-1, width) for of in keys]

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors of texts, float32 [X, W]."""
        keys = [self._key("text", text) for text in texts]
        missing = self._missing(keys)
        self._embed(
            {key: text for key, text in zip(keys, texts, strict=True) if key in missing}, self.encoder.embed_texts
        )
        return np.array([self._known[key] for key in keys])

    def _key(self, kind: str, content: str) -> str:
        facts = (_VERSION, self.encoder.fingerprint, str(self.encoder.dtype), kind, content)
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()

    def _missing(self, keys: Sequence[str]) -> set[str]:
        """Keys that must be embedded; those in the cache become known."""
        unknown = [key for key in dict.fromkeys(keys) if key not in self._known]
        if self._store is None or not unknown:
            return set(unknown)
        absent = {unknown[i] for i in self._store.missing(unknown)}
        stored = [key for key in unknown if key not in absent]
        if stored:
            self._known.update(zip(stored, self._store.read(stored)[:, 0, 0], strict=True))
        return absent

    def _embed(self, items: dict[str, Any], embed: Callable[[list[Any], int], np.ndarray]) -> None:
        for keys in _parts(list(items)):
            vectors = embed([items[key] for key in keys], _BATCH)
            self.computed += len(keys)
            self._known.update(zip(keys, vectors, strict=True))
            if self._store is not None:
                self._store.write(keys, vectors[:, None, None])


def _parts(keys: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(keys), _BATCH):
        yield keys[start : start + _BATCH]
