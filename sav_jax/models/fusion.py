"""AIM's projection (arXiv 2406.07588): hidden states that a decoder puts out -> vectors that it can read.

The paper says "a trainable projection layer". By default it is a linear layer and a layer norm, as in the code of the
same group's SelfCP (arXiv 2405.17052): D^2 + 3 D parameters, 16.8 million at width 4,096.

Axes: B batch, M virtual tokens, D width of the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from sav_jax.errors import UserError
from sav_jax.models.layers import ACTIVATIONS, LayerNorm, Projection

KINDS = ("linear", "mlp")
INITIAL = ("identity", "random")
_EPS = 1e-5


@dataclass(frozen=True)
class FusionConfig:
    """Sizes of a projection.

    Attributes:
        width: D.
        kind: "linear", or "mlp": two linear layers with a GELU between them.
        norm: a layer norm behind them.
    """

    width: int
    kind: str = "linear"
    norm: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"projection {self.kind!r} is not known (known: {', '.join(KINDS)})")


class Fusion(nn.Module):
    """``[B, M, D] -> [B, M, D]``."""

    config: FusionConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = self.config.width, self.config.width
        x = Projection("BMD,DE->BME", shape, bias_axes=1, name="linear_1")(x)
        if self.config.kind == "mlp":
            x = Projection("BMD,DE->BME", shape, bias_axes=1, name="linear_2")(ACTIVATIONS["gelu"](x))
        return LayerNorm(_EPS, name="norm")(x) if self.config.norm else x


def check_initial(config: FusionConfig, initial: str) -> None:
    """Raise a UserError unless a projection can start so, see :func:`initial_params`."""
    if initial not in INITIAL:
        raise UserError(f"initial {initial!r} is not known (known: {', '.join(INITIAL)})")
    if initial == "identity" and config.kind != "linear":
        raise UserError("initial 'identity' is for a linear projection; an mlp starts 'random'")


def initial_params(config: FusionConfig, seed: int, initial: str, length: float) -> dict[str, np.ndarray]:
    """What training starts with.

    Args:
        config: sizes.
        seed: of random matrices.
        initial: "identity": a linear projection changes nothing but what the norm does; "random".
        length: root mean square of what the projection puts out, that of the model's embeddings.

    Returns:
        Path -> float32 array.

    Raises:
        UserError: ``initial`` is not known, or the identity is asked of an MLP.
    """
    check_initial(config, initial)
    made: Any = Fusion(config).init(jax.random.key(seed), jnp.zeros((1, 1, config.width), jnp.float32))
    params = {path: np.array(value) for path, value in traverse_util.flatten_dict(made["params"], sep="/").items()}
    if initial == "identity":
        params["linear_1/kernel"] = np.eye(config.width, dtype=np.float32)
    if config.norm:
        params["norm/scale"] *= np.float32(length)
    return params
