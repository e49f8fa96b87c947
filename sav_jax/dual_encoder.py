"""A loaded dual encoder (CLIP, SigLIP): images and texts -> embeddings that can be compared.

Axes: X images, Y texts, E width of the embeddings.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from sav_jax.batching import next_size
from sav_jax.errors import UserError
from sav_jax.examples import Example
from sav_jax.lmm import find_model, floating_dtype, weights_digest
from sav_jax.models.dual_encoder import DualEncoderConfig, TwoTowers, checkpoint_table
from sav_jax.models.processor import NamedImageProcessor, image_settings, load_part
from sav_jax.models.quiet import quiet_transformers
from sav_jax.models.registry import impossible_values, read_config, with_defaults
from sav_jax.models.weights import load_params, unchanged, weight_files
from sav_jax.sharding import data_size, parameter_sharding, put_batch

FAMILIES = ("clip", "siglip")
"""Known ``model_type``; the fixed-resolution SigLIP 2 is stored as ``siglip``."""


@dataclass(frozen=True, eq=False)
class DualEncoder:
    """A frozen dual encoder.

    Attributes:
        name: what it was loaded by.
        config: its sizes.
        module: the Linen module.
        params: the parameter tree.
        tokenizer, image_processor: transformers' own.
        fingerprint: hex digest of weights, config, tokenizer and processor. Equal fingerprints give equal embeddings.
        dtype: of parameters and activations; embeddings are float32.
        mesh: the devices it lives on; None means one device.
        hf_config: its raw ``config.json``.
    """

    name: str
    config: DualEncoderConfig
    module: TwoTowers
    params: Mapping[str, Any]
    tokenizer: Any
    image_processor: Any
    fingerprint: str
    dtype: Any
    mesh: jax.sharding.Mesh | None
    hf_config: Mapping[str, Any]

    @property
    def logit_scale(self) -> float:
        """What cosines are multiplied with (the exponential of the stored parameter)."""
        return float(np.exp(np.asarray(self.params["logit_scale"], np.float32)[0]))

    @property
    def logit_bias(self) -> float:
        """What is added to the scaled cosines: 0 for CLIP."""
        return float(self.params["logit_bias"][0]) if self.config.sigmoid else 0.0

    def embed_images(self, images: Sequence[Image.Image | str | Path], batch_size: int = 32) -> np.ndarray:
        """Images or their paths, prepared as the checkpoint says -> float32 ``[X, E]``, rows of length one.

        Files are decoded upright, a batch at a time.

        Raises:
            UserError: a file is missing or no picture, or it is one image instead of several.
        """
        if isinstance(images, str | Path | Image.Image):
            raise UserError("images must be a list of pictures or paths, not a single one")

        def prepare(chunk: Sequence[Image.Image | str | Path]) -> tuple[np.ndarray]:
            opened = [image if isinstance(image, Image.Image) else _read_image(Path(image)) for image in chunk]
            views = self.image_processor(opened, return_tensors=None)["pixel_values"]
            return (np.ascontiguousarray(np.stack(views).transpose(0, 2, 3, 1), np.float32),)

        return self._embed(_image_step(self.module), prepare, images, batch_size)

    def embed_texts(self, texts: Sequence[str], batch_size: int = 256) -> np.ndarray:
        """Texts, cut to the length the model was trained with -> float32 ``[Y, E]``, rows of length one.

        Raises:
            UserError: it is one string instead of several.
        """
        if isinstance(texts, str):
            raise UserError(f"texts must be a list of strings, not the one string {texts!r}")
        text = self.config.text

        def prepare(chunk: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
            rows = self.tokenizer(list(chunk), padding="max_length", max_length=text.max_length, truncation=True)
            token_ids = np.array(rows["input_ids"], np.int32)
            return token_ids, text.read_positions(token_ids)

        return self._embed(_text_step(self.module), prepare, texts, batch_size)

    def logits(self, images: np.ndarray, texts: np.ndarray) -> np.ndarray:
        """Scores of embedded images ``[X, E]`` and texts ``[Y, E]``: float32 ``[X, Y]``.

        CLIP's are compared over the texts by softmax; SigLIP's are each the logit of "these belong together".
        """
        cosines = np.einsum("XE,YE->XY", images, texts)
        return (cosines * np.float32(self.logit_scale) + np.float32(self.logit_bias)).astype(np.float32)

    def _embed(
        self,
        step: Callable[..., jax.Array],
        prepare: Callable[[Any], tuple[np.ndarray, ...]],
        items: Sequence[Any],
        batch_size: int,
    ) -> np.ndarray:
        """Batches of few shapes; a short last one is padded with copies of its first row."""
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {batch_size}")
        multiple = data_size(self.mesh)
        full = -(-batch_size // multiple) * multiple
        out = np.zeros((len(items), self.config.embedding_size), np.float32)
        for start in range(0, len(items), full):
            chunk = items[start : start + full]
            padding = min(full, next_size(len(chunk), multiple)) - len(chunk)
            arrays = [np.concatenate([x, np.repeat(x[:1], padding, axis=0)]) for x in prepare(chunk)]
            with jax.default_matmul_precision("highest"):  # of float32 where that is the dtype; others have one way
                out[start : start + len(chunk)] = step(self.params, *put_batch(arrays, self.mesh))[: len(chunk)]
        return out


def _read_image(path: Path) -> Image.Image:
    return Example("?", (path,), source=str(path)).load_images()[0]


@functools.lru_cache(maxsize=32)
def _image_step(module: TwoTowers) -> Callable[..., jax.Array]:
    return jax.jit(lambda params, pixels: module.apply({"params": params}, pixels, method="embed_images"))


@functools.lru_cache(maxsize=32)
def _text_step(module: TwoTowers) -> Callable[..., jax.Array]:
    return jax.jit(lambda params, ids, read: module.apply({"params": params}, ids, read, method="embed_texts"))


def load_dual_encoder(path: str | Path, dtype: Any = None, mesh: jax.sharding.Mesh | None = None) -> DualEncoder:
    """Load CLIP, SigLIP, or SigLIP 2 in its fixed-resolution form.

    Args:
        path: a directory in Hugging Face layout, or a hub id such as ``openai/clip-vit-large-patch14``.
        dtype: of parameters and activations; by default float32 on CPU and bfloat16 on TPU and GPU.
        mesh: devices to shard over (see :mod:`sav_jax.sharding`).

    Raises:
        UserError: no such model, a damaged file, one that was changed while it was read, or weights that do not fit the
            config; names the file.
    """
    directory = find_model(path)
    raw = read_config(directory)
    config = dual_encoder_config(raw)
    module = TwoTowers(config)
    dtype = floating_dtype(dtype)
    abstract = jax.eval_shape(lambda: init_params(module, jax.random.key(0)))
    sharding = None if mesh is None else parameter_sharding(mesh)
    with unchanged(weight_files(directory)):
        params = load_params(directory, checkpoint_table(config), abstract, dtype, sharding)
        weights = weights_digest(directory)
    with quiet_transformers():
        tokenizer = load_part(directory, "tokenizer", _load_tokenizer)
        image_processor = load_part(directory, "image processor", NamedImageProcessor.from_pretrained)
    facts = [weights, repr(config), str(image_settings(image_processor)), _rules(tokenizer)]
    fingerprint = hashlib.sha256("\n".join(facts).encode()).hexdigest()
    return DualEncoder(str(path), config, module, params, tokenizer, image_processor, fingerprint, dtype, mesh, raw)


def dual_encoder_config(raw: Mapping[str, Any]) -> DualEncoderConfig:
    """The config of a raw ``config.json``.

    Raises:
        UserError: unknown ``model_type`` or an unsupported option.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(
            f"config.json: model_type {model_type!r} is not a known dual encoder (known: {', '.join(FAMILIES)})"
        )
    full = with_defaults(raw)
    with impossible_values(model_type):
        return DualEncoderConfig.from_hf(full)


def init_params(module: TwoTowers, key: jax.Array) -> Any:
    """Fresh parameters."""
    size = module.config.vision.image_size
    token_ids = jnp.zeros((1, module.config.text.max_length), jnp.int32)
    pixels = jnp.zeros((1, size, size, 3), jnp.float32)
    return module.init(key, pixels, token_ids, jnp.zeros((1,), jnp.int32))["params"]


def _load_tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer, GemmaTokenizer, Siglip2Tokenizer

    # Without any, transformers would make up a CLIP tokenizer of three words.
    files = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
    if not any((directory / file).exists() for file in files):
        raise UserError(f"none of {', '.join(files)} is there")
    # SigLIP's takes away capitals and punctuation, and reads spiece.model (sentencepiece) even where a tokenizer.json
    # lies beside it, which would keep them.
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    if isinstance(tokenizer, GemmaTokenizer):
        # What the files of SigLIP 2 name, though it was trained on lower-case texts (arXiv 2502.14786, section 2.1).
        tokenizer = Siglip2Tokenizer.from_pretrained(directory)
    return tokenizer


def _rules(tokenizer: Any) -> str:
    """What tells one tokenizer from another."""
    settings = (getattr(tokenizer, name, None) for name in ("do_lower_case", "padding_side"))
    return f"{type(tokenizer).__name__} {[*settings]} {sorted(tokenizer.get_vocab().items())}"
