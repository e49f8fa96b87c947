"""Splash attention: its numbers in Pallas' interpreter, its programs by TPU's compiler."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sav_jax.models import attention as attention_module
from sav_jax.models.attention import attention, compiling_for
from sav_jax.models.splash import splash
from sav_jax.plan import topology_devices
from sav_jax.sharding import mesh_of, on


def arrays(length: int, heads: int, kv_heads: int, batch: int = 2, width: int = 16) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=(batch, length, n, width)).astype(np.float32) for n in (heads, kv_heads, kv_heads)]


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.asarray(attention(*map(jnp.asarray, (q, k, v)), causal=True, backend="xla"))


@pytest.mark.parametrize("length", [128, 300])
def test_equals_the_reference(length: int) -> None:
    """Whole blocks, and a length that is filled up; averages of values below 5: a few times 5 * 2^-24."""
    q, k, v = arrays(length, 4, 2)
    ours = jax.jit(partial(splash, interpret=True))(q, k, v)
    np.testing.assert_allclose(ours, reference(q, k, v), rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    ("axes", "heads"), [("data=2,fsdp=2,model=2", 8), ("data=2,model=4", 8), ("data=2,model=4", 6), ("data=8", 4)]
)
def test_every_device_has_the_right_keys(axes: str, heads: int) -> None:
    """Heads over "model", also where it is larger than the number of key heads (2), or does not divide the heads."""
    q, k, v = arrays(130, heads, 2, batch=8)
    mesh = mesh_of(jax.devices(), axes)
    placed = [jax.device_put(x, NamedSharding(mesh, PartitionSpec())) for x in (q, k, v)]
    with on(mesh):
        ours = jax.jit(partial(splash, interpret=True))(*placed)
    np.testing.assert_allclose(ours, reference(q, k, v), rtol=0, atol=5e-6)


@pytest.fixture
def flags_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite's flags are the CPU compiler's, read at its first program; libtpu would end the process over them."""
    jax.jit(lambda x: -x)(jnp.zeros(()))
    monkeypatch.delenv("XLA_FLAGS", raising=False)


@pytest.mark.usefixtures("flags_of_the_cpu")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_compiles_for_tpu(topology: str) -> None:
    """As attention chooses it, forwards and backwards: a kernel, and no score matrix in memory."""
    mesh = mesh_of(topology_devices(topology), "data=2,model=2")
    heads = NamedSharding(mesh, PartitionSpec("data", None, "model"))
    q, k = (jax.ShapeDtypeStruct((4, 1000, n, 128), jnp.bfloat16, sharding=heads) for n in (8, 2))

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(attention(q, k, v, causal=True).astype(jnp.float32))

    with compiling_for("tpu"), on(mesh):
        forwards = jax.jit(lambda *x: attention(*x, causal=True)).lower(q, k, k).compile()
        backwards = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k).compile()
    compiled: Any
    for compiled in (forwards, backwards):
        assert re.search(r'custom_call_target="tpu_custom_call"', compiled.as_text())
        # A chip's score matrices alone would be 2 x 4 x 1000 x 1000 in float32.
        assert compiled.memory_analysis().temp_size_in_bytes < 32e6


def test_where_it_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """On TPU, for whole causal prompts, where the mesh is known; everywhere else, the reference is."""
    asked: list[int] = []

    def asks(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        asked.append(q.shape[1])
        return q

    monkeypatch.setattr(attention_module, "splash", asks)
    mesh = mesh_of(jax.devices(), "data=8")

    def trace(length: int = 512, causal: bool = True, offsets: bool = False) -> bool:
        q = jnp.zeros((8, length, 1, 8))
        asked.clear()
        places = jnp.zeros(8, jnp.int32) if offsets else None
        jax.make_jaxpr(lambda q: attention(q, q, q, causal=causal, offsets=places))(q)
        return bool(asked)

    assert not trace()
    with on(mesh):
        assert not trace()
        with compiling_for("tpu"):
            assert trace()
            assert not trace(length=128)
            assert not trace(causal=False)
            assert not trace(offsets=True)
    with compiling_for("tpu"):
        assert not trace()
