"""Images that prompts share are encoded once, and what is read is what every prompt gives by itself."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from checkpoints import Reference, picture
from hypothesis import given
from hypothesis import strategies as st

import sav_jax
from sav_jax import _visual_pool
from sav_jax._visual_pool import Schedule, VisualPool, schedule
from sav_jax.batching import BatchPlan, Bucket
from sav_jax.examples import Example
from sav_jax.extract import extract_heads
from sav_jax.models.processor import Prompt

PICTURES = [picture(37, 53), picture(30, 60, seed=1), picture(44, 40, seed=2), picture(37, 53, seed=3)]
SHOWN = [(0, 1), (0, 2), (0, 3), (1, 0), (2, 1), (3, 3), (0, 1)]
"""Like demonstrations before a query: images in common, and nothing that could be read as one sequence."""
EXAMPLES = [
    *(Example(f"{i} Is <image> like <image>?", tuple(PICTURES[p] for p in shown)) for i, shown in enumerate(SHOWN)),
    *(Example("What is it?", (PICTURES[i],)) for i in (0, 1, 0)),
    Example("What is the capital of France?"),
]
# The same sums in another order: rounding of float32 values of order one.
ROUNDING = 1e-5


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images of every call of the tower apart from the rest."""
    found: list[int] = []
    original = VisualPool.encode

    def spy(self: VisualPool, params: Any, call: tuple[Any, ...]) -> None:
        found.append(len(call[0]))
        original(self, params, call)

    monkeypatch.setattr(VisualPool, "encode", spy)
    return found


@pytest.mark.rounding
@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_heads_are_those_of_every_prompt_alone(
    family: str,
    make_reference: Callable[..., Reference],
    lmm: sav_jax.LMM,
    encoded: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = lmm if family == "llava_onevision" else sav_jax.load(make_reference(family).directory)
    apart = extract_heads(model, EXAMPLES, batch_size=2, progress=False, reuse_images=False)
    assert not encoded
    together = extract_heads(model, EXAMPLES, batch_size=2, progress=False)
    # A LLaVA-OneVision shows a lone image in tiles and several as they are.
    assert sum(encoded) == (6 if family == "llava_onevision" else 4)
    np.testing.assert_allclose(together, apart, rtol=0, atol=ROUNDING)
    encoded.clear()
    tables, _ = _visual_pool._shape_of_tables(model)
    row_bytes = tables.shape[0] * tables.shape[-1] * 4
    largest = max(sum(prompt.visual_index[:, 0] > 0) for prompt in sav_jax.extract.plan_prompts(model, EXAMPLES))
    monkeypatch.setattr(_visual_pool, "POOL_BYTES", int(4 * 2 * largest * row_bytes))
    small = extract_heads(model, EXAMPLES, batch_size=2, progress=False)
    np.testing.assert_allclose(small, together, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("rows_of_pool", [None, 2], ids=["a large pool", "one that images leave"])
def test_a_resumed_run_gives_the_same_bits(
    rows_of_pool: int | None, lmm: sav_jax.LMM, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is left to do: images are encoded with those that they are encoded with in an undisturbed run."""
    prompts = sav_jax.extract.plan_prompts(lmm, EXAMPLES)
    if rows_of_pool is not None:
        tables, _ = _visual_pool._shape_of_tables(lmm)
        largest = max(sum(prompt.visual_index[:, 0] > 0) for prompt in prompts)
        size = rows_of_pool * 4 * largest * tables.shape[0] * tables.shape[-1] * 4
        monkeypatch.setattr(_visual_pool, "POOL_BYTES", int(size))
    media = [sav_jax.extract.media_digests(example) for example in EXAMPLES]

    def heads(wanted: set[int]) -> dict[int, np.ndarray]:
        encoded.clear()
        runs = sav_jax.extract.run_heads(lmm, prompts, EXAMPLES, 2, wanted, media, progress=False, what="", edit=None)
        return {row: values[i] for rows, values in runs for i, row in enumerate(rows)}

    whole = heads(set(range(len(EXAMPLES))))
    everything = sum(encoded)
    assert everything
    fewer = 0
    for first in range(1, len(EXAMPLES)):
        rest = heads(set(range(first, len(EXAMPLES))))
        assert set(rest) >= set(range(first, len(EXAMPLES)))
        assert sum(encoded) <= everything
        fewer += sum(encoded) < everything
        for row, values in rest.items():
            np.testing.assert_array_equal(values, whole[row])
    assert fewer, "what nobody looks for is not encoded"


def test_no_pool_where_it_would_not_pay(lmm: sav_jax.LMM, encoded: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    distinct = [Example("What?", (picture(30, 30, seed=i),)) for i in range(4)]
    extract_heads(lmm, distinct, batch_size=2, progress=False)
    assert not encoded
    monkeypatch.setattr(_visual_pool, "POOL_BYTES", 4096)
    extract_heads(lmm, EXAMPLES[:4], batch_size=2, progress=False)
    assert not encoded


@given(
    shown=st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=3), min_size=1, max_size=14),
    size=st.integers(1, 3),
    capacity=st.integers(1, 120),
)
def test_every_image_of_a_batch_lies_where_it_is_looked_for(shown: list[list[str]], size: int, capacity: int) -> None:
    """The schedule, carried out on a list of labels."""
    rows = {name: 2 * (1 + "abcdefgh".index(name) % 3) for name in "abcdefgh"}
    nothing = np.zeros((1, 1), np.int32)
    prompts = [
        Prompt(nothing[0], sum(rows[n] for n in names), nothing, nothing, media_rows=tuple(rows[n] for n in names))
        for names in shown
    ]
    plans = [
        BatchPlan(Bucket(1, 1, 1), tuple(range(start, min(start + size, len(shown)))), size)
        for start in range(0, len(shown), size)
    ]
    found = schedule(plans, prompts, shown, Fraction(1, 2), capacity)
    images = [name for names in shown for name in names]
    if found is None:
        most = max(sum(rows[n] // 2 for n in {n for row in plan.rows for n in shown[row]}) for plan in plans)
        assert 4 * (len(images) - len(set(images))) < len(images) or not images or 3 * most > capacity
        return
    assert isinstance(found, Schedule)
    assert found.rows <= capacity
    pool: list[tuple[str, int] | None] = [None] * found.rows
    count = 0
    for plan, fresh, places in zip(plans, found.fresh, found.places, strict=True):
        for one in fresh:
            starts = np.cumsum([0, *prompts[one.prompt].media_rows])
            name = shown[one.prompt][starts.tolist().index(one.start)]
            assert one.stop - one.start == rows[name]
            assert one.place >= 1, "row 0 is the newline vector"
            for i in range(rows[name] // 2):
                pool[one.place + i] = name, i
            count += 1
        for row in plan.rows:
            for name, place in zip(shown[row], places[row], strict=True):
                assert pool[place : place + rows[name] // 2] == [(name, i) for i in range(rows[name] // 2)]
    assert count >= len(set(images))
    if found.rows == 1 + sum(rows[n] // 2 for n in set(images)):
        assert count == len(set(images)), "all fit, and each is encoded once"
