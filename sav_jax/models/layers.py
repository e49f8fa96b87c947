"""The small pieces every tower is made of. Modules own parameters; everything else is a function of arrays.

Axes: B batch, T tokens, D model width, F feed-forward width, N heads, H head width. Compute follows the activations'
dtype; norms and rotations are done in float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from sav_jax.models.batch import Array

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(jnp.asarray(1.702, x.dtype) * x),
    "silu": jax.nn.silu,
}


def gathered(kernel: jax.Array, axes: str) -> jax.Array:
    """A kernel whole along model width (D or C in ``axes``), which a mesh may keep in parts along "fsdp"
    (``sharding.py``). Asked for right before use: inside a scan, a layer at a time. Left to itself, the compiler may
    pass partial sums around instead.
    """
    if "fsdp" not in jax.sharding.get_abstract_mesh().shape:
        return kernel
    free = PartitionSpec.UNCONSTRAINED
    return jax.lax.with_sharding_constraint(kernel, PartitionSpec(*(None if axis in "CD" else free for axis in axes)))


@dataclasses.dataclass(frozen=True)
class Sides:
    """Which axes of a kernel are summed over, and which appear in the result.

    Attributes:
        inputs, outputs: places of these axes, in their order.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @classmethod
    def of(cls, equation: str) -> Sides:
        """Those of the second operand."""
        operands, result = equation.split("->")
        axes = operands.split(",")[1]
        inputs = tuple(i for i, axis in enumerate(axes) if axis not in result)
        return cls(inputs, tuple(i for i in range(len(axes)) if i not in inputs))

    def as_kernel(self) -> tuple[int, ...]:
        """The transposition from all inputs followed by all outputs to the kernel."""
        order = self.inputs + self.outputs
        return tuple(order.index(axis) for axis in range(len(order)))


class Projection(nn.Module):
    """``einsum(equation, x, kernel) + bias``: every weight matrix of every tower.

    Kernels of models lie as checkpoints store them, mostly outputs first: loading is reading.

    Where the variable collection ``lora`` holds ``a`` ``[*inputs, rank]`` and ``b`` ``[rank, *outputs]`` at this
    module's path, ``(x a) b`` is added (LoRA, arXiv 2106.09685); ``b`` carries the scale. If it also holds a
    ``dropout`` rate and the call brings a "dropout" key, x is dropped out on that way alone. See ``models/lora.py``.

    Attributes:
        equation: for example ``"BTD,NHD->BTNH"``; the second operand is the kernel.
        shape: the kernel's shape.
        bias_axes: how many of the last output axes the bias spans; 0 means no bias.
    """

    equation: str
    shape: tuple[int, ...]
    bias_axes: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = gathered(self.param("kernel", self._drawn), self.equation.split("->")[0].split(",")[1])
        y = jnp.einsum(self.equation, x, kernel.astype(x.dtype))
        if self.has_variable("lora", "a"):
            y = y + self._low_rank(x)
        if self.bias_axes:
            outputs = tuple(self.shape[axis] for axis in self.sides.outputs)
            bias = self.param("bias", nn.initializers.zeros_init(), outputs[-self.bias_axes :])
            y = y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)
        return y

    @property
    def sides(self) -> Sides:
        return Sides.of(self.equation)

    def _drawn(self, key: jax.Array) -> jax.Array:
        """Fresh numbers, drawn inputs first: what a seed gives does not depend on how the kernel lies."""
        inputs, outputs = self.sides.inputs, self.sides.outputs
        init = nn.initializers.lecun_normal(
            in_axis=tuple(range(len(inputs))), out_axis=tuple(range(len(inputs), len(self.shape)))
        )
        drawn = init(key, tuple(self.shape[axis] for axis in inputs + outputs))
        return jnp.transpose(drawn, self.sides.as_kernel())

    def _low_rank(self, x: jax.Array) -> jax.Array:
        operands, result = self.equation.split("->")
        given, kernel = operands.split(",")
        inputs, outputs = ("".join(kernel[axis] for axis in side) for side in (self.sides.inputs, self.sides.outputs))
        if self.has_variable("lora", "dropout") and self.has_rng("dropout"):
            keep = 1.0 - jnp.asarray(self.get_variable("lora", "dropout"), jnp.float32)
            kept = jax.random.bernoulli(self.make_rng("dropout"), keep, x.shape)
            x = jnp.where(kept, x / keep.astype(x.dtype), jnp.zeros_like(x))
        a: jax.Array = self.get_variable("lora", "a").astype(x.dtype)
        b: jax.Array = self.get_variable("lora", "b").astype(x.dtype)
        inner = given.translate(str.maketrans("", "", inputs)) + "r"
        return jnp.einsum(f"{inner},r{outputs}->{result}", jnp.einsum(f"{given},{inputs}r->{inner}", x, a), b)


class RMSNorm(nn.Module):
    """x / rms(x) * scale, statistics in float32 (Llama, Qwen)."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * jnp.broadcast_to(scale.astype(jnp.float32), y.shape)).astype(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / std * scale + bias, statistics in float32 (vision towers)."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros_init(), (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        y = y * jnp.broadcast_to(scale.astype(jnp.float32), y.shape)
        return (y + jnp.broadcast_to(bias.astype(jnp.float32), y.shape)).astype(x.dtype)


def rotary_angles(
    positions: Array, head_dim: int, theta: float | jax.Array, axes: tuple[int, ...] | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the rotary embedding (RoFormer, arXiv 2104.09864), float32.

    Args:
        positions: int32 ``[B, T]``, or ``[B, T, A]`` with one position per axis (M-RoPE, arXiv 2409.12191).
        head_dim: H, even.
        theta: base of the wavelengths, one for all or float32 ``[B]``.
        axes: for positions of several axes, which axis each of the H / 2 wavelengths counts along.

    Returns:
        Two ``[B, T, H / 2]`` arrays.
    """
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequencies = 1.0 / (jnp.asarray(theta, jnp.float32).reshape(-1, 1, 1) ** exponents[None, None, :])
    if positions.ndim == 3:
        places = jnp.take(jnp.asarray(positions), jnp.asarray(axes), axis=-1)
    else:
        places = jnp.asarray(positions)[..., None]
    angles = places.astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Apply rotary embedding to ``x`` ``[B, T, N, H]``; channel i turns with channel i + H/2 (the Hugging Face
    convention).
    """
    cos, sin = (a[:, :, None, :] for a in angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""What a scanned layer keeps for its backward pass: everything, the products with weights, or only its input."""


def scanned(block: type[nn.Module], length: int, remat: str = "none", in_axes: Any = 0) -> Callable[..., nn.Module]:
    """``length`` blocks with stacked parameters, sown intermediates and low-rank updates.

    Args:
        block: of signature ``(x, *inputs) -> (x, outputs)``.
        length: how many.
        remat: a name in ``REMAT_POLICIES``.
        in_axes: of the inputs, as in ``nn.scan``.
    """
    if remat != "none":
        block = nn.remat(block, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return nn.scan(
        block,
        # Without "intermediates" here the sown heads would vanish silently.
        variable_axes={"params": 0, "intermediates": 0, "lora": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=length,
    )
