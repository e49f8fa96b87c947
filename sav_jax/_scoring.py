"""Nearest-centroid arithmetic for all heads at once, on the device, in bounded memory.

Axes: N examples, M heads (layers x heads per layer), H head width, C classes, B examples of one block.

Examples are sharded over the devices of a mesh. Each device walks its share in blocks, so that the [B, M, C]
similarities exist for one block at a time, and the host sends no more than a chunk of examples at a time: beyond the
class sums [M, C, H] themselves, neither the number of examples nor of classes decides how much memory is needed.
Ordinary support sets are one chunk: one transfer, one call.

Everything is float32 with full-precision products, whatever the dtype of the heads and the platform's default.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sav_jax.models.aligned import ALIGNMENT, aligned_empty, is_aligned

_BLOCK_BYTES = 64 * 2**20  # of similarities, on each device
_CHUNK_BYTES = 256 * 2**20  # of heads, over all devices
_CACHED_BYTES = 16 * 2**20  # of the heads of a block: larger ones leave a CPU's caches
_MAX_BLOCK = 16
_PADDED_BYTES = 16 * 2**20  # of heads: fewer are padded to whole blocks, and numbers alike share a program

_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def local_mesh() -> Mesh:
    """All devices of this process on one axis: no other process has to take part."""
    return Mesh(np.array(jax.local_devices()), ("data",))


def score_heads(
    heads: np.ndarray, labels: np.ndarray, num_classes: int, *, leave_one_out: bool, mesh: Mesh
) -> tuple[jax.Array, np.ndarray]:
    """Add up every class on every head, and count the examples that each head puts nearest to their own class.

    Args:
      heads: [N, M, H], any float dtype.
      labels: int [N], class numbers below ``num_classes``.
      num_classes: C.
      leave_one_out: measure each example against its class without it. An example alone in its class then counts as
        wrong.
      mesh: examples are sharded over all its axes.

    Returns:
      The class sums, float32 [M, C, H], on the devices; the number of examples right, int32 [M].
    """
    block, size = _plan(
        len(heads), heads[:1].nbytes, heads.shape[1] * max(num_classes, heads.shape[2]), mesh, _in_place(heads, mesh)
    )
    shapes = {"block": block, "mesh": mesh}
    chunks = functools.partial(_chunks, heads, labels, num_classes, size, mesh)
    if len(heads) <= size:
        resident = list(chunks())  # sent once for both passes
        chunks = functools.partial(iter, resident)
    sums = None
    for x, y in chunks():
        part = _class_sums(x, y, num_classes=num_classes, **shapes)
        # One chunk is sent while another is added up; without waiting, all of them would be sent before the first is.
        before, sums = sums, part if sums is None else sums + part
        jax.block_until_ready(before)
    assert sums is not None
    counts = jnp.asarray(np.bincount(labels, minlength=num_classes).astype(np.int32))
    directions = _directions(sums)  # a class's sum points where its mean does
    right = np.zeros(heads.shape[1], np.int32)
    for x, y in chunks():
        right += np.asarray(_count_right(x, y, sums, directions, counts, leave_one_out=leave_one_out, **shapes))
    return sums, right


def nearest_classes(
    heads: np.ndarray, centroids: np.ndarray, temperature: float, *, mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """Find the class nearest to each example on each head.

    Args:
      heads: [N, M, H], any float dtype.
      centroids: float32 [M, C, H].
      temperature: divides the cosines before the softmax.
      mesh: examples are sharded over all its axes.

    Returns:
      The nearest class (of equally near ones the lowest number), int32 [N, M]; the softmax of the cosines over the
      classes, averaged over heads, float32 [N, C].
    """
    num_heads, num_classes, width = centroids.shape
    block, size = _plan(len(heads), heads[:1].nbytes, num_heads * max(num_classes, width), mesh, _in_place(heads, mesh))
    directions = _directions(jnp.asarray(centroids))
    nearest, confidence = [], []
    for x, _ in _chunks(heads, np.zeros(len(heads), np.int32), num_classes, size, mesh):
        near, confident = _nearest(x, directions, jnp.float32(temperature), block=block, mesh=mesh)
        nearest.append(np.asarray(near))
        confidence.append(np.asarray(confident))
    if not nearest:
        return np.zeros((0, num_heads), np.int32), np.zeros((0, num_classes), np.float32)
    return np.concatenate(nearest)[: len(heads)], np.concatenate(confidence)[: len(heads)]


# Blocks and chunks


def _plan(
    examples: int, example_bytes: int, block_elements: int, mesh: Mesh, in_place: bool = False
) -> tuple[int, int]:
    """Return the examples of a block on one device, and of a chunk over all devices; of heads that are used in place,
    and take no further memory, all are one chunk.
    """
    share = max(1, -(-examples // mesh.size))
    cached = max(1, _CACHED_BYTES // max(1, example_bytes))
    limit = min(_MAX_BLOCK, cached, max(1, _BLOCK_BYTES // (4 * block_elements)), 1 << (share - 1).bit_length())
    block = 1 << (limit.bit_length() - 1)  # powers of two: predicting 5, then 7 examples compiles once
    if in_place and share >= block:
        return block, share * mesh.size
    blocks = max(1, _CHUNK_BYTES // max(1, block * mesh.size * example_bytes))
    if blocks * block >= share and share >= block and examples * example_bytes > _PADDED_BYTES:
        return block, share * mesh.size
    needed = -(-share // block)
    # Chunks of one size: a last one that is nearly empty would cost as much as a full one.
    return block, block * -(-needed // -(-needed // blocks)) * mesh.size


def _chunks(
    heads: np.ndarray, labels: np.ndarray, num_classes: int, size: int, mesh: Mesh
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Put chunks of ``size`` examples on the devices; rows that fill up the last one are of class C, which is none."""
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    for start in range(0, len(heads), size):
        x, y = heads[start : start + size], labels[start : start + size]
        if missing := size - len(x):
            x = np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)])
            y = np.concatenate([y, np.full(missing, num_classes, y.dtype)])
        if jax.default_backend() == "cpu":
            x = _aligned(x)
        # By callback, so that each process of a larger mesh sends only the rows of its own devices.
        yield (
            jax.make_array_from_callback(x.shape, sharding, functools.partial(np.ndarray.__getitem__, x)),
            jax.make_array_from_callback(y.shape, sharding, functools.partial(np.ndarray.__getitem__, y)),
        )


def _in_place(heads: np.ndarray, mesh: Mesh) -> bool:
    """Whether XLA works on the array itself: every device's share begins where it wants arrays to begin."""
    share = len(heads) // mesh.size * heads[:1].nbytes
    whole = len(heads) % mesh.size == 0 and share % ALIGNMENT == 0
    return jax.default_backend() == "cpu" and whole and is_aligned(heads)


def _aligned(x: np.ndarray) -> np.ndarray:
    """``x``, or a copy of it that begins there. NumPy copies in a quarter of the time that XLA needs."""
    if is_aligned(x):
        return x
    copied = aligned_empty(x.shape, x.dtype)
    copied[:] = x
    return copied


def _blocks(x: jax.Array, y: jax.Array, block: int, none: int) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """Number of a block -> its rows, cut out and not copied; the last one begins early enough to be whole, and what it
    repeats is of class ``none``.
    """

    def rows(number: jax.Array) -> tuple[jax.Array, jax.Array]:
        start = jnp.minimum(number * block, len(x) - block)
        own, classes = (lax.dynamic_slice_in_dim(array, start, block) for array in (x, y))
        return own, jnp.where(start + jnp.arange(block) < number * block, none, classes)

    return rows


# On the device


@jax.jit
def _directions(vectors: jax.Array) -> jax.Array:
    """Scale float32 vectors [..., H] to length 1; a zero vector stays zero, so that its cosines are 0.

    Dividing by the largest component first keeps the squares of any finite vector from overflowing or vanishing.
    """
    largest = jnp.max(jnp.abs(vectors), axis=-1, keepdims=True)
    vectors = vectors / jnp.where(largest > 0, largest, 1)
    norm = jnp.sqrt(jnp.sum(vectors * vectors, axis=-1, keepdims=True))
    return vectors / jnp.where(norm > 0, norm, 1)


@functools.partial(jax.jit, static_argnames=("num_classes", "block", "mesh"))
def _class_sums(heads: jax.Array, labels: jax.Array, *, num_classes: int, block: int, mesh: Mesh) -> jax.Array:
    """Sum the examples of each class: [N, M, H], [N] -> [M, C, H]."""
    every = PartitionSpec(mesh.axis_names)

    def on_device(heads: jax.Array, labels: jax.Array) -> jax.Array:
        rows = _blocks(heads, labels, block, num_classes)

        def add(total: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
            x, y = rows(number)
            # A matrix product and not a scatter: the order of its additions does not change from run to run.
            of_class = jax.nn.one_hot(y, num_classes, dtype=jnp.float32)
            return total + _einsum("bc,bmh->mch", of_class, x.astype(jnp.float32)), None

        zero = jnp.zeros((heads.shape[1], num_classes, heads.shape[2]), jnp.float32)
        total, _ = lax.scan(add, zero, jnp.arange(-(-len(heads) // block), dtype=jnp.int32))
        return lax.psum(total, mesh.axis_names)

    return jax.shard_map(on_device, mesh=mesh, in_specs=(every, every), out_specs=PartitionSpec(), check_vma=False)(
        heads, labels
    )


@functools.partial(jax.jit, static_argnames=("leave_one_out", "block", "mesh"))
def _count_right(
    heads: jax.Array,
    labels: jax.Array,
    sums: jax.Array,
    directions: jax.Array,
    counts: jax.Array,
    *,
    leave_one_out: bool,
    block: int,
    mesh: Mesh,
) -> jax.Array:
    """Count the examples that each head puts nearest to their class: [N, M, H], [N], [M, C, H] twice, [C] -> [M]."""
    every, whole = PartitionSpec(mesh.axis_names), PartitionSpec()

    def on_device(
        heads: jax.Array, labels: jax.Array, sums: jax.Array, directions: jax.Array, counts: jax.Array
    ) -> jax.Array:
        rows = _blocks(heads, labels, block, directions.shape[1])

        def add(total: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
            x, y = rows(number)
            x = x.astype(jnp.float32)
            cosines = _einsum("bmh,mch->bmc", _directions(x), directions)
            if leave_one_out:
                # The mean of a class without x is (n * mean - x) / (n - 1): the direction of (sum - x).
                rest = jnp.moveaxis(jnp.take(sums, y, axis=1, mode="clip"), 0, 1) - x
                own = jnp.sum(_directions(x) * _directions(rest), axis=-1)
                alone = jnp.take(counts, y, mode="clip") < 2
                own = jnp.where(alone[:, None], -jnp.inf, own)
                is_own = jnp.arange(directions.shape[1], dtype=y.dtype)[None, :] == y[:, None]
                cosines = jnp.where(is_own[:, None, :], own[:, :, None], cosines)
            right = jnp.argmax(cosines, axis=-1).astype(y.dtype) == y[:, None]
            return total + jnp.sum(right, axis=0, dtype=jnp.int32), None

        zero = jnp.zeros(heads.shape[1], jnp.int32)
        total, _ = lax.scan(add, zero, jnp.arange(-(-len(heads) // block), dtype=jnp.int32))
        return lax.psum(total, mesh.axis_names)

    return jax.shard_map(
        on_device, mesh=mesh, in_specs=(every, every, whole, whole, whole), out_specs=whole, check_vma=False
    )(heads, labels, sums, directions, counts)


@functools.partial(jax.jit, static_argnames=("block", "mesh"))
def _nearest(
    heads: jax.Array, directions: jax.Array, temperature: jax.Array, *, block: int, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
    """Classify on each head: [N, M, H], [M, C, H] -> nearest class [N, M], mean softmax [N, C]."""
    every, whole = PartitionSpec(mesh.axis_names), PartitionSpec()

    def on_device(heads: jax.Array, directions: jax.Array, temperature: jax.Array) -> tuple[jax.Array, jax.Array]:
        def classify(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            cosines = _einsum("bmh,mch->bmc", _directions(x.astype(jnp.float32)), directions)
            confidence = jnp.mean(jax.nn.softmax(cosines / temperature, axis=-1), axis=1)
            return jnp.argmax(cosines, axis=-1).astype(jnp.int32), confidence

        whole = len(heads) // block * block
        nearest, confidence = lax.map(classify, heads[:whole].reshape(-1, block, *heads.shape[1:]))
        parts = nearest.reshape(-1, *nearest.shape[2:]), confidence.reshape(-1, *confidence.shape[2:])
        if whole == len(heads):
            return parts
        rest = classify(heads[whole:])
        return jnp.concatenate([parts[0], rest[0]]), jnp.concatenate([parts[1], rest[1]])

    # Every process gets the whole answer.
    nearest, confidence = jax.shard_map(
        on_device, mesh=mesh, in_specs=(every, whole, whole), out_specs=(every, every), check_vma=False
    )(heads, directions, temperature)
    replicated = NamedSharding(mesh, whole)
    return lax.with_sharding_constraint(nearest, replicated), lax.with_sharding_constraint(confidence, replicated)
