"""Whole models on meshes with splash attention, in Pallas' interpreter: the heads of the reference on one device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from checkpoints import Reference, picture

import sav_jax
from sav_jax.examples import Example
from sav_jax.extract import extract_heads, heads_step
from sav_jax.models import attention as attention_module
from sav_jax.models.attention import OVERRIDE
from sav_jax.models.splash import splash
from sav_jax.sharding import mesh_of

TEXT = {"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 32}
ONE, OTHER = picture(37, 53), picture(30, 60, seed=1)
ALONE = [Example("What is it?", (ONE,)), Example("Is <image> left of <image>?", (ONE, OTHER)), Example("No image.")]
SHARED = [Example(f"Is it a cat{'?' * i}", (OTHER,)) for i in range(1, 4)]


@pytest.fixture(scope="module")
def checkpoint(make_reference: Callable[..., Reference]) -> Path:
    return make_reference("llava", text_config=TEXT, vision_config={"num_hidden_layers": 2}).directory


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> np.ndarray:
    """Heads of all examples, by the reference on one device, each prompt read by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(OVERRIDE, "xla")
        heads_step.cache_clear()
        heads = extract_heads(sav_jax.load(checkpoint), [*ALONE, *SHARED], progress=False, reuse_images=False)
        heads_step.cache_clear()
    return heads


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of the queries that the kernel is given, which here takes what it would on TPU, of any length."""
    found: list[tuple[int, ...]] = []

    def interpreted(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        found.append(q.shape)
        return partial(splash, interpret=True)(q, k, v)

    monkeypatch.setenv(OVERRIDE, "splash")
    monkeypatch.setattr(attention_module, "splash", interpreted)
    monkeypatch.setattr(attention_module, "splash_takes", lambda q: True)
    heads_step.cache_clear()
    yield found
    heads_step.cache_clear()


@pytest.mark.parametrize("axes", ["fsdp=2", "model=2", "data=2,fsdp=2,model=2"])
def test_heads_on_a_mesh(axes: str, checkpoint: Path, expected: np.ndarray, asked: list[tuple[int, ...]]) -> None:
    size = 2 if "," not in axes else 8
    lmm = sav_jax.load(checkpoint, mesh=mesh_of(jax.devices()[:size], axes))
    heads = extract_heads(lmm, ALONE, progress=False)
    assert asked, "the kernel is not used"
    np.testing.assert_allclose(heads, expected[: len(ALONE)], rtol=0, atol=1e-5 * np.abs(expected).max())


def test_prompts_that_share_their_image(checkpoint: Path, expected: np.ndarray, asked: list[tuple[int, ...]]) -> None:
    """Rows of several prompts go another way, which knows segments, beside rows that the kernel takes. The two key
    heads are fewer than "model".
    """
    lmm = sav_jax.load(checkpoint, mesh=mesh_of(jax.devices(), "data=2,model=4"))
    heads = extract_heads(lmm, [*ALONE, *SHARED], progress=False)
    assert asked
    np.testing.assert_allclose(heads, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    asked.clear()
    extract_heads(lmm, SHARED, progress=False)
    assert not asked
