"""Scaled dot-product attention: one function, back ends chosen by name.

Axes: B batch, T query positions, S key positions, N query heads, K key/value heads, G = N / K query heads sharing one
K, H head width.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from einops import rearrange

from sav_jax.models.batch import Array

QUERY_BLOCK = 256
CAUSAL_BLOCK = 96


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


def _attend_in_caches(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """The same for a CPU. Heads come first, and the queries of a group are rows of one product: else the scores would
    be transposed, not q. Sums divide what comes out, ``[T, H]``, and not the weights, ``[T, S]``.
    """
    group = q.shape[2] // k.shape[2]
    q = rearrange(q, "b t (k g) h -> b k (g t) h", g=group)
    k, v = (rearrange(x, "b s k h -> b k s h") for x in (k, v))
    scores = jnp.einsum("BKRH,BKSH->BKRS", q, k, preferred_element_type=jnp.float32) * (q.shape[-1] ** -0.5)
    if mask is not None:
        scores = rearrange(scores, "b k (g t) s -> b k g t s", g=group)
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
        scores = rearrange(scores, "b k g t s -> b k (g t) s")
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    y = jnp.einsum("BKRS,BKSH->BKRH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
    return rearrange(y.astype(v.dtype), "b k (g t) h -> b t (k g) h", g=group)


def _xla(
    q: jax.Array, k: jax.Array, v: jax.Array, causal: bool, lengths: Array | None, offsets: Array | None
) -> jax.Array:
    """The reference: the whole score matrix at once."""
    mask = None
    key_positions = jnp.arange(k.shape[1])
    query_positions = jnp.arange(q.shape[1])
    if offsets is not None:
        mask = (key_positions[None, None, :] <= (query_positions[None, :] + offsets[:, None])[:, :, None])[
            :, None, None
        ]
    elif causal:
        mask = (key_positions[None, :] <= query_positions[:, None])[None, None, None]
    if lengths is not None:
        real = (key_positions[None, :] < lengths[:, None])[:, None, None, None, :]
        mask = real if mask is None else mask & real
    return _attend(q, k, v, mask)


def _blocked(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    causal: bool,
    lengths: Array | None,
    offsets: Array | None,
    segments: jax.Array | None = None,
) -> jax.Array:
    """Blocks of queries, each with the keys it can see: half the work of a causal score matrix, and a block of it in
    memory, which a CPU's caches hold.
    """
    if offsets is not None or (lengths is not None and not causal):
        return _xla(q, k, v, causal, lengths, offsets)
    if not causal:
        starts = range(0, q.shape[1], QUERY_BLOCK)
        return jnp.concatenate([_attend_in_caches(q[:, i : i + QUERY_BLOCK], k, v, None) for i in starts], axis=1)
    # Padding comes last: no real query sees it, whatever the lengths.
    length, size = q.shape[1], CAUSAL_BLOCK
    # At most eight groups of blocks see the same keys; those of a group run one after the other, by a loop: XLA would
    # compute the scores of all before it uses those of any.
    group = size * max(1, -(-length // (8 * size)))
    results = []
    for start in range(0, length, group):
        stop = min(start + group, length)
        count = -(-(stop - start) // size)
        cut = ((0, 0), (0, count * size - (stop - start) if count > 1 else 0))
        own = None if segments is None else jnp.pad(segments[:, start:stop], cut)
        queries = jnp.pad(q[:, start:stop], (*cut, (0, 0), (0, 0)))

        def block(queries: jax.Array, own: jax.Array | None, at: jax.Array | int, stop: int = stop) -> jax.Array:
            mask = (jnp.arange(stop)[None, :] <= (at + jnp.arange(queries.shape[1]))[:, None])[None]
            if segments is not None and own is not None:
                mask = mask & _visible(own, segments[:, :stop])
            return _attend_in_caches(queries, k[:, :stop], v[:, :stop], mask[:, None, None])

        if count == 1:
            results.append(block(queries, own, start))
            continue
        parts = jax.tree.map(lambda x, n=count: rearrange(x, "b (n t) ... -> n b t ...", n=n), (queries, own))
        y = jax.lax.map(lambda part, block=block: block(*part), (*parts, start + size * jnp.arange(count)))
        results.append(rearrange(y, "n b t m h -> b (n t) m h")[:, : stop - start])
    return jnp.concatenate(results, axis=1)


BACKENDS: dict[str, Callable[..., jax.Array]] = {"xla": _xla, "blocked": _blocked}


_PLATFORM: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """While this is open, what is traced is meant for another platform than the default one."""
    token = _PLATFORM.set(platform)
    try:
        yield
    finally:
        _PLATFORM.reset(token)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool,
    lengths: Array | None = None,
    offsets: Array | None = None,
    segments: Array | None = None,
    backend: str | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v for every head.

    Args:
        q: ``[B, T, N, H]``.
        k, v: ``[B, S, K, H]``; N must be a multiple of K (grouped-query attention).
        causal: query t sees keys 0..t (T and S start together).
        lengths: int32 ``[B]`` keys that are real, the first of each row; None means all.
        offsets: int32 ``[B]``; with causal, query t of row b stands at key ``offsets[b] + t`` (a cache before it).
        segments: int32 ``[B, S]``; with causal and without offsets, a query sees the keys of segment 0 and of its own.
        backend: a name in ``BACKENDS``; None picks the one measured best on the platform: the default one, unless
            :func:`compiling_for` says otherwise.

    Returns:
        ``[B, T, N, H]`` in v's dtype. Rows at padded queries are finite and meaningless.
    """
    if segments is not None:
        return _blocked(q, k, v, causal, lengths, offsets, jnp.asarray(segments))
    if backend is None:
        backend = "blocked" if (_PLATFORM.get() or jax.default_backend()) == "cpu" else "xla"
    return BACKENDS[backend](q, k, v, causal, lengths, offsets)


def attention_at(
    q: jax.Array, k: jax.Array, v: jax.Array, places: jax.Array, segments: Array | None = None
) -> jax.Array:
    """Causal attention of a few queries.

    Args:
        q: ``[B, R, N, H]``.
        k, v: ``[B, S, K, H]``.
        places: int32 ``[B, R]``: query r of row b sees keys 0..places[b, r].
        segments: int32 ``[B, S]``, see :func:`attention`.

    Returns:
        ``[B, R, N, H]`` in v's dtype.
    """
    mask = jnp.arange(k.shape[1])[None, None, :] <= places[:, :, None]
    if segments is not None:
        mask = mask & _visible(jnp.take_along_axis(jnp.asarray(segments), places, axis=1), jnp.asarray(segments))
    return _attend(q, k, v, mask[:, None, None])


def _visible(own: jax.Array, keys: jax.Array) -> jax.Array:
    """Segments of queries ``[B, T]`` and of keys ``[B, S]`` -> bool ``[B, T, S]``: the own one, and the beginning."""
    return (keys == 0)[:, None, :] | (keys[:, None, :] == own[:, :, None])


def segment_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: Array, longest: int | None = None
) -> jax.Array:
    """Full attention within segments: packed images, frames or windows that must not see each other.

    Args:
        q: ``[B, T, N, H]``.
        k, v: ``[B, T, K, H]``.
        segments: int32 ``[B, T]``; a query sees the keys of its own segment. Padding is a segment too (0).
        longest: every segment but padding is contiguous and no longer than this: keys further away are not looked at,
            and the work grows with T and not with its square.

    Returns:
        ``[B, T, N, H]`` in v's dtype. Rows at padding are finite and meaningless.
    """
    if longest is not None and 3 * longest < q.shape[1]:
        return _neighbours(q, k, v, segments, longest)
    blocks = []
    for start in range(0, q.shape[1], QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, q.shape[1])
        mask = segments[:, start:stop, None] == segments[:, None, :]
        blocks.append(_attend(q[:, start:stop], k, v, mask[:, None, None]))
    return jnp.concatenate(blocks, axis=1)


def _neighbours(q: jax.Array, k: jax.Array, v: jax.Array, segments: Array, longest: int) -> jax.Array:
    """Blocks of ``longest`` queries; a segment that touches a block ends within the block before or after it."""
    batch, length = segments.shape
    count = -(-length // longest)
    rest = count * longest - length

    def blocks(x: Array, around: int) -> jax.Array:
        """``[B, T, ...]`` -> ``[(B, blocks), (1 + 2 * around) * longest, ...]``, -1 where there is nothing."""
        pad = ((0, 0), (around * longest, around * longest + rest), *[(0, 0)] * (x.ndim - 2))
        x = jnp.pad(x, pad, constant_values=-1)
        x = rearrange(x, "b (n w) ... -> b n w ...", w=longest)
        x = jnp.concatenate([x[:, i : i + count] for i in range(1 + 2 * around)], axis=2)
        return rearrange(x, "b n w ... -> (b n) w ...")

    mask = blocks(segments, 0)[:, :, None] == blocks(segments, 1)[:, None, :]
    y = _attend(blocks(q, 0), blocks(k, 1), blocks(v, 1), mask[:, None, None])
    return rearrange(y, "(b n) w ... -> b (n w) ...", b=batch)[:, :length]
