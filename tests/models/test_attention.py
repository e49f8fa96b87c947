"""Attention back ends against each other and against PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import sav_jax.models.attention
from sav_jax.errors import UserError
from sav_jax.models.attention import BACKENDS, CAUSAL_BLOCK, OVERRIDE, QUERY_BLOCK, compiling_for

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


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, causal: bool, cached: bool) -> None:
    monkeypatch.setattr(sav_jax.models.attention, "CHUNK", 16)
    q, k, v = arrays(37, 6, 2)
    rows = {"lengths": np.array([37, 18], np.int32), "offsets": np.array([0, 5], np.int32) if cached else None}
    both = [attention(q, k, v, causal=causal, **rows, backend=backend) for backend in ("xla", "chunked")]
    np.testing.assert_allclose(both[1], both[0], rtol=0, atol=5e-6)


# cuDNN's kernel runs on NVIDIA's GPUs only (scripts/bench_gpu.py compares its numbers there); what is compiled for one,
# and when, can be seen anywhere.

FMHA = "__cudnn$fmha"


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The program of a function as it would be compiled for an NVIDIA GPU."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)

    def lower(function: Callable[..., jax.Array], *shapes: Any) -> str:
        with compiling_for("gpu"):
            return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()

    return lower


def operands(
    dtype: Any = jnp.bfloat16, width: int = 128, length: int = 64, kv_heads: int = 4, sharding: Any = None
) -> list[jax.ShapeDtypeStruct]:
    """q, k, v of eight rows and eight query heads."""
    shapes = [(8, length, heads, width) for heads in (8, kv_heads, kv_heads)]
    return [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape in shapes]


def causal(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    lengths = np.arange(1, 9)
    return sav_jax.models.attention.attention(q, k, v, causal=True, lengths=lengths)


@pytest.mark.parametrize(
    ("options", "fused"),
    [
        ({}, True),
        ({"dtype": jnp.float16, "width": 72}, True),
        ({"length": 77}, True),
        ({"dtype": jnp.float32}, False),
        ({"width": 20}, False),
        ({"width": 136}, False),
    ],
    ids=str,
)
def test_a_gpu_runs_cudnn_where_it_can(lowered: Callable[..., str], options: dict[str, Any], fused: bool) -> None:
    assert (FMHA in lowered(causal, *operands(**options))) == fused


@pytest.mark.parametrize("length", [64, 77])
def test_cudnn_is_differentiated(lowered: Callable[..., str], length: int) -> None:
    def gradients(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        return jax.grad(lambda *qkv: causal(*qkv).astype(jnp.float32).sum(), argnums=(0, 1, 2))(q, k, v)

    assert f"{FMHA}SoftmaxBackward" in lowered(gradients, *operands(length=length))


def test_a_cache_is_read_without_cudnn(lowered: Callable[..., str]) -> None:
    def following(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return sav_jax.models.attention.attention(q[:, :1], k, v, causal=True, offsets=jnp.arange(8))

    assert FMHA not in lowered(following, *operands())


def test_cudnn_sees_causal_rows_of_their_lengths(lowered: Callable[..., str]) -> None:
    text = lowered(causal, *operands())
    assert '"PADDING_CAUSAL"' in text.replace("\\22", '"')
    full = lowered(lambda q, k, v: sav_jax.models.attention.attention(q, k, v, causal=False), *operands())
    assert '"NO_MASK"' in full.replace("\\22", '"')


@pytest.mark.parametrize(("kv_heads", "fused"), [(4, True), (2, False)])
def test_cudnn_needs_keys_split_as_queries(lowered: Callable[..., str], kv_heads: int, fused: bool) -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    text = lowered(causal, *operands(kv_heads=kv_heads, sharding=sharding))
    assert ("CustomSPMDPartitioning" in text) == fused  # the kernel's own rule for a mesh


def test_segments_run_on_cudnn_with_and_without_a_mask(lowered: Callable[..., str]) -> None:
    ids = jax.ShapeDtypeStruct((8, 64), jnp.int32)
    text = lowered(sav_jax.models.attention.segment_attention, *operands(kv_heads=8, width=80), ids)
    # One program for one image per row, one for several: which it is, the rows say.
    assert f"{FMHA}Softmax" in text
    assert f"{FMHA}ScaleBiasSoftmax" in text
    assert "stablehlo.case" in text


def test_the_environment_has_the_last_word(lowered: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OVERRIDE, "xla")
    assert FMHA not in lowered(lambda *qkv: causal(*qkv), *operands())
    monkeypatch.setenv(OVERRIDE, "quantum")
    with pytest.raises(UserError, match="SAV_JAX_ATTENTION=quantum is not one of xla, blocked, chunked, cudnn"):
        lowered(lambda *qkv: causal(*qkv), *operands())


def test_without_a_gpu_cudnn_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OVERRIDE, "cudnn")
    q, k, v = (x.astype(jnp.bfloat16) for x in arrays(19, 4, 2))
    ours = jax.jit(lambda *qkv: sav_jax.models.attention.attention(*qkv, causal=True))(q, k, v)
    np.testing.assert_array_equal(ours, attention(q, k, v, causal=True, backend="xla"))
