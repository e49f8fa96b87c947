"""The host plan against transformers' own tensor surgery, on any image size."""

from __future__ import annotations

import numpy as np
import torch
from checkpoints import Reference
from checkpoints_llava import TILE
from hypothesis import given, settings
from hypothesis import strategies as st

from sav_jax.models.anyres import best_resolution, bilinear_taps, plan_anyres, plan_base_view

SIDE = 7  # patches along a side of a tile: 30 pixels in patches of 4
sides = st.integers(1, 700)


@settings(max_examples=150)
@given(height=sides, width=sides, first_tile=st.sampled_from([0, 3]))
def test_plan_equals_packing_the_features(reference: Reference, height: int, width: int, first_tile: int) -> None:
    """Gathering by the plan gives what transformers' reshape, unpad, interpolate and concatenate give."""
    config = reference.model.config
    pinpoints = [tuple(p) for p in config.image_grid_pinpoints]
    plan = plan_anyres(
        (height, width),
        first_tile=first_tile,
        tile_size=TILE,
        patches_per_side=SIDE,
        pinpoints=pinpoints,
        max_tiles=4,
    )
    rng = np.random.default_rng(0)
    features = rng.standard_normal((plan.num_rows, SIDE * SIDE, 2)).astype(np.float32)
    newline = rng.standard_normal(2).astype(np.float32)
    (theirs,), _ = reference.model.model.pack_image_features(
        [torch.tensor(features)],
        torch.tensor([[height, width]]),
        image_newline=torch.tensor(newline),
        vision_aspect_ratio=config.vision_aspect_ratio,
    )
    others = rng.standard_normal((first_tile * SIDE * SIDE, 2)).astype(np.float32)
    table = np.concatenate([newline[None], others, features.reshape(-1, 2)])
    ours = np.einsum("VSD,VS->VD", table[plan.index], plan.weight)
    # A source position below 32 is rounded to 2^-19, once or twice; features differ by up to 8 from one place to the
    # next, in two directions.
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=2 * 8 * 2**-19)
    if plan.index.shape[1] == 1:
        np.testing.assert_array_equal(ours, theirs.numpy())


@given(height=sides, width=sides)
def test_best_resolution_equals_the_reference(height: int, width: int) -> None:
    from transformers.image_processing_utils import select_best_resolution

    pinpoints = [(384 * i, 384 * j) for i in range(1, 7) for j in range(1, 7)]
    assert best_resolution((height, width), pinpoints) == select_best_resolution((height, width), pinpoints)


@given(before=st.integers(1, 200), after=st.integers(1, 200))
def test_bilinear_taps_equal_torch(before: int, after: int) -> None:
    values = np.random.default_rng(0).uniform(-1, 1, before).astype(np.float32)
    index, weight = bilinear_taps(before, after)
    ours = (values[index] * weight).sum(-1)
    line = torch.tensor(values)[None, None, None]
    theirs = torch.nn.functional.interpolate(line, size=(1, after), mode="bilinear")[0, 0, 0].numpy()
    # A source position is rounded to 24 bits, once or twice, and neighbouring values differ by up to 2.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=4 * before * 2**-24 + 1e-6)


def test_base_views_take_one_tile_each() -> None:
    plan = plan_base_view(first_tile=2, tokens=4, newline=True)
    assert plan.num_rows == 1
    np.testing.assert_array_equal(plan.index[:, 0], [9, 10, 11, 12, 0])
    np.testing.assert_array_equal(plan_base_view(2, 4, newline=False).index[:, 0], [9, 10, 11, 12])
