"""Videos in every family that reads them against transformers' PyTorch model, in float32, and the rules by which frames
are sized and prepared.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import Reference, picture
from families import assert_invariant
from families_video import ALONE, CASES, NAMES, Case, VideoFamily, inputs, pixels
from hypothesis import given
from hypothesis import strategies as st

import sav_jax
from sav_jax.errors import UserError
from sav_jax.extract import plan_prompts
from sav_jax.models.anyres import plan_frames
from sav_jax.models.processor import load_processor
from sav_jax.models.qwen_plan import fitted_size
from sav_jax.models.video import VideoShape, uniform_frames, video_settings

# As in test_families.py: values are of order one.
PARITY = 1e-4
QWEN = NAMES[1:]


@pytest.fixture(scope="module", params=NAMES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VideoFamily:
    return VideoFamily.build(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("case", CASES)
def test_inputs_are_identical(family: VideoFamily, case: str) -> None:
    theirs = family.theirs[case]
    prompt = plan_prompts(family.lmm, [CASES[case].example()])[0]
    np.testing.assert_array_equal(prompt.token_ids, theirs["input_ids"][0])
    ours = family.pixels(case)
    assert ours.dtype == np.float32
    assert len(ours) == prompt.num_rows
    if case != "no image":
        np.testing.assert_array_equal(ours, pixels(family.reference, theirs))
    if "mm_token_type_ids" in theirs:
        names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        positions, _ = family.reference.model.model.get_rope_index(
            theirs["input_ids"],
            theirs["mm_token_type_ids"],
            **{name: theirs[name] for name in names if name in theirs},
        )
        np.testing.assert_array_equal(prompt.positions, positions[:, 0].T)


@pytest.mark.parametrize("case", CASES)
def test_every_head_and_logit(family: VideoFamily, case: str) -> None:
    heads, logits = family.expected[case]
    assert heads.shape == family.lmm.heads_shape
    assert np.abs(heads).max(axis=-1).min() > 1e-2, "a head near zero would hide an error"
    np.testing.assert_allclose(family.mixed[case][0], heads, rtol=0, atol=PARITY)
    np.testing.assert_allclose(family.mixed[case][1], logits, rtol=0, atol=PARITY)


@pytest.mark.parametrize("case", ALONE)
def test_batch_padding_and_bucket_do_not_matter(family: VideoFamily, case: str) -> None:
    assert_invariant(family.alone[case], family.mixed[case][0])


def test_frames_and_their_order_and_places_matter(family: VideoFamily) -> None:
    """The cases above would not notice a tower whose output never arrives."""
    names = ("even", "reversed", "two", "two, marked", "image", "image after video")
    heads = [family.expected[name][0] for name in names]
    for i, one in enumerate(heads):
        for other in heads[:i]:
            assert np.abs(one - other).max() > 0.01


def test_one_frame(family: VideoFamily) -> None:
    """transformers refuses to size a single frame for Qwen3-VL; here it is sized and padded as two equal ones."""
    case = Case("What is it?", ((1, 37, 53, 2.0),), shown=16)
    if family.name == "qwen3_vl":
        video = case.load_videos()[0]
        twice = sav_jax.Video([*video.frames, *video.frames], fps=1e9)  # both at 0.0 seconds
        theirs = sav_jax.extract_heads(
            family.lmm, [sav_jax.Example(case.question, videos=(twice,), frames=2)], progress=False
        )[0]
    else:
        theirs = family.reference.run(inputs(family.reference, case))[0]
    ours = sav_jax.extract_heads(family.lmm, [case.example()], progress=False)[0]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=PARITY)


def test_a_prompt_is_extended_behind_a_video(family: VideoFamily) -> None:
    """Generation: greedy tokens of transformers."""
    arguments = family.theirs["odd"]
    with torch.no_grad():
        ids = family.reference.model.generate(
            **arguments, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    theirs = ids[0, arguments["input_ids"].shape[1] :].tolist()
    (ours,) = sav_jax.generate(family.lmm, [CASES["odd"].example()], max_new_tokens=5, progress=False)
    assert list(ours.token_ids) == theirs[: len(ours.token_ids)]
    assert len(ours.token_ids) > 0


# Families without


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_a_family_without_videos_says_so(make_reference: Callable[..., Reference], name: str) -> None:
    lmm = sav_jax.load(make_reference(name).directory)
    example = sav_jax.Example("What?", videos=("missing.mp4",), source="rows.jsonl:3")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^rows.jsonl:3: this model reads no videos \(those that do: .*\)$"):
        sav_jax.extract_heads(lmm, [example], progress=False)
    with pytest.raises(UserError, match="reads no videos"):
        lmm.processor.plan("What?", [], [VideoShape(30, 30, (0,), 1, 1.0)])


def test_a_chat_template_that_leaves_videos_out_is_found(reference: Reference, tmp_path: Path) -> None:
    directory = shutil.copytree(reference.directory, tmp_path / "old")
    file = directory / "chat_template.jinja"
    file.write_text(file.read_text().replace("== 'video'", "== 'none'"))
    processor = load_processor(directory)
    video = VideoShape(30, 30, (0, 1), 2, 1.0)
    assert processor.plan("<video> What?", [], [video]).num_rows == 2
    with pytest.raises(UserError, match=r"0 video tokens for 1 videos.*does the chat template leave videos out\?"):
        processor.plan("What?", [], [video])


def test_marks_are_counted(lmm: sav_jax.LMM) -> None:
    video = VideoShape(30, 30, (0, 1), 2, 1.0)
    with pytest.raises(UserError, match="question has 1 <video> marks for 2 videos"):
        lmm.processor.plan("<video> What?", [], [video, video])


# LLaVA-OneVision


@given(frames=st.integers(1, 3), side=st.integers(1, 9), first=st.integers(0, 4))
def test_frames_are_pooled_as_torch_does(frames: int, side: int, first: int) -> None:
    table = np.random.default_rng(0).random((1 + (first + frames) * side**2, 5), np.float32)
    plan = plan_frames(frames, first_tile=first, patches_per_side=side)
    assert plan.index.dtype == np.int32
    assert plan.weight.dtype == np.float32
    assert plan.num_rows == frames
    ours = (table[plan.index] * plan.weight[:, :, None]).sum(1)
    stored = table[1 + first * side**2 :].reshape(frames, side, side, 5).transpose(0, 3, 1, 2)
    pooled = torch.nn.functional.interpolate(torch.tensor(stored), size=[-(-side // 2)] * 2, mode="bilinear")
    theirs = np.concatenate([pooled.permute(0, 2, 3, 1).reshape(-1, 5).numpy(), table[:1]])
    # Positions up to 9 are rounded to 2^-20, and so are the weights, along both axes; values lie between 0 and 1.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2 * 2**-20)


# Sizes of frames in the Qwen families


@given(
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    frames=st.integers(2, 40),
    least=st.integers(1, 300),
    room=st.integers(0, 3000),
)
def test_sizes_of_frames_that_share_their_bounds(size: tuple[int, int], frames: int, least: int, room: int) -> None:
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

    bounds = least * 64, (least + room) * 64
    try:
        theirs = smart_resize(frames, *size, 2, 8, *bounds)
    except ValueError:
        with pytest.raises(UserError, match="more than 200 times"):
            fitted_size(size, 8, *bounds, frames=frames)
        return
    assert fitted_size(size, 8, *bounds, frames=frames) == theirs


@pytest.mark.parametrize("frames", [2, 5, 16, 768])
@pytest.mark.parametrize("size", [(1080, 1920), (360, 480), (50, 50)])
def test_the_cap_per_frame(
    make_reference: Callable[..., Reference], tmp_path: Path, size: tuple[int, int], frames: int
) -> None:
    """Of Qwen3-VL by transformers' own count."""
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    settings = {"size": {"shortest_edge": 4096, "longest_edge": 25_165_824}, "max_video_tokens": 200}
    for capped in (False, True):
        directory = _with_settings(
            make_reference("qwen3_vl"), tmp_path / str(capped), cap_pixels_per_frame=capped, **settings
        )
        video = VideoShape(*size, tuple(range(frames)), frames, 1.0)
        shell = SimpleNamespace(
            patch_size=4, temporal_patch_size=2, merge_size=2, cap_pixels_per_frame=capped, **settings
        )
        plans = load_processor(directory).plan_video(video, 0)
        assert sum(plan.num_rows for plan in plans) == Qwen3VLVideoProcessor.get_num_of_video_patches(
            shell, frames, *size
        )


def test_the_cap_per_frame_of_qwen2_vl(make_reference: Callable[..., Reference], tmp_path: Path) -> None:
    """90 % of 100 tokens shared by eight pairs of frames: 11 each, 704 pixels."""
    settings = {"size": {"shortest_edge": 64, "longest_edge": 64_000}, "max_video_tokens": 100}
    video = VideoShape(400, 400, tuple(range(16)), 16, 1.0)
    tokens = []
    for capped in (False, True):
        directory = _with_settings(
            make_reference("qwen2_vl"), tmp_path / str(capped), cap_pixels_per_frame=capped, **settings
        )
        tokens.append(len(load_processor(directory).plan_video(video, 0)[0].index))
    assert tokens == [8 * 31 * 31, 8 * 3 * 3]


def _with_settings(reference: Reference, directory: Path, **settings: Any) -> Path:
    shutil.copytree(reference.directory, directory)
    (directory / "video_preprocessor_config.json").write_text(json.dumps(settings))
    return directory


def test_settings_come_from_where_transformers_reads_them(tmp_path: Path) -> None:
    assert video_settings(tmp_path) == {}
    (tmp_path / "preprocessor_config.json").write_text('{"min_pixels": 1, "image_mean": null, "fps": 2}')
    assert video_settings(tmp_path) == {"min_pixels": 1}
    (tmp_path / "video_preprocessor_config.json").write_text('{"min_pixels": 2}')
    assert video_settings(tmp_path) == {"min_pixels": 2}
    (tmp_path / "processor_config.json").write_text('{"image_token": "<image>"}')
    assert video_settings(tmp_path) == {"min_pixels": 2}
    (tmp_path / "processor_config.json").write_text('{"video_processor": {"min_pixels": 3}}')
    assert video_settings(tmp_path) == {"min_pixels": 3}
    (tmp_path / "processor_config.json").write_text("{")
    with pytest.raises(UserError, match=r"processor_config\.json: unreadable"):
        video_settings(tmp_path)


def test_bounds_as_older_releases_write_them(make_reference: Callable[..., Reference], tmp_path: Path) -> None:
    """Qwen2-VL's own: one file for images and videos."""
    directory = shutil.copytree(make_reference("qwen2_vl").directory, tmp_path / "old")
    (directory / "video_preprocessor_config.json").unlink()
    file = directory / "preprocessor_config.json"
    old = {"size": {"min_pixels": 3136, "max_pixels": 12_845_056}, "min_pixels": 3136, "max_pixels": 12_845_056}
    file.write_text(json.dumps(json.loads(file.read_text()) | old))
    processor = load_processor(directory)
    assert processor.video_processor.size["shortest_edge"] == 3136
    assert processor.video_processor.size["longest_edge"] == 12_845_056
    file.write_text(json.dumps({"image_processor_type": "Qwen2VLImageProcessor"}))
    assert load_processor(directory).video_processor.size["longest_edge"] == 768 * 28**2


# What is shown


@given(total=st.integers(1, 400), count=st.integers(1, 40))
def test_uniform_frames(total: int, count: int) -> None:
    frames = uniform_frames(total, count)
    assert len(frames) == min(total, count)
    assert frames[0] == 0
    assert len(frames) == 1 or frames[-1] == total - 1
    steps = np.diff(frames)
    assert len(steps) == 0 or (steps.min() >= 1 and np.ptp(steps) <= 1)


def test_pillow_and_torch_resize_frames_alike() -> None:
    """What is given up by resizing with Pillow: torch works with weights of 16 bits and may round by one level."""
    frame = picture(90, 120)
    ours = np.asarray(frame.resize((56, 42), 3), int)
    stored = torch.tensor(np.asarray(frame).transpose(2, 0, 1)[None].copy())
    theirs = torch.nn.functional.interpolate(stored, size=(42, 56), mode="bicubic", antialias=True)[0]
    difference = np.abs(ours - theirs.permute(1, 2, 0).numpy().astype(int))
    assert difference.max() <= 1
