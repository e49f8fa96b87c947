"""Few-shot classifiers from the attention heads of frozen multimodal models, in JAX.

Every public name is imported on first use, so that ``import sav_jax`` and ``sav-jax --help`` stay instant: JAX, Flax
and transformers are loaded only by what needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sav_jax.classifier import SparseAttentionVectors, load_classifier
    from sav_jax.dual_encoder import DualEncoder, load_dual_encoder
    from sav_jax.errors import UserError
    from sav_jax.examples import Example, read_examples
    from sav_jax.extract import extract_heads, next_token_logits
    from sav_jax.generation import Generation, generate, score_options
    from sav_jax.headstore import HeadStore
    from sav_jax.lmm import LMM, load
    from sav_jax.video import Video

__version__ = "0.1.0"

_HOME = {
    "DualEncoder": "dual_encoder",
    "Example": "examples",
    "Generation": "generation",
    "HeadStore": "headstore",
    "LMM": "lmm",
    "SparseAttentionVectors": "classifier",
    "UserError": "errors",
    "Video": "video",
    "extract_heads": "extract",
    "generate": "generation",
    "load": "lmm",
    "load_classifier": "classifier",
    "load_dual_encoder": "dual_encoder",
    "next_token_logits": "extract",
    "read_examples": "examples",
    "score_options": "generation",
}
_ROOMS = ("eval", "models", "train", "world")

__all__ = [
    "LMM",
    "DualEncoder",
    "Example",
    "Generation",
    "HeadStore",
    "SparseAttentionVectors",
    "UserError",
    "Video",
    "__version__",
    "extract_heads",
    "generate",
    "load",
    "load_classifier",
    "load_dual_encoder",
    "next_token_logits",
    "read_examples",
    "score_options",
]


def __getattr__(name: str) -> Any:
    """Import the module that holds ``name``, or the sub-package of that name, when it is first asked for (PEP 562)."""
    if name in _ROOMS:
        return importlib.import_module(f"sav_jax.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'sav_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"sav_jax.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
