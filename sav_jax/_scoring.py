"""Nearest-centroid arithmetic for all heads at once, on the device, in bounded memory.

Axes: N examples, M heads (layers x heads per layer), H head width, C classes, B examples and G heads of one block.

Examples are sharded over the devices of a mesh. Each device walks its share in blocks, so that the [G, B, C]
similarities exist for one block at a time, and the host sends no more than a chunk of examples at a time: beyond the
class sums [M, C, H] themselves, neither the number of examples nor of classes decides how much memory is needed.
Ordinary support sets are one chunk: one transfer, one call.

Everything is float32 with full-precision products, whatever the dtype of the heads and the platform's default.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sav_jax.models.aligned import ALIGNMENT, aligned_empty, is_aligned

_BLOCK_BYTES = 12 * 2**20  # of the heads or the similarities of a block: what stays in a CPU's caches
_CHUNK_BYTES = 256 * 2**20  # of heads, over all devices
_MAX_BLOCK = 256  # examples
_CAST_BLOCK = 32  # examples that are cast to float32 at a time, to be added up
_PADDED_BYTES = 16 * 2**20  # of heads: fewer are padded to whole blocks, and numbers alike share a program
_SHARED = 16  # examples of a device: fewer do so always
_ROUNDED = 64  # examples of a device: their number is rounded up to a multiple, fewer to a power of two
_SMALLEST = 1e-30  # of products with vectors of length 1 that float32 has not rounded away
_RESOLVED = 1e-6  # of the largest product: sums of some hundred float32 products are not told apart below

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
        wrong, and so does one whose nearest class float32 cannot tell: on a head that puts out nearly the same
        whatever it is shown, rounding would decide.
      mesh: examples are sharded over all its axes.

    Returns:
      The class sums, float32 [M, C, H], on the devices; the number of examples right, int32 [M].
    """
    elements = max(num_classes, heads.shape[2])
    block, size = _plan(len(heads), heads[:1].nbytes, elements, mesh, _in_place(heads, mesh))
    group = _group(block, heads.shape[1], elements)
    chunks = functools.partial(_chunks, heads, labels, num_classes, size, mesh)
    if len(heads) <= size:
        resident = list(chunks())  # sent once for both passes
        chunks = functools.partial(iter, resident)
    sums = None
    for x, y in chunks():
        part = _class_sums(x, y, num_classes=num_classes, mesh=mesh)
        # One chunk is sent while another is added up; without waiting, all of them would be sent before the first is.
        before, sums = sums, part if sums is None else sums + part
        jax.block_until_ready(before)
    assert sums is not None
    counts = jnp.asarray(np.bincount(labels, minlength=num_classes).astype(np.int32))
    directions = _directions(sums)  # a class's sum points where its mean does
    right = np.zeros(heads.shape[1], np.int32)
    how = {"leave_one_out": leave_one_out, "block": block, "group": group, "mesh": mesh}
    for x, y in chunks():
        found, in_range = _count_right(x, y, sums, directions, counts, scaled=False, **how)
        if not in_range:
            found, _ = _count_right(x, y, sums, directions, counts, scaled=True, **how)
        right += np.asarray(found)
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
    elements = num_heads * max(num_classes, width)
    block, size = _plan(len(heads), heads[:1].nbytes, elements, mesh, _in_place(heads, mesh))
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


def _plan(examples: int, example_bytes: int, elements: int, mesh: Mesh, in_place: bool = False) -> tuple[int, int]:
    """Return the examples of a block on one device, and of a chunk over all devices; of heads that are used in place,
    and take no further memory, all are one chunk.

    Args:
      examples: N.
      example_bytes: of one example's heads.
      elements: float32 numbers that one example takes at least in a block.
      mesh: what examples are sharded over.
      in_place: whether the heads are.
    """
    share = max(1, -(-examples // mesh.size))
    rows = max(1, _CHUNK_BYTES // max(1, mesh.size * example_bytes))  # of a chunk, on each device
    limit = min(_MAX_BLOCK, rows, max(1, _BLOCK_BYTES // (4 * elements)))
    if (in_place and share >= _SHARED) or (examples * example_bytes > _PADDED_BYTES and share <= rows):
        return -(-share // -(-share // limit)), share * mesh.size
    if examples * example_bytes <= _PADDED_BYTES:  # so that predicting 5, then 7 examples compiles once
        share = 1 << (share - 1).bit_length() if share < _ROUNDED else -(-share // _ROUNDED) * _ROUNDED
    # Blocks, and chunks, of one size: a last one that is nearly empty would cost as much as a full one.
    needed = -(-share // limit)
    block = -(-share // needed)
    chunks = -(-needed // (rows // block))
    return block, block * -(-needed // chunks) * mesh.size


def _group(block: int, num_heads: int, elements: int) -> int:
    """The heads of a block: groups of one size."""
    limit = max(1, _BLOCK_BYTES // (4 * block * elements))
    return -(-num_heads // -(-num_heads // limit))


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


# On the device


@jax.jit
def _directions(vectors: jax.Array) -> jax.Array:
    """Scale float32 vectors [..., H] to length 1; a zero vector stays zero, so that its cosines are 0.

    Dividing by the largest component first keeps squares from overflowing or vanishing, of any finite vector whose
    largest component is a normal number (1.2e-38 or more): XLA takes those below for 0.
    """
    largest = jnp.max(jnp.abs(vectors), axis=-1, keepdims=True)
    vectors = vectors / jnp.where(largest > 0, largest, 1)
    norm = jnp.sqrt(jnp.sum(vectors * vectors, axis=-1, keepdims=True))
    return vectors / jnp.where(norm > 0, norm, 1)


@functools.partial(jax.jit, static_argnames=("num_classes", "mesh"))
def _class_sums(heads: jax.Array, labels: jax.Array, *, num_classes: int, mesh: Mesh) -> jax.Array:
    """Sum the examples of each class: [N, M, H], [N] -> [M, C, H]."""
    every = PartitionSpec(mesh.axis_names)
    _, num_heads, width = heads.shape

    def add_up(x: jax.Array, y: jax.Array) -> jax.Array:
        # A matrix product and not a scatter: the order of its additions does not change from run to run.
        of_class = jax.nn.one_hot(y, num_classes, dtype=jnp.float32)
        return _einsum("bc,bk->ck", of_class, x.reshape(len(x), num_heads * width).astype(jnp.float32))

    def on_device(heads: jax.Array, labels: jax.Array) -> jax.Array:
        if heads.dtype == jnp.float32:
            total = add_up(heads, labels)
        else:
            block = min(_CAST_BLOCK, len(heads))

            def add(number: jax.Array, total: jax.Array) -> jax.Array:
                start, new = _rows(number, block, len(heads))
                x, y = (lax.dynamic_slice_in_dim(array, start, block) for array in (heads, labels))
                return total + add_up(x, jnp.where(new, y, num_classes))

            zero = jnp.zeros((num_classes, num_heads * width), jnp.float32)
            total = lax.fori_loop(jnp.int32(0), jnp.int32(-(-len(heads) // block)), add, zero)
        return rearrange(lax.psum(total, mesh.axis_names), "c (m h) -> m c h", m=num_heads)

    return jax.shard_map(on_device, mesh=mesh, in_specs=(every, every), out_specs=PartitionSpec(), check_vma=False)(
        heads, labels
    )


def _rows(number: jax.Array, block: int, length: int) -> tuple[jax.Array, jax.Array]:
    """Number of a block -> where it begins, early enough to be whole, and which of its rows are in none before it."""
    start = jnp.minimum(number * block, length - block)
    return start, start + jnp.arange(block, dtype=jnp.int32) >= number * block


@functools.partial(jax.jit, static_argnames=("scaled", "leave_one_out", "block", "group", "mesh"))
def _count_right(
    heads: jax.Array,
    labels: jax.Array,
    sums: jax.Array,
    directions: jax.Array,
    counts: jax.Array,
    *,
    scaled: bool,
    leave_one_out: bool,
    block: int,
    group: int,
    mesh: Mesh,
) -> tuple[jax.Array, jax.Array]:
    """Count the examples that each head puts nearest to their class: [N, M, H], [N], [M, C, H] twice, [C] -> [M].

    Which class is nearest does not depend on an example's length. Unless ``scaled``, it stays as it is, which halves
    the time; the second result, bool [], says whether all products stayed in the range of float32.
    """
    every, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
    _, num_heads, width = heads.shape

    def on_device(
        heads: jax.Array, labels: jax.Array, sums: jax.Array, directions: jax.Array, counts: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        def add(number: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            total, lost = found
            row, new = _rows(number // groups, block, len(heads))
            head = jnp.minimum(number % groups * group, num_heads - group)
            y = jnp.where(new, lax.dynamic_slice_in_dim(labels, row, block), -1)
            x = lax.dynamic_slice(heads, (row, head, jnp.zeros_like(row)), (block, group, width))
            own_sums, own_directions = (lax.dynamic_slice_in_dim(array, head, group) for array in (sums, directions))
            x = rearrange(x.astype(jnp.float32), "b g h -> g b h")
            right, out = _right(
                x, _directions(x) if scaled else x, y, own_sums if leave_one_out else None, own_directions, counts
            )
            # The last group begins early enough to be whole: what it repeats counts once.
            again = head + jnp.arange(group, dtype=jnp.int32) < number % groups * group
            before = lax.dynamic_slice_in_dim(total, head, group)
            total = lax.dynamic_update_slice_in_dim(total, before + jnp.where(again, 0, right), head, 0)
            return total, lost + out

        groups = -(-num_heads // group)
        blocks = -(-len(heads) // block)
        nothing = jnp.zeros(num_heads, jnp.int32), jnp.int32(0)
        total, lost = lax.psum(lax.fori_loop(jnp.int32(0), jnp.int32(blocks * groups), add, nothing), mesh.axis_names)
        return total, lost == 0

    return jax.shard_map(
        on_device, mesh=mesh, in_specs=(every, every, whole, whole, whole), out_specs=(whole, whole), check_vma=False
    )(heads, labels, sums, directions, counts)


def _right(
    x: jax.Array, scaled: jax.Array, y: jax.Array, sums: jax.Array | None, directions: jax.Array, counts: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Count the examples nearest to their class: [G, B, H] twice, [B], [G, C, H] twice, [C] -> [G], and how many
    products may be lost to float32's range. Examples of no class (-1, C) are not counted.
    """
    products = _einsum("gbh,gch->gbc", scaled, directions)
    if sums is not None:
        # The mean of a class without x is (n * mean - x) / (n - 1): the direction of (sum - x).
        rest = jnp.take(sums, y, axis=1, mode="clip") - x
        own = jnp.sum(scaled * _directions(rest), axis=-1)
        alone = jnp.take(counts, y, mode="clip")[None, :] < 2
        own = jnp.where(alone, jnp.finfo(jnp.float32).min, own)
        is_own = jnp.arange(directions.shape[1], dtype=y.dtype)[None, None, :] == y[None, :, None]
        products = jnp.where(is_own, own[:, :, None], products)
        rival = jnp.max(jnp.where(is_own, -jnp.inf, products), axis=-1)
    largest = jnp.max(jnp.abs(products), axis=-1)
    counted = ((y >= 0) & (y < directions.shape[1]))[None, :]
    lost = jnp.sum(counted & ~((largest > _SMALLEST) & jnp.isfinite(largest)), dtype=jnp.int32)
    right = jnp.argmax(products, axis=-1).astype(y.dtype) == y[None, :]
    if sums is not None:
        right &= own - rival > _RESOLVED * largest
    return jnp.sum(right, axis=1, dtype=jnp.int32), lost


@functools.partial(jax.jit, static_argnames=("block", "mesh"))
def _nearest(
    heads: jax.Array, directions: jax.Array, temperature: jax.Array, *, block: int, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
    """Classify on each head: [N, M, H], [M, C, H] -> nearest class [N, M], mean softmax [N, C]."""
    every, whole = PartitionSpec(mesh.axis_names), PartitionSpec()

    def on_device(heads: jax.Array, directions: jax.Array, temperature: jax.Array) -> tuple[jax.Array, jax.Array]:
        def classify(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            cosines = _einsum("bmh,mch->mbc", _directions(x.astype(jnp.float32)), directions)
            confidence = jnp.mean(jax.nn.softmax(cosines / temperature, axis=-1), axis=0)
            return jnp.argmax(cosines, axis=-1).astype(jnp.int32).T, confidence

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
