"""Attention back ends against each other and against PyTorch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import sav_jax.models.attention
from sav_jax.models.attention import BACKENDS, CAUSAL_BLOCK, QUERY_BLOCK

# Compiled: one by one, the operations of every shape would be, too.
attention = jax.jit(sav_jax.models.attention.attention, static_argnames=("causal", "backend"))
segment_attention = jax.jit(sav_jax.models.attention.segment_attention, static_argnames="longest")


def arrays(length: int, heads: int, kv_heads: int, batch: int = 2) -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (heads, kv_heads, kv_heads)
    q, k, v = (jax.random.normal(key, (batch, length, n, 8)) for key, n in zip(keys, shapes, strict=True))
    return q, k, v


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)], ids=str)
def test_equals_pytorch(backend: str, causal: bool, heads: tuple[int, int]) -> None:
    q, k, v = arrays(19, *heads)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *(torch.tensor(np.asarray(x)).transpose(1, 2) for x in (q, k, v)), is_causal=causal, enable_gqa=True
    ).transpose(1, 2)
    ours = attention(q, k, v, causal=causal, backend=backend)
    # averages of values below 5: a few times 5 * 2^-24
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=5e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [CAUSAL_BLOCK, 2 * QUERY_BLOCK + 37, 10 * CAUSAL_BLOCK + 5])
def test_blocks_change_nothing(length: int, causal: bool) -> None:
    """One block; several; several groups of several."""
    q, k, v = arrays(length, 6, 2)
    lengths = jnp.array([length, length // 2]) if causal else None
    whole = attention(q, k, v, causal=causal, lengths=lengths, backend="xla")
    blocked = attention(q, k, v, causal=causal, lengths=lengths, backend="blocked")
    assert bool(jnp.isfinite(blocked).all())
    real = length // 2 if causal else length
    np.testing.assert_allclose(blocked[0], whole[0], rtol=0, atol=5e-6)
    np.testing.assert_allclose(blocked[1, :real], whole[1, :real], rtol=0, atol=5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
def test_padding_is_never_seen(backend: str, causal: bool) -> None:
    """Whatever stands in the padding, even NaN-like extremes, real queries give the same bits."""
    q, k, v = arrays(12, 4, 2)
    lengths = jnp.array([12, 7])
    plain = attention(q, k, v, causal=causal, lengths=lengths, backend=backend)
    dirty = [x.at[1, 7:].set(1e30) for x in (q, k, v)]
    ours = attention(*dirty, causal=causal, lengths=lengths, backend=backend)
    np.testing.assert_array_equal(ours[1, :7], plain[1, :7])
    assert bool(jnp.isfinite(plain).all())


def test_later_tokens_are_never_seen() -> None:
    q, k, v = arrays(12, 4, 2)
    plain = attention(q, k, v, causal=True)
    changed = attention(q, k.at[:, 8:].add(3.0), v.at[:, 8:].add(3.0), causal=True)
    np.testing.assert_array_equal(changed[:, :8], plain[:, :8])


@pytest.mark.parametrize("sizes", [[5, 1, 7], [300, 20, 280]], ids=["one block", "blocks of queries"])
def test_segments_see_themselves_only(sizes: list[int]) -> None:
    q, k, v = arrays(sum(sizes), 4, 2)
    segments = jnp.asarray(np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)[None].repeat(2, 0))
    ours = segment_attention(q, k, v, segments)
    starts = np.cumsum([0, *sizes])
    for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        alone = attention(q[:, start:stop], k[:, start:stop], v[:, start:stop], causal=False)
        np.testing.assert_allclose(ours[:, start:stop], alone, rtol=0, atol=5e-6)


@pytest.mark.parametrize("length", [27, 28, 30, 47, 64])
def test_short_segments_need_their_neighbourhood_only(length: int) -> None:
    """Segments of 1 to 9 tokens in one row, of 9 in the other, and padding."""
    longest = 9
    sizes = np.random.default_rng(0).integers(1, longest + 1, length)
    ids = np.stack([np.repeat(np.arange(length), sizes)[:length], np.arange(length) // longest]).astype(np.int32) + 1
    ids[:, length - 5 :] = 0
    q, k, v = arrays(length, 4, 2)
    whole = segment_attention(q, k, v, jnp.asarray(ids))
    near = segment_attention(q, k, v, jnp.asarray(ids), longest=longest)
    assert near.shape == whole.shape
    np.testing.assert_allclose(near[:, : length - 5], whole[:, : length - 5], rtol=0, atol=5e-6)
    assert bool(jnp.isfinite(near).all())


def test_unknown_backend() -> None:
    with pytest.raises(KeyError):
        attention(*arrays(4, 2, 2), causal=True, backend="quantum")
