"""Causal attention by Pallas' splash kernel, for TPU: no score matrix in memory, nothing computed above the diagonal.

Axes: B batch, T tokens, N query heads, K key/value heads, H head width.

The kernel works on what lies on one chip: under a mesh it is mapped over the batch and over heads. The mesh is the
context's (``sharding.on``).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec

BLOCK = 512
_LANES = 128  # lengths must be multiples of it


def splash(q: jax.Array, k: jax.Array, v: jax.Array, interpret: bool = False) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v, query t looking at keys 0..t.

    Args:
        q: ``[B, T, N, H]``.
        k, v: ``[B, T, K, H]``, N a multiple of K.
        interpret: without a TPU, for tests.

    Returns:
        ``[B, T, N, H]`` in v's dtype.
    """
    mesh = jax.sharding.get_abstract_mesh()
    local = functools.partial(_on_one_chip, interpret=interpret)
    if not mesh.shape:
        return local(q, k, v)
    rows = tuple(axis for axis in ("data", "fsdp") if axis in mesh.shape) or None
    shards = mesh.shape.get("model", 1)
    heads, keys = q.shape[2], k.shape[2]
    split = shards > 1 and heads % shards == 0
    whole = PartitionSpec(rows)
    by_head = PartitionSpec(rows, None, "model") if split else whole
    by_key = by_head if keys % shards == 0 else whole

    def mapped(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        if split and by_key == whole:
            # Fewer key heads than chips: each has all of them and takes those that its own query heads share.
            count = heads // shards
            index = (jax.lax.axis_index("model") * count + jnp.arange(count)) // (heads // keys)
            k, v = (jnp.take(x, index, axis=2) for x in (k, v))
        return local(q, k, v)

    return jax.shard_map(mapped, mesh=mesh, in_specs=(by_head, by_key, by_key), out_specs=by_head, check_vma=False)(
        q, k, v
    )


def _on_one_chip(q: jax.Array, k: jax.Array, v: jax.Array, interpret: bool) -> jax.Array:
    length = q.shape[1]
    padded = -(-length // _LANES) * _LANES
    # The kernel does not scale. Padding comes last, where no real query looks.
    q = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    q, k, v = (
        rearrange(jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0))), "b t n h -> b n t h") for x in (q, k, v)
    )
    y = jax.vmap(_kernel(q.shape[1], padded, interpret))(q, k, v)
    return rearrange(y, "b n t h -> b t n h")[:, :length].astype(v.dtype)


def _kernel(heads: int, length: int, interpret: bool) -> Any:
    """``(q [N, T, H], k [K, T, H], v [K, T, H]) -> [N, T, H]``."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    block = next(size for size in (BLOCK, 256, _LANES) if length % size == 0)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,
    )
    mask = splash_attention_mask.CausalMask((length, length))
    return splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
