"""Scaled dot-product attention: one function, back ends chosen by name.

Axes: B batch, T query positions, S key positions, N query heads, K key/value heads, G = N / K query heads sharing one
K, H head width.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from einops import rearrange

from sav_jax.errors import UserError
from sav_jax.models.batch import Array
from sav_jax.models.splash import splash

QUERY_BLOCK = 256
OVERRIDE = "SAV_JAX_ATTENTION"
"""Environment variable with the name of a back end: used wherever it can be, whatever the platform. It is read when a
program is traced: set it before the first batch."""
CHUNK = 1024
"""Queries whose scores exist at a time in the back end ``chunked``."""
_MASK_BLOCK = 4096  # queries whose mask exists at a time
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


def _chunked(
    q: jax.Array, k: jax.Array, v: jax.Array, causal: bool, lengths: Array | None, offsets: Array | None
) -> jax.Array:
    """The reference for one chunk of queries after another: memory grows with T and not with its square."""
    batch, length = q.shape[:2]
    if length <= CHUNK:
        return _xla(q, k, v, causal, lengths, offsets)
    if offsets is None and causal:
        offsets = jnp.zeros(batch, jnp.int32)
    count = -(-length // CHUNK)
    q = jnp.pad(q, ((0, 0), (0, count * CHUNK - length), (0, 0), (0, 0)))

    def attend(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        rows, start = chunk
        return _xla(rows, k, v, causal, lengths, None if offsets is None else offsets + start)

    chunks = rearrange(q, "b (c t) n h -> c b t n h", t=CHUNK)
    y = jax.lax.map(attend, (chunks, jnp.arange(count, dtype=jnp.int32) * CHUNK))
    return rearrange(y, "c b t n h -> b (c t) n h")[:, :length]


def _cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, causal: bool, lengths: Array | None, offsets: Array | None
) -> jax.Array:
    """cuDNN's flash attention: no score matrix in memory, causal work only. What it does not take is chunked."""
    if offsets is not None or not cudnn_takes(q, k):
        return _chunked(q, k, v, causal, lengths, offsets)
    if lengths is not None:
        lengths = jnp.asarray(lengths, jnp.int32)
    return (_cudnn_odd if q.shape[1] % 2 else _cudnn_call)(q, k, v, lengths, causal)


def _cudnn_call(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None, causal: bool) -> jax.Array:
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=causal, key_value_seq_lengths=lengths, implementation="cudnn"
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cudnn_odd(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None, causal: bool) -> jax.Array:
    """The same for an odd number of tokens (SigLIP's 729), which JAX computes but does not differentiate."""
    return _cudnn_call(q, k, v, lengths, causal)


def _cudnn_odd_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None, causal: bool
) -> tuple[jax.Array, Callable[[jax.Array], tuple[jax.Array, ...]]]:
    batch, length = q.shape[:2]
    real = jnp.full(batch, length, jnp.int32) if lengths is None else lengths

    def even(*qkv: jax.Array) -> jax.Array:
        q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in qkv)  # one token that nobody sees
        return _cudnn_call(q, k, v, real, causal)[:, :length]

    return jax.vjp(even, q, k, v)


def _cudnn_odd_backward(
    causal: bool, pullback: Callable[[jax.Array], tuple[jax.Array, ...]], cotangent: jax.Array
) -> tuple[jax.Array | None, ...]:
    return (*pullback(cotangent), None)


_cudnn_odd.defvjp(_cudnn_odd_forward, _cudnn_odd_backward)


def cudnn_takes(q: jax.Array, k: jax.Array) -> bool:
    """Whether cuDNN's attention can be compiled for these arrays: half precision, heads of a multiple of 8 and at most
    128 wide, on an NVIDIA GPU (Ampere or newer); and on a mesh, keys split as the queries are. Any number of tokens
    will do.
    """
    width = q.shape[-1]
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k.dtype != q.dtype or width % 8 or width > 128:
        return False
    # Where "model" (sav_jax/sharding.py) does not divide K, keys stay whole, and cuDNN's partitioning refuses.
    split = dict(jax.typeof(q).sharding.mesh.shape).get("model", 1)
    if k.shape[2] % split:
        return False
    platform = _PLATFORM.get()
    return _has_cudnn() if platform is None else platform in ("gpu", "cuda")


@functools.cache
def _has_cudnn() -> bool:
    if jax.default_backend() != "gpu":
        return False
    device = jax.local_devices()[0]
    return "cuda" in device.client.platform_version and float(device.compute_capability) >= 8.0


def _splash(
    q: jax.Array, k: jax.Array, v: jax.Array, causal: bool, lengths: Array | None, offsets: Array | None
) -> jax.Array:
    """Pallas' kernel for TPU, of causal attention over whole prompts: real tokens come first, so that they see no
    padding and ``lengths`` is not needed. What it does not take is the reference's.
    """
    if not causal or offsets is not None or not splash_takes(q):
        return _xla(q, k, v, causal, lengths, offsets)
    return splash(q, k, v)


def splash_takes(q: jax.Array) -> bool:
    """Whether splash attention pays, and can be placed: on TPU, from 256 tokens on, and with several devices only where
    their mesh is known (``sharding.on``): the compiler cannot partition kernels.
    """
    if _platform() != "tpu" or q.shape[1] < 256:
        return False
    return bool(jax.sharding.get_abstract_mesh().shape) or (_PLATFORM.get() is None and jax.device_count() == 1)


BACKENDS: dict[str, Callable[..., jax.Array]] = {
    "xla": _xla,
    "blocked": _blocked,
    "chunked": _chunked,
    "cudnn": _cudnn,
    "splash": _splash,
}
_OF_PLATFORM = {"cpu": "blocked", "gpu": "cudnn", "cuda": "cudnn", "tpu": "splash"}


_PLATFORM: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """While this is open, what is traced is meant for another platform than the default one."""
    token = _PLATFORM.set(platform)
    try:
        yield
    finally:
        _PLATFORM.reset(token)


def _platform() -> str:
    return _PLATFORM.get() or jax.default_backend()


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
        backend: a name in ``BACKENDS``; None picks what the environment variable ``SAV_JAX_ATTENTION`` names, else the
            one measured best on the platform: the default one, unless :func:`compiling_for` says otherwise. What a
            back end does not take (see :func:`cudnn_takes`) is computed by one that does.

    Returns:
        ``[B, T, N, H]`` in v's dtype. Rows at padded queries are finite and meaningless.
    """
    if segments is not None:
        return _blocked(q, k, v, causal, lengths, offsets, jnp.asarray(segments))
    return BACKENDS[backend or _chosen()](q, k, v, causal, lengths, offsets)


def _chosen() -> str:
    """The back end where the caller names none."""
    name = os.environ.get(OVERRIDE) or _OF_PLATFORM.get(_platform(), "xla")
    if name not in BACKENDS:
        raise UserError(f"{OVERRIDE}={name} is not one of {', '.join(BACKENDS)}")
    return name


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
    if _chosen() == "cudnn" and cudnn_takes(q, k):
        return _cudnn_segments(q, k, v, jnp.asarray(segments))
    blocks = []
    size = CHUNK if _platform() in ("gpu", "cuda") else QUERY_BLOCK  # many small ones take long to compile there
    for start in range(0, q.shape[1], size):
        stop = min(start + size, q.shape[1])
        mask = segments[:, start:stop, None] == segments[:, None, :]
        blocks.append(_attend(q[:, start:stop], k, v, mask[:, None, None]))
    return jnp.concatenate(blocks, axis=1)


def _cudnn_segments(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    """Rows of one segment and padding, such as prompts of one image, need lengths only and no mask in memory."""
    own = segments == segments[:, :1]
    lengths = jnp.sum(own, axis=1, dtype=jnp.int32)

    def whole(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return _cudnn(q, k, v, False, lengths, None)

    def masked(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        blocks = []
        for start in range(0, q.shape[1], _MASK_BLOCK):
            stop = start + _MASK_BLOCK
            mask = segments[:, None, start:stop, None] == segments[:, None, None, :]
            blocks.append(jax.nn.dot_product_attention(q[:, start:stop], k, v, mask=mask, implementation="cudnn"))
        return jnp.concatenate(blocks, axis=1)

    leading = own == (jnp.arange(own.shape[1])[None, :] < lengths[:, None])
    alone = jnp.all(leading & (own | (segments == 0)))
    return jax.lax.cond(alone, whole, masked, q, k, v)


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
