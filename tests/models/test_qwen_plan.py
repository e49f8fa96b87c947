"""The host plans of the Qwen-VL families against transformers' own index arithmetic, on any image size and mixture."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import vision_utils
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

from sav_jax.errors import UserError
from sav_jax.models.anyres import VisualPlan
from sav_jax.models.qwen_plan import fitted_size, plan_visual, position_taps, rope_positions

MERGE = 2
grids = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 11), st.integers(1, 11)), min_size=1, max_size=4)


def plans_of(grids: list[tuple[int, int, int]], **options: Any) -> list[VisualPlan]:
    plans: list[VisualPlan] = []
    for grid in grids:
        plans.append(plan_visual(grid, merge=MERGE, first_patch=sum(plan.num_rows for plan in plans), **options))
    return plans


def joined(plans: list[VisualPlan], name: str) -> np.ndarray:
    return np.concatenate([plan.vision[name] for plan in plans])


def in_patches(grids: list[tuple[int, int, int]]) -> torch.Tensor:
    return torch.tensor([(frames, rows * MERGE, columns * MERGE) for frames, rows, columns in grids])


def lengths_of_runs(ids: np.ndarray) -> np.ndarray:
    starts = np.flatnonzero(np.diff(ids, prepend=-1))
    return np.diff(starts, append=len(ids))


@settings(max_examples=200)
@given(height=st.integers(1, 3000), width=st.integers(1, 3000), multiple=st.sampled_from([28, 32, 8]))
def test_fitted_size_equals_the_reference(height: int, width: int, multiple: int) -> None:
    bounds = 4 * multiple**2, 1280 * multiple**2
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(UserError, match="more than 200 times"):
            fitted_size((height, width), multiple, *bounds)
    else:
        assert fitted_size((height, width), multiple, *bounds) == smart_resize(height, width, multiple, *bounds)


def test_two_hundred_times_is_allowed() -> None:
    assert fitted_size((5, 1000), 28, 56 * 56, 28 * 28 * 1280) == smart_resize(5, 1000)


@given(grids)
def test_places_and_segments(grids: list[tuple[int, int, int]]) -> None:
    plans, thw = plans_of(grids), in_patches(grids)
    np.testing.assert_array_equal(joined(plans, "places"), vision_utils.get_vision_position_ids(thw, MERGE))
    segments = joined(plans, "segments")
    assert segments.min() == 1
    assert segments.max() < 1 + len(segments)
    cumulative = vision_utils.get_vision_cu_seqlens(thw)
    np.testing.assert_array_equal(lengths_of_runs(segments), np.diff(cumulative))
    index = np.concatenate([plan.index for plan in plans])
    np.testing.assert_array_equal(index[:, 0], 1 + np.arange(len(segments) // MERGE**2))
    assert sum(plan.num_rows for plan in plans) == len(segments)


@given(grids, st.integers(1, 5))
def test_windows(grids: list[tuple[int, int, int]], side: int) -> None:
    plans, thw = plans_of(grids, window_side=side), in_patches(grids)
    window_index, cumulative = vision_utils.get_vision_window_index(thw, MERGE, side * MERGE * 7, 7)
    unit = MERGE**2
    order = joined(plans, "order")
    np.testing.assert_array_equal(order.reshape(-1, unit), window_index[:, None] * unit + torch.arange(unit))
    windows = joined(plans, "windows")
    assert windows.min() == 1
    assert len(np.unique(windows)) == len(lengths_of_runs(windows)), "windows are contiguous"
    np.testing.assert_array_equal(lengths_of_runs(windows), np.diff(cumulative))
    assert lengths_of_runs(windows).max() <= (side * MERGE) ** 2
    # The tower is given the rest in this order, and the prompt finds its tokens in it.
    stored = plans_of(grids)
    for name in ("places", "segments"):
        np.testing.assert_array_equal(joined(plans, name), joined(stored, name)[order])
    index = np.concatenate([plan.index for plan in plans])[:, 0]
    np.testing.assert_array_equal(index, 1 + torch.argsort(window_index))


@given(st.tuples(st.integers(1, 2), st.integers(1, 40), st.integers(1, 40)), st.sampled_from([7, 48]))
def test_position_taps(grid: tuple[int, int, int], side: int) -> None:
    index, weight = position_taps(grid, MERGE, side)
    theirs = vision_utils.get_vision_interpolation_indices_and_weights(
        in_patches([grid]), side, align_corners=True, spatial_merge_size=MERGE
    )
    assert index.dtype == np.int32
    assert weight.dtype == np.float32
    np.testing.assert_array_equal(index, theirs[0])
    np.testing.assert_array_equal(weight, theirs[1])


# A piece of a prompt: so many text tokens and then an image, or a video of pairs of frames so many seconds apart.
pieces = st.lists(
    st.tuples(
        st.integers(1, 9),
        st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
        st.sampled_from([None, 0.5, 1.0, 0.3]),
    ),
    max_size=4,
)


@pytest.mark.parametrize("family", [Qwen2VLModel, Qwen2_5_VLModel, Qwen3VLModel])
@given(pieces=pieces, tail=st.integers(1, 9))
def test_rope_positions(family: Any, pieces: list[tuple[int, tuple[int, int, int], float | None]], tail: int) -> None:
    """Mixed prompts of text, images and videos."""
    speed = 5
    types: list[int] = []
    plans, image_grids, video_grids, seconds = [], [], [], []
    for text, (frames, rows, columns), interval in pieces:
        types += [0] * text
        if interval is None:
            plans.append(plan_visual((1, rows, columns), merge=MERGE))
            image_grids.append((1, rows, columns))
            types += [1] * (rows * columns)
            continue
        video_grids.append((frames, rows, columns))
        seconds.append(interval)
        if family is Qwen3VLModel:
            # Its frames are told apart by timestamps in the text.
            for frame in range(frames):
                plans.append(plan_visual((1, rows, columns), merge=MERGE))
                types += [0] * (3 * (frame > 0)) + [2] * (rows * columns)
        else:
            step = speed * interval if family is Qwen2_5_VLModel else 1.0
            plans.append(plan_visual((frames, rows, columns), merge=MERGE, frame_step=step))
            types += [2] * (frames * rows * columns)
    types += [0] * tail
    ours = rope_positions(np.array(types) > 0, plans)
    assert ours.dtype == np.int32

    vision = SimpleNamespace(spatial_merge_size=MERGE, tokens_per_second=speed)
    shell = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    shell.get_vision_position_ids = lambda *args, **options: family.get_vision_position_ids(shell, *args, **options)
    timing = {"second_per_grid_ts": torch.tensor(seconds)} if family is Qwen2_5_VLModel and seconds else {}
    theirs, delta = family.get_rope_index(
        shell,
        torch.zeros(1, len(types), dtype=torch.long),
        torch.tensor([types]),
        image_grid_thw=in_patches(image_grids) if image_grids else None,
        video_grid_thw=in_patches(video_grids) if video_grids else None,
        **timing,
    )
    np.testing.assert_array_equal(ours, theirs[:, 0].T)
    # What generation goes on from (Prompt.extended).
    assert ours.max() + 1 == len(types) + delta.item()
