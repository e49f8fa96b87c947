"""Scaled dot-product attention: one function, back ends chosen by name.

Axes: B batch, T query positions, S key positions, N query heads, K key/value heads, G = N / K query heads sharing one
K, H head width.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange

from sav_jax.models.batch import Array

QUERY_BLOCK = 256


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Grouped-query attention with float32 scores; ``mask`` broadcasts to ``[B, K, G, T, S]``, True where a query may
    look.
    """
    q = rearrange(q, "b t (k g) h -> b t k g h", k=k.shape[2])
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32) * (q.shape[-1] ** -0.5)
    if mask is not None:
        # finfo.min rather than -inf: a row that may look nowhere (padding) stays finite instead of becoming NaN.
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return rearrange(jnp.einsum("BKGTS,BSKH->BTKGH", weights, v), "b t k g h -> b t (k g) h")


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool, lengths: Array | None) -> jax.Array:
    """The reference: the whole score matrix at once."""
    mask = None
    key_positions = jnp.arange(k.shape[1])
    if causal:
        mask = (key_positions[None, :] <= jnp.arange(q.shape[1])[:, None])[None, None, None]
    if lengths is not None:
        real = (key_positions[None, :] < lengths[:, None])[:, None, None, None, :]
        mask = real if mask is None else mask & real
    return _attend(q, k, v, mask)


def _blocked(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool, lengths: Array | None) -> jax.Array:
    """Blocks of queries, each with the keys it can see: half the work of a causal score matrix, and a block of it in
    memory.
    """
    if not causal or q.shape[1] != k.shape[1] or q.shape[1] <= QUERY_BLOCK:
        return _xla(q, k, v, causal, lengths)
    blocks = []
    for start in range(0, q.shape[1], QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, q.shape[1])
        key_positions = jnp.arange(stop)
        mask = (key_positions[None, :] <= jnp.arange(start, stop)[:, None])[None, None, None]
        if lengths is not None:
            mask = mask & (key_positions[None, :] < lengths[:, None])[:, None, None, None, :]
        blocks.append(_attend(q[:, start:stop], k[:, :stop], v[:, :stop], mask))
    return jnp.concatenate(blocks, axis=1)


BACKENDS: dict[str, Callable[..., jax.Array]] = {"xla": _xla, "blocked": _blocked}


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool,
    lengths: Array | None = None,
    backend: str | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v for every head.

    Args:
        q: ``[B, T, N, H]``.
        k, v: ``[B, S, K, H]``; N must be a multiple of K (grouped-query attention).
        causal: query t sees keys 0..t (T and S start together).
        lengths: int32 ``[B]`` keys that are real, the first of each row; None means all.
        backend: a name in ``BACKENDS``; None picks the one measured best on the default platform.

    Returns:
        ``[B, T, N, H]`` in v's dtype. Rows at padded queries are finite and meaningless.
    """
    if backend is None:
        backend = "blocked" if jax.default_backend() == "cpu" else "xla"
    return BACKENDS[backend](q, k, v, causal, lengths)
