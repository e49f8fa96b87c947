"""Who holds what: one table from parameter path to mesh axes, one function for batches.

Mesh axes: "data" splits the batch; "fsdp" splits the batch and, for keeping, the weights, which every layer gathers
before it computes (fully sharded data parallelism, ZeRO's third stage: arXiv 1910.02054); "model" splits heads and
feed-forward width (tensor parallelism, arXiv 1909.08053). A mesh may have any of them; an axis that does not divide a
dimension leaves it whole, so that the same program runs on one CPU and on a pod.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sav_jax.errors import UserError

AXES = ("data", "fsdp", "model")
_BATCH = ("data", "fsdp")

# Parameter path (re.search) -> mesh axis of each trailing dimension; leading dimensions (stacked layers) stay whole.
PARAMETER_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(q_proj|k_proj|v_proj)/kernel$", ("model", None, "fsdp")),
    (r"(q_proj|k_proj|v_proj)/bias$", ("model", None)),
    (r"qkv/kernel$", (None, "model", None, "fsdp")),
    (r"qkv/bias$", (None, "model", None)),
    (r"(o_proj|out_proj)/kernel$", ("fsdp", "model", None)),
    (r"(gate_proj|up_proj|fc1)/kernel$", ("model", "fsdp")),
    (r"(gate_proj|up_proj|fc1)/bias$", ("model",)),
    (r"(down_proj|fc2)/kernel$", ("fsdp", "model")),
    (r"embed_tokens$", ("model", "fsdp")),
    (r"lm_head/kernel$", ("model", "fsdp")),
    (r"", ()),
)


def mesh_of(devices: Sequence[Any], axes: str) -> Mesh:
    """A mesh from ``data=4,model=4`` over all devices.

    Raises:
        UserError: an unknown axis, or sizes that do not come to the number of devices.
    """
    from jax.experimental import mesh_utils

    sizes: dict[str, int] = {}
    for part in axes.split(","):
        name, _, size = part.strip().partition("=")
        if name not in AXES or name in sizes or not size.isdecimal() or int(size) < 1:
            raise UserError(f"--mesh takes sizes of {', '.join(AXES)}, such as data=4,model=4, not {axes!r}")
        sizes[name] = int(size)
    if math.prod(sizes.values()) != len(devices):
        raise UserError(f"--mesh {axes} is of {math.prod(sizes.values())} devices; there are {len(devices)}")
    shape = tuple(sizes.values())
    try:
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except AssertionError as error:  # a TPU v4 described core by core
        raise UserError(f"no mesh of these devices can be made: {' '.join(str(error).split())}") from None
    return Mesh(placed, tuple(sizes))


def parameter_sharding(mesh: Mesh) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """(parameter path, shape) -> its sharding on ``mesh``, by ``PARAMETER_RULES``."""

    def sharding(path: str, shape: tuple[int, ...]) -> NamedSharding:
        axes = next(axes for pattern, axes in PARAMETER_RULES if re.search(pattern, path))
        axes = (None,) * (len(shape) - len(axes)) + axes
        return NamedSharding(
            mesh, PartitionSpec(*(_fits(mesh, axis, size) for axis, size in zip(axes, shape, strict=True)))
        )

    return sharding


def _fits(mesh: Mesh, axis: str | None, size: int) -> str | None:
    return axis if axis in mesh.shape and size % mesh.shape[axis] == 0 else None


def on(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """While this is open, what is traced knows its mesh: layers gather what "fsdp" keeps in parts, and kernels that the
    compiler cannot partition do it themselves. Without it programs are right, too, but may be slower.
    """
    return contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over "data" and "fsdp"."""
    axes = tuple(axis for axis in _BATCH if axis in mesh.shape)
    return NamedSharding(mesh, PartitionSpec(axes[0] if len(axes) == 1 else axes or None))


def data_size(mesh: Mesh | None) -> int:
    """How many ways the batch is split; every batch size is a multiple of it."""
    return 1 if mesh is None else math.prod(mesh.shape.get(axis, 1) for axis in _BATCH)


def own_rows(mesh: Mesh | None, number: int) -> slice:
    """Which rows of a batch of ``number`` the devices of this process hold."""
    if mesh is None:
        return slice(0, number)
    spans = batch_sharding(mesh).addressable_devices_indices_map((number,)).values()
    held = [part[0].indices(number) for part in spans if part is not None]
    return slice(min(start for start, _, _ in held), max(stop for _, stop, _ in held))


def put_own_rows(tree: Any, mesh: Mesh | None) -> Any:
    """As :func:`put_batch`, where every process has only the rows that :func:`own_rows` says."""
    if mesh is None:
        return jax.device_put(tree)
    split = batch_sharding(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(split, np.asarray(rows)), tree)


def put_batch(tree: Any, mesh: Mesh | None) -> Any:
    """Host arrays -> device, split along their leading axis."""
    return jax.device_put(tree) if mesh is None else jax.device_put(tree, batch_sharding(mesh))
