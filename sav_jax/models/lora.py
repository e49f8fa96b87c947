"""Low-rank adaptation (LoRA, arXiv 2106.09685) of any :class:`~sav_jax.models.layers.Projection`.

The trained matrices are a flat dict from path to array, ``{projection}/a`` ``[(L,) *inputs, r]`` and ``{projection}/b``
``[(L,) r, *outputs]``. A forward pass takes them as the variable collection ``lora`` (:func:`variables`); without it
the model is the base model, bit for bit, and with b = 0 it is the same numbers.

Axes: L stacked layers, r rank.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sav_jax.errors import UserError
from sav_jax.models.layers import Projection, Sides
from sav_jax.models.multimodal import MultimodalModel, init_params

Weights: TypeAlias = Mapping[str, Any]
"""Flat: ``language_model/layers/self_attn/q_proj/a`` -> array."""


@dataclass(frozen=True)
class Target:
    """Which projections get low-rank updates, and what kind.

    Attributes:
        pattern: of their paths (``re.fullmatch``), for example ``"language_model/layers/.*"``.
        rank: r.
        alpha: updates are scaled by alpha / rank, or by alpha / sqrt(rank) with ``rank_stabilised`` (arXiv 2312.03732).
        dropout: share of the input that is dropped on the low-rank way in training.
    """

    pattern: str
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rank_stabilised: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"LoRA: rank must be at least 1, not {self.rank}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"LoRA: dropout must be at least 0 and below 1, not {self.dropout}")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UserError(f"LoRA: {self.pattern!r} is not a regular expression ({error})") from None

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


@dataclass(frozen=True)
class Kernel:
    """The weight matrix of a projection.

    Attributes:
        layers: L, or None if it is not stacked.
        shape: of one layer.
        sides: which of its axes are inputs and outputs.
    """

    layers: int | None
    shape: tuple[int, ...]
    sides: Sides

    @property
    def inputs(self) -> tuple[int, ...]:
        """Sizes of these axes."""
        return tuple(self.shape[axis] for axis in self.sides.inputs)

    @property
    def outputs(self) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in self.sides.outputs)

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Of a and b."""
        stacked = () if self.layers is None else (self.layers,)
        return {"a": (*stacked, *self.inputs, rank), "b": (*stacked, rank, *self.outputs)}


@functools.lru_cache(maxsize=16)
def projections(module: MultimodalModel) -> dict[str, Kernel]:
    """All projections of a model by path, but for those of layers that no forward pass runs."""
    sides: dict[str, Sides] = {}

    def note(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, Projection) and context.method_name == "__call__":
            sides["/".join(context.module.path)] = context.module.sides
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        shapes = jax.eval_shape(lambda key: init_params(module, key), jax.random.key(0))
    flat = traverse_util.flatten_dict(shapes, sep="/")
    found = {}
    for path, axes in sides.items():
        if "unread_layers" in path:
            continue
        shape = flat[f"{path}/kernel"].shape
        stacked = _is_stacked(path)
        found[path] = Kernel(shape[0], shape[1:], axes) if stacked else Kernel(None, shape, axes)
    return found


def _is_stacked(path: str) -> bool:
    return "layers" in path.split("/") or "deepstack_mergers" in path.split("/")


def assigned(module: MultimodalModel, targets: Sequence[Target]) -> dict[str, Target]:
    """The projections that get updates; the first target that matches counts.

    Raises:
        UserError: a target matches nothing that an earlier one has not taken.
    """
    paths = projections(module)
    chosen = {}
    for path in paths:
        for target in targets:
            if re.fullmatch(target.pattern, path):
                chosen[path] = target
                break
    for target in targets:
        if target not in chosen.values():
            raise UserError(f"LoRA: {target.pattern!r} matches no projection; there are: {', '.join(sorted(paths))}")
    return chosen


def shapes(module: MultimodalModel, targets: Sequence[Target]) -> dict[str, tuple[int, ...]]:
    """Of all the trained matrices."""
    kernels = projections(module)
    return {
        f"{path}/{name}": shape
        for path, target in assigned(module, targets).items()
        for name, shape in kernels[path].shapes(target.rank).items()
    }


def init(module: MultimodalModel, targets: Sequence[Target], seed: int) -> dict[str, np.ndarray]:
    """Fresh matrices, float32: a uniform within 1 / sqrt(inputs), as PEFT draws it, and b zero: nothing changes yet.

    Each path has a generator of its own, so that its numbers depend on the seed, its path and its shape alone.
    """
    kernels = projections(module)
    weights: dict[str, np.ndarray] = {}
    for path, target in assigned(module, targets).items():
        of = kernels[path].shapes(target.rank)
        bound = 1 / math.sqrt(math.prod(kernels[path].inputs))
        rng = np.random.default_rng([seed, *path.encode()])
        weights[f"{path}/a"] = rng.uniform(-bound, bound, of["a"]).astype(np.float32)
        weights[f"{path}/b"] = np.zeros(of["b"], np.float32)
    return weights


def variables(
    module: MultimodalModel, targets: Sequence[Target], weights: Weights, training: bool = False
) -> dict[str, Any]:
    """The ``lora`` collection of a forward pass.

    Args:
        module: the model.
        targets: what the weights were made for.
        weights: see the head of this file; may be traced.
        training: with dropout (the call must then bring a "dropout" key).

    Raises:
        UserError: the weights are not those of these targets.
    """
    check(module, targets, weights)
    kernels = projections(module)
    flat: dict[str, Any] = {}
    for path, target in assigned(module, targets).items():
        b = jnp.asarray(weights[f"{path}/b"])
        flat[f"{path}/a"] = jnp.asarray(weights[f"{path}/a"])
        flat[f"{path}/b"] = b * jnp.asarray(target.scale, b.dtype)
        if training and target.dropout:
            layers = kernels[path].layers
            flat[f"{path}/dropout"] = jnp.full(() if layers is None else (layers,), target.dropout, jnp.float32)
    return traverse_util.unflatten_dict(flat, sep="/")


def check(module: MultimodalModel, targets: Sequence[Target], weights: Weights) -> None:
    """Raise UserError unless the weights are those of the targets: a matrix of another rank would run silently."""
    wanted = shapes(module, targets)
    problems = [f"{path} is missing" for path in wanted if path not in weights]
    problems += [f"{path} is unknown" for path in weights if path not in wanted]
    problems += [
        f"{path} is {list(weights[path].shape)}, not {list(shape)}"
        for path, shape in wanted.items()
        if path in weights and tuple(weights[path].shape) != shape
    ]
    if problems:
        raise UserError(f"LoRA weights do not fit the model: {'; '.join(problems)}")


def merged(
    module: MultimodalModel, params: Mapping[str, Any], targets: Sequence[Target], weights: Weights
) -> dict[str, Any]:
    """Parameters with the updates added in, for inference: ``kernel + scale * a b``, summed in float32."""
    check(module, targets, weights)
    kernels = projections(module)
    flat = dict(traverse_util.flatten_dict(params, sep="/"))
    for path, target in assigned(module, targets).items():
        flat[f"{path}/kernel"] = _added(
            flat[f"{path}/kernel"],
            weights[f"{path}/a"],
            weights[f"{path}/b"],
            target.scale,
            kernels[path].sides,
            kernels[path].layers is not None,
        )
    return traverse_util.unflatten_dict(flat, sep="/")


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _added(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float, sides: Sides, stacked: bool) -> jax.Array:
    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.transpose(jnp.tensordot(a.astype(jnp.float32), b.astype(jnp.float32), axes=1), sides.as_kernel())

    update = (jax.vmap(product) if stacked else product)(a, b)
    return (kernel.astype(jnp.float32) + scale * update).astype(kernel.dtype)


def sharding(
    module: MultimodalModel, mesh: Mesh, kernel_sharding: Any, path: str, shape: tuple[int, ...]
) -> NamedSharding:
    """Where a matrix lives: split as the kernel's own inputs and outputs are; the rank stays whole.

    Args:
        module: the model.
        mesh: the devices.
        kernel_sharding: (path, shape) -> sharding of a parameter.
        path: of the matrix, ending in ``/a`` or ``/b``.
        shape: of the matrix.
    """
    projection, name = path.rsplit("/", 1)
    kernel = projections(module)[projection]
    stacked = () if kernel.layers is None else (kernel.layers,)
    whole = (*stacked, *kernel.shape)
    spec = tuple(kernel_sharding(f"{projection}/kernel", whole).spec)
    spec += (None,) * (len(whole) - len(spec))
    of_layers, spec = spec[: len(stacked)], spec[len(stacked) :]
    inputs, outputs = (tuple(spec[axis] for axis in side) for side in (kernel.sides.inputs, kernel.sides.outputs))
    axes = (*of_layers, *inputs, None) if name == "a" else (*of_layers, None, *outputs)
    assert len(axes) == len(shape)
    return NamedSharding(mesh, PartitionSpec(*axes))
