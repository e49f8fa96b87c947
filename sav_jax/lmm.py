"""A loaded large multimodal model: pure functions and the arrays they take."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from sav_jax import adapters
from sav_jax._storage import local
from sav_jax.errors import UserError
from sav_jax.models import lora
from sav_jax.models.multimodal import MultimodalModel, init_params
from sav_jax.models.processor import Processor, load_processor
from sav_jax.models.reading_weights import StoredTensor, samples
from sav_jax.models.registry import Architecture, architecture, read_config
from sav_jax.models.weights import load_params, read_headers, unchanged, weight_files
from sav_jax.sharding import on, parameter_sharding

BUNDLED = {name: Path(__file__).parent / "models" / name for name in ("tiny", "tiny-qwen")}
"""Checkpoints that come with the package, by name."""

_SETTINGS_FILES = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "qwen.tiktoken",
)
_IDLE_SETTINGS = {"architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "_name_or_path"}
_WHOLE_FILE_BYTES = 64 << 20
_SAMPLE_BYTES = 1 << 12


@dataclass(frozen=True, eq=False)
class LMM:
    """A frozen LMM.

    Attributes:
        name: what it was loaded by.
        architecture: its family at its sizes: config, module, checkpoint layout.
        params: the parameter tree, plain nested dicts of arrays.
        processor: text and images -> prompts.
        fingerprint: hex digest of weights, config and processor. Equal fingerprints give equal features.
        dtype: of parameters and activations.
        mesh: the devices it lives on; None means one device.
        hf_config: its raw ``config.json``.
        stop_token_ids: tokens that end an answer.
        max_tokens: longest prompt its positions were made for; None if it does not say.
    """

    name: str
    architecture: Architecture
    params: Mapping[str, Any]
    processor: Processor
    fingerprint: str
    dtype: Any
    mesh: jax.sharding.Mesh | None
    hf_config: Mapping[str, Any]
    stop_token_ids: tuple[int, ...]
    max_tokens: int | None = None

    @property
    def module(self) -> MultimodalModel:
        return self.architecture.module

    @property
    def config(self) -> Any:
        return self.architecture.config

    @property
    def num_layers(self) -> int:
        return self.config.text.num_layers

    @property
    def num_heads(self) -> int:
        return self.config.text.num_heads

    @property
    def head_dim(self) -> int:
        return self.config.text.head_dim

    @property
    def heads_shape(self) -> tuple[int, int, int]:
        """(layers, heads, head_dim) of the features of one example."""
        return self.num_layers, self.num_heads, self.head_dim

    def truncated(self, num_layers: int) -> LMM:
        """The same parameters, of whose layers only the first ones are run, and only for heads: nothing is copied.

        Args:
            num_layers: how many, at most those loaded.

        Raises:
            UserError: there are not as many.
        """
        if not 1 <= num_layers <= self.num_layers:
            raise UserError(f"{self.name} has 1 to {self.num_layers} layers, not {num_layers}")
        return dataclasses.replace(self, architecture=architecture(self.hf_config, num_layers))

    def running(self) -> contextlib.AbstractContextManager[Any]:
        """Open while a program of this model is traced and called: the mesh is known (:func:`sav_jax.sharding.on`), and
        products of float32 are of float32. By default GPU and TPU would round their factors to fewer bits (measured on
        an NVIDIA H200: heads 6e-5 off, relative, instead of 8e-7).
        """
        stack = contextlib.ExitStack()
        stack.enter_context(on(self.mesh))
        if self.dtype == jnp.float32:
            stack.enter_context(jax.default_matmul_precision("highest"))
        return stack

    def reinitialized(self, seed: int) -> LMM:
        """The same architecture with random weights (Flax's default initialisers): the control every few-shot result
        needs.

        Args:
            seed: of the random weights.
        """
        # The key as numbers: several processes cannot share one that lives on a device of each.
        key = np.asarray(jax.random.key_data(jax.random.key(seed)))
        return dataclasses.replace(
            self,
            name=f"{self.name} (random weights, seed {seed})",
            params=_random_params(self.module, self.dtype, self.mesh)(key),
            fingerprint=hashlib.sha256(f"{self.fingerprint} random {seed}".encode()).hexdigest(),
        )


def load(
    path: str | Path,
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    num_layers: int | None = None,
    adapter: str | Path | None = None,
    lm_head: bool = True,
) -> LMM:
    """Load an LMM.

    Args:
        path: "tiny" or "tiny-qwen" (bundled), a directory in Hugging Face layout, or a hub id such as
            ``llava-hf/llava-onevision-qwen2-7b-ov-hf``.
        dtype: of parameters and activations; by default float32 on CPU and bfloat16 on TPU and GPU. Norms, softmax,
            rotations and all statistics are float32 whatever it is.
        mesh: devices to shard over, axes "data" and/or "model" (see :mod:`sav_jax.sharding`); each process reads only
            its slices.
        num_layers: load only the first so many decoder layers: a query needs none deeper than its deepest selected
            head.
        adapter: a folder in PEFT's format (``adapter_config.json``, ``adapter_model.safetensors``), whose LoRA matrices
            are merged into the weights.
        lm_head: False leaves out the matrix that only logits need (where it is not that of the embeddings): features
            are read without it, answers are not. With an adapter, which may change it, it is always there.

    Raises:
        UserError: no such model, a damaged file, one that was changed while it was read, or weights that do not fit the
            config; names the file.

    Example:
        >>> import sav_jax
        >>> lmm = sav_jax.load("tiny")
        >>> lmm.num_layers, lmm.heads_shape  # layers, heads of each, width
        (12, (12, 8, 24))
    """
    directory = find_model(path)
    raw = read_config(directory)
    try:
        arch = architecture(raw, num_layers)
    except UserError as error:
        raise UserError(f"{directory}: {error}") from None
    dtype = floating_dtype(dtype)
    abstract = jax.eval_shape(lambda: init_params(arch.module, jax.random.key(0)))
    sharding = None if mesh is None else parameter_sharding(mesh)
    left_out = is_lm_head if not lm_head and adapter is None else None
    name = str(path)
    settings = [directory / name for name in ("config.json", *_SETTINGS_FILES)]
    with unchanged([*weight_files(directory), *settings]):
        params = load_params(directory, arch.table, abstract, dtype, sharding, left_out)
        processor = load_processor(directory, raw)
        fingerprint = checkpoint_fingerprint(directory)
    if adapter is not None:
        name = f"{path} + {adapter}"
        with unchanged(adapters.files_of(adapter)):
            targets, matrices = adapters.load(adapter, arch)
            update = adapters.digest(adapter)
        params = lora.merged(arch.module, params, targets, matrices)
        fingerprint = hashlib.sha256(f"{fingerprint} {update}".encode()).hexdigest()
    stops = _stop_token_ids(directory, raw, processor)
    sizes = raw | (raw.get("text_config") or {})
    longest = sizes.get("max_position_embeddings")
    return LMM(name, arch, params, processor, fingerprint, dtype, mesh, raw, stops, longest)


def is_lm_head(parameter: str) -> bool:
    """Whether a parameter, by its path, serves logits alone."""
    return parameter == "language_model/lm_head/kernel"


def usual_mesh(path: str | Path, dtype: Any = None) -> str:
    """How all devices are laid out unless somebody says otherwise: they share the batch, and keep the weights in parts
    ("fsdp") where the whole of them would take more than half of a device's memory.

    Args:
        path, dtype: as for :func:`load`.
    """
    count = jax.device_count()
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")  # a CPU's does not say
    if count == 1 or limit is None:
        return f"data={count}"
    module = architecture(read_config(find_model(path))).module
    shapes = jax.tree.leaves(jax.eval_shape(lambda: init_params(module, jax.random.key(0))))
    size = sum(leaf.size for leaf in shapes) * floating_dtype(dtype).itemsize
    return f"{'data' if 2 * size <= limit else 'fsdp'}={count}"


@functools.lru_cache(maxsize=4)
def _random_params(module: MultimodalModel, dtype: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """``key data -> params``, laid out as loaded ones are; compiled once, whatever the number of seeds."""

    def make(key: jax.Array) -> Any:
        return jax.tree.map(lambda p: p.astype(dtype), init_params(module, jax.random.wrap_key_data(key)))

    if mesh is None:
        return jax.jit(make)
    of = parameter_sharding(mesh)
    shapes = traverse_util.flatten_dict(jax.eval_shape(make, jax.random.key_data(jax.random.key(0))), sep="/")
    shardings = {path: of(path, leaf.shape) for path, leaf in shapes.items()}
    return jax.jit(make, out_shardings=traverse_util.unflatten_dict(shardings, sep="/"))


def _stop_token_ids(directory: Path, config: Mapping[str, Any], processor: Processor) -> tuple[int, ...]:
    """From generation_config.json, config.json or the tokenizer, the first that says; and what the family knows."""
    file = directory / "generation_config.json"
    try:
        generation = json.loads(file.read_text()) if file.exists() else {}
    except ValueError as error:
        raise UserError(f"{file}: unreadable ({error})") from None
    if not isinstance(generation, dict):
        raise UserError(f"{file}: not a JSON object")
    places = (generation, config, config.get("text_config") or {}, {"eos_token_id": processor.tokenizer.eos_token_id})
    found: Any = next((place["eos_token_id"] for place in places if place.get("eos_token_id") is not None), [])
    stops = tuple(found) if isinstance(found, list) else (found,)
    if not all(isinstance(stop, int) for stop in stops):
        raise UserError(f"{directory}: eos_token_id {found!r} is neither a token id nor a list of them")
    return stops + tuple(token for token in processor.stop_tokens if token not in stops)


def find_model(path: str | Path) -> Path:
    """The directory of a bundled model, a path, or a hub id."""
    found = local_model(path)
    if found is not None:
        return found
    from huggingface_hub import snapshot_download

    try:
        # Weights only as safetensors; no code files.
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
        return Path(snapshot_download(str(path), allow_patterns=patterns))
    except Exception as error:  # the hub client raises many types: offline, gated, not found
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"no such model: {path} is not a directory here and cannot be had from the hub ({reason})"
        ) from None


def local_model(path: str | Path) -> Path | None:
    """The directory of a bundled model or a path; None if it looks like a hub id.

    Raises:
        UserError: it is none of them.
    """
    if str(path) in BUNDLED and not Path(path).is_dir():
        return BUNDLED[str(path)]
    directory = local(path, "a model").expanduser()
    if directory.is_dir():
        return directory
    parts = str(path).split("/")
    if directory.exists() or len(parts) != 2 or not all(parts) or str(path).startswith((".", "~", "/")):
        raise UserError(
            f"no such model: {path} is neither a directory, a hub id (owner/name) nor one of: {', '.join(BUNDLED)}"
        )
    return None


def floating_dtype(dtype: Any) -> Any:
    """``dtype``, or by default float32 on CPU and bfloat16 elsewhere.

    Raises:
        UserError: it is none to compute in.
    """
    if dtype is None:
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    try:
        resolved = jnp.dtype(dtype)
    except TypeError:
        resolved = None
    if resolved not in (jnp.dtype("float32"), jnp.dtype("bfloat16"), jnp.dtype("float16")):
        raise UserError(f"dtype {dtype!r} is not one of float32, bfloat16, float16")
    return resolved


def _settings_digest(directory: Path, config: Mapping[str, Any]) -> str:
    """sha256 over what else decides the features: sizes, tokenizer, chat template, image processor.

    Of the files, not of what a version of some library makes of them: a classifier outlives an upgrade.
    """
    digest = hashlib.sha256(json.dumps(_lasting(config), sort_keys=True).encode())
    for name in _SETTINGS_FILES:
        file = directory / name
        digest.update(name.encode())
        if file.exists():
            digest.update(file.read_bytes())
    file = directory / "video_preprocessor_config.json"
    if file.exists():  # without one the fingerprint is what it was before videos were read
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _lasting(config: Any) -> Any:
    """``config.json`` without what changes no number."""
    if isinstance(config, Mapping):
        return {key: _lasting(value) for key, value in config.items() if key not in _IDLE_SETTINGS}
    return config


def checkpoint_fingerprint(directory: Path) -> str:
    """The fingerprint that a model loaded from this directory has (:class:`LMM`), from its files alone.

    Raises:
        UserError: config or weights are missing or damaged.
    """
    settings = _settings_digest(directory, read_config(directory))
    return hashlib.sha256(f"{weights_digest(directory)} {settings}".encode()).hexdigest()


def weights_digest(directory: Path) -> str:
    """sha256 over the weights: whole files when small, else every tensor's header and a sample of its bytes (seconds,
    not minutes).
    """
    digest = hashlib.sha256()
    files = weight_files(directory)
    whole = sum(file.stat().st_size for file in files) <= _WHOLE_FILE_BYTES
    if whole:
        for file in files:
            digest.update(file.read_bytes())
        return digest.hexdigest()
    tensors = sorted(read_headers(directory), key=lambda t: t.key)
    places = [[(tensor, *span) for span in _sampled(tensor)] for tensor in tensors]
    found = iter(samples([place for some in places for place in some]))
    for tensor, some in zip(tensors, places, strict=True):
        digest.update(f"{tensor.key} {tensor.dtype} {tensor.shape}".encode())
        for part in itertools.islice(found, len(some)):
            digest.update(part)
    return digest.hexdigest()


def _sampled(tensor: StoredTensor) -> list[tuple[int, int]]:
    """Which of a tensor's bytes count: first ones and how many."""
    size, each = math.prod(tensor.shape), tensor.dtype.itemsize
    starts = range(0, size, max(1, size // 4))
    return [(start * each, min(_SAMPLE_BYTES // each, size - start) * each) for start in starts]
