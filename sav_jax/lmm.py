"""A loaded large multimodal model: pure functions and the arrays they take."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from sav_jax.errors import UserError
from sav_jax.models.batch import Batch
from sav_jax.models.processor import LlavaOnevisionProcessor, load_processor
from sav_jax.models.registry import Architecture, architecture, read_config
from sav_jax.models.weights import load_params, read_headers, weight_files
from sav_jax.sharding import parameter_sharding

BUNDLED = {"tiny": Path(__file__).parent / "models" / "tiny"}
"""Checkpoints that come with the package, by name."""

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
    """

    name: str
    architecture: Architecture
    params: Mapping[str, Any]
    processor: LlavaOnevisionProcessor
    fingerprint: str
    dtype: Any
    mesh: jax.sharding.Mesh | None
    hf_config: Mapping[str, Any]

    @property
    def module(self) -> nn.Module:
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

    def reinitialized(self, seed: int) -> LMM:
        """The same architecture with random weights (Flax's default initialisers): the control every few-shot result
        needs.

        Args:
            seed: of the random weights.
        """
        init = jax.jit(lambda key: jax.tree.map(lambda p: p.astype(self.dtype), _init(self.module, key)))
        return dataclasses.replace(
            self,
            name=f"{self.name} (random weights, seed {seed})",
            params=init(jax.random.key(seed)),
            fingerprint=hashlib.sha256(f"{self.fingerprint} random {seed}".encode()).hexdigest(),
        )


def load(
    path: str | Path,
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    num_layers: int | None = None,
) -> LMM:
    """Load an LMM.

    Args:
        path: "tiny" (bundled), a directory in Hugging Face layout, or a hub id such as
            ``llava-hf/llava-onevision-qwen2-7b-ov-hf``.
        dtype: of parameters and activations; by default float32 on CPU and bfloat16 on TPU and GPU. Norms, softmax,
            rotations and all statistics are float32 whatever it is.
        mesh: devices to shard over, axes "data" and/or "model" (see :mod:`sav_jax.sharding`); each process reads only
            its slices.
        num_layers: load only the first so many decoder layers: a query needs none deeper than its deepest selected
            head.

    Raises:
        UserError: no such model, a damaged file, or weights that do not fit the config; names the file.
    """
    directory = _find(path)
    raw = read_config(directory)
    arch = architecture(raw, num_layers)
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    dtype = _floating(dtype)
    abstract = jax.eval_shape(lambda: _init(arch.module, jax.random.key(0)))
    sharding = None if mesh is None else parameter_sharding(mesh)
    params = load_params(directory, arch.table, abstract, dtype, sharding)
    processor = load_processor(directory, raw)
    fingerprint = hashlib.sha256(f"{_weights_digest(directory)} {processor.digest}".encode()).hexdigest()
    return LMM(str(path), arch, params, processor, fingerprint, dtype, mesh, raw)


def _init(module: nn.Module, key: jax.Array) -> Any:
    """Fresh parameters; the dummy prompt is as small as the code allows and decides nothing."""
    size = module.config.vision.image_size
    batch = Batch(
        token_ids=jnp.zeros((1, 1), jnp.int32),
        lengths=jnp.ones((1,), jnp.int32),
        read_positions=jnp.zeros((1, 1), jnp.int32),
        tiles=jnp.zeros((1, 1, size, size, 3), jnp.float32),
        visual_index=jnp.zeros((1, 1, 1), jnp.int32),
        visual_weight=jnp.zeros((1, 1, 1), jnp.float32),
    )
    return module.init(key, batch)["params"]


def _find(path: str | Path) -> Path:
    """The directory of a bundled model, a path, or a hub id."""
    if str(path) in BUNDLED and not Path(path).is_dir():
        return BUNDLED[str(path)]
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory
    parts = str(path).split("/")
    if directory.exists() or len(parts) != 2 or not all(parts) or str(path).startswith((".", "~", "/")):
        raise UserError(
            f"no such model: {path} is neither a directory, a hub id (owner/name) nor one of: {', '.join(BUNDLED)}"
        )
    from huggingface_hub import snapshot_download

    try:
        # Weights only as safetensors; no code files.
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
        return Path(snapshot_download(str(path), allow_patterns=patterns))
    except Exception as error:  # the hub client raises many types: offline, gated, not found
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"no such model: {path} is not a directory here and cannot be had from the hub ({reason})"
        ) from None


def _floating(dtype: Any) -> Any:
    try:
        resolved = jnp.dtype(dtype)
    except TypeError:
        resolved = None
    if resolved not in (jnp.dtype("float32"), jnp.dtype("bfloat16"), jnp.dtype("float16")):
        raise UserError(f"dtype {dtype!r} is not one of float32, bfloat16, float16")
    return resolved


def _weights_digest(directory: Path) -> str:
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
    for tensor in sorted(read_headers(directory), key=lambda t: t.key):
        digest.update(f"{tensor.key} {tensor.dtype} {tensor.shape}".encode())
        flat = tensor.read().reshape(-1)
        step = max(1, flat.size // 4)
        for start in range(0, flat.size, step):
            digest.update(flat[start : start + _SAMPLE_BYTES // flat.itemsize].tobytes())
    return digest.hexdigest()
