"""Videos from files and from memory: which frames are shown, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import sys
import wave
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
from videos import counting, number_of, write_video

import sav_jax
from sav_jax import Example, UserError, Video, read_examples
from sav_jax.models.video import uniform_frames
from sav_jax.video import VideoError, _decode, _probe, video_frames, video_shape


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """H.264 with five keyframes and frames stored out of order."""
    return write_video(tmp_path_factory.mktemp("clip") / "a.mp4", counting(50))


# Files


@pytest.mark.parametrize("suffix", [".mkv", ".mov"])
def test_frames_are_what_was_written(tmp_path: Path, suffix: str) -> None:
    frames = [np.random.default_rng(i).integers(0, 256, (13, 22, 3), np.uint8) for i in range(9)]
    example = Example("What?", videos=(write_video(tmp_path / f"a{suffix}", frames, rate=5),), frames=4)
    (shape,) = example.video_shapes()
    assert (shape.height, shape.width, shape.frames, shape.total, shape.rate) == (13, 22, (0, 2, 5, 8), 9, 5.0)
    assert shape.shown_rate == 4 / 9 * 5
    (shown,) = example.load_videos()
    assert [(image.mode, image.size) for image in shown] == [("RGB", (22, 13))] * 4
    for image, number in zip(shown, shape.frames, strict=True):
        np.testing.assert_array_equal(np.asarray(image), frames[number])


@pytest.mark.parametrize("suffix", [".avi", ".mp4", ".webm"])
@pytest.mark.parametrize("count", [1, 2, 7, 16, 60])
def test_frames_are_counted_in_the_order_they_are_shown(tmp_path: Path, suffix: str, count: int) -> None:
    path = write_video(tmp_path / f"a{suffix}", counting(50))
    assert [number_of(image) for image in video_frames(path, count)] == list(uniform_frames(50, count))


@pytest.mark.parametrize("count", [2, 5, 16, 50])
def test_seeking_gives_the_same_frames(clip: Path, count: int) -> None:
    probe = _probe(clip, count)
    assert len(set(probe.keys)) == min(count, 5)
    sought, decoded = _decode(clip, probe, seek=True), _decode(clip, probe, seek=False)
    assert sought is not None
    assert decoded is not None
    for one, other in zip(sought, decoded, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_what_is_not_shown_is_not_decoded(tmp_path: Path) -> None:
    """Rubbish between the first and the last keyframe."""
    frames = [np.random.default_rng(i).integers(0, 256, (24, 32, 3), np.uint8) for i in range(50)]
    path = write_video(tmp_path / "a.mp4", frames)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = b"\xff" * 2000
    path.write_bytes(content)
    assert len(video_frames(path, 2)) == 2
    example = Example("What?", videos=(path,), source="rows.jsonl:3", frames=50)
    with pytest.raises(UserError, match=r'^rows.jsonl:3: field "video": .*a.mp4 cannot be read: ') as caught:
        example.load_videos()
    assert "\n" not in str(caught.value)


def test_a_last_frame_that_is_withheld_is_stood_in_for(clip: Path) -> None:
    """As decoders do with some streams of B-frames."""
    probe = _probe(clip, 50)
    step = probe.times[1] - probe.times[0]
    longer = dataclasses.replace(probe, times=(*probe.times[:2], probe.times[-1] + step), keys=probe.keys[:3])
    frames = _decode(clip, longer, seek=False)
    assert frames is not None
    assert [number_of(image) for image in frames] == [0, 1, 49]
    far = dataclasses.replace(longer, times=(*probe.times[:2], probe.times[-1] + 10 * step))
    with pytest.raises(VideoError, match="frame 2 of 50 is not there"):
        _decode(clip, far, seek=False)


def test_frames_without_times_are_refused(tmp_path: Path) -> None:
    """A bare stream."""
    path = write_video(tmp_path / "a.mp4", counting(3)).rename(tmp_path / "b.mp4")
    with av.open(str(path)) as source, av.open(str(tmp_path / "a.h264"), "w") as bare:
        stream = bare.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                bare.mux(packet)
    with pytest.raises(UserError, match=r"a.h264 cannot be read: its frames bear no times"):
        Example("What?", videos=(tmp_path / "a.h264",)).video_shapes()


@pytest.mark.parametrize(("turned", "size"), [(90, (24, 16)), (180, (16, 24)), (270, (24, 16))])
def test_frames_are_upright(tmp_path: Path, turned: int, size: tuple[int, int]) -> None:
    frame = np.zeros((16, 24, 3), np.uint8)
    frame[:8, :12] = 255
    path = write_video(tmp_path / "a.mov", [frame] * 2, turned=turned)
    shape = video_shape(path, 2)
    assert (shape.height, shape.width) == size
    expected = np.rot90(frame, turned // 90)
    for image in video_frames(path, 2):
        np.testing.assert_array_equal(np.asarray(image), expected)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", counting(3))
    assert video_shape(path, 16).total == 3
    write_video(path, counting(7))
    assert video_shape(path, 16).total == 7


def damaged(directory: Path) -> dict[str, Path]:
    """Files that are not, or no longer, videos."""
    noise = [np.random.default_rng(i).integers(0, 256, (24, 32, 3), np.uint8) for i in range(40)]
    files = {}

    def cut(name: str, source: Path, size: int) -> None:
        files[name] = directory / f"{name}{source.suffix}"
        files[name].write_bytes(source.read_bytes()[:size])

    for suffix in (".avi", ".mkv", ".mov", ".mp4", ".webm"):
        path = write_video(directory / f"whole{suffix}", noise)
        cut(f"half_{suffix[1:]}", path, path.stat().st_size // 2)
    path = write_video(directory / "index_first.mp4", noise, movflags="faststart")
    cut("index_first_half", path, path.stat().st_size // 2)
    cut("empty", path, 0)
    files["text"] = directory / "text.mp4"
    files["text"].write_text("not a video")
    files["sound"] = directory / "sound.wav"
    with wave.open(str(files["sound"]), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(b"\0" * 8000)
    return files


def test_damaged_files_are_found_before_any_model_runs(tmp_path: Path) -> None:
    for path in damaged(tmp_path).values():
        example = Example("What?", videos=(path,), source="rows.jsonl:3")
        for read in (example.video_shapes, example.load_videos):
            with pytest.raises(UserError, match=r'^rows.jsonl:3: field "video": .* cannot be read: \S') as caught:
                read()
            assert str(path) in str(caught.value)
            assert "\n" not in str(caught.value)


def test_a_file_cut_between_two_packets_is_found(tmp_path: Path) -> None:
    """All that is there is whole; only the index speaks of more."""
    path = write_video(tmp_path / "a.mp4", counting(50), movflags="faststart")
    with av.open(str(path)) as container:
        ends = [(packet.pos or 0) + packet.size for packet in container.demux(video=0) if packet.size]
    path.write_bytes(path.read_bytes()[: ends[30]])
    with pytest.raises(UserError, match=r"a.mp4 cannot be read: it is truncated: 3\.\d of 5.0 seconds are there"):
        Example("What?", videos=(path,)).video_shapes()


def test_missing_files(tmp_path: Path) -> None:
    example = Example("What?", videos=(tmp_path / "a.mp4",), source="rows.jsonl:3")
    for read in (example.video_shapes, example.load_videos, example.video_digests):
        with pytest.raises(UserError, match=r'rows.jsonl:3: field "video": .*a.mp4 does not exist'):
            read()


def test_without_pyav_the_extra_is_named(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r'^reading videos needs PyAV, the extra "video" of sav-jax: pip install av$'):
        Example("What?", videos=(clip,), frames=3).video_shapes()


# Memory


def test_videos_in_memory() -> None:
    frames = counting(9)
    array = Video(np.stack(frames), fps=5)
    images = Video([PIL.Image.fromarray(frame) for frame in frames], fps=5)
    for video in (array, images):
        example = Example("What?", videos=(video,), frames=4)
        (shape,) = example.video_shapes()
        assert (shape.height, shape.width, shape.frames, shape.total, shape.rate) == (24, 32, (0, 2, 5, 8), 9, 5.0)
        (shown,) = example.load_videos()
        assert [(image.mode, number_of(image)) for image in shown] == [("RGB", 0), ("RGB", 2), ("RGB", 5), ("RGB", 8)]
    assert Example("?", videos=(array,)).video_digests() == Example("?", videos=(images,)).video_digests()
    (bare,) = Example("?", videos=(np.stack(frames),)).videos  # type: ignore[arg-type]
    assert isinstance(bare, Video)
    assert bare.fps == 24


def test_digests_are_of_the_content(tmp_path: Path) -> None:
    frames = np.stack(counting(4))
    one, copy = (write_video(tmp_path / f"{name}.mov", counting(4)) for name in "ab")
    videos = (one, copy, Video(frames), Video(frames, fps=5), Video(frames[::-1].copy()), Video(frames[:3]))
    digests = Example("What?", videos=videos).video_digests()
    assert digests[0] == digests[1]
    assert len(set(digests)) == 5
    assert all(len(digest) == 64 for digest in digests)


@pytest.mark.parametrize(
    ("frames", "fps", "problem"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), 1.0, r"must be uint8 .* not float32 \[2, 4, 4, 3\]"),
        (np.zeros((4, 4, 3), np.uint8), 1.0, r"must be uint8 .* not uint8 \[4, 4, 3\]"),
        (np.zeros((0, 4, 4, 3), np.uint8), 1.0, "holds no frames"),
        ([], 1.0, "holds no frames"),
        ([PIL.Image.new("RGB", (4, 4)), PIL.Image.new("RGB", (4, 5))], 1.0, "all have one size"),
        (np.zeros((2, 4, 4, 3), np.uint8), 0.0, "must be positive, not 0.0"),
    ],
)
def test_what_is_no_video_in_memory(frames: object, fps: float, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        Video(frames, fps)  # type: ignore[arg-type]


# Rows


def rows(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_with_videos(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.MP4", "c.png"):
        (tmp_path / name).touch()
    file = rows(
        tmp_path / "rows.jsonl",
        {"video": "a.mp4", "question": "What?"},
        {"video": ["a.mp4", "b.MP4"], "image": "c.png", "question": "<video> <image> <video>?"},
        {"image": "b.MP4", "question": "As the SAVs release names them?"},
        {"video": [], "image": None, "question": "Neither?"},
    )
    examples = read_examples(file, frames=5)
    a, b, c = (tmp_path / name for name in ("a.mp4", "b.MP4", "c.png"))
    assert [example.videos for example in examples] == [(a,), (a, b), (b,), ()]
    assert [example.images for example in examples] == [(), (c,), (), ()]
    assert {example.frames for example in examples} == {5}
    assert read_examples(file)[0].frames == 16


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"video": 3}, 'field "video" must be a path or a list of paths, not a number'),
        ({"video": ["a.mp4", ""]}, 'field "video" holds an empty path'),
        ({"video": "b.mp4"}, "field \"video\" names 'b.mp4', which does not exist"),
        ({"videos": ["a.mp4"]}, 'field "videos" is not known; "video" takes a path or a list of paths'),
        ({"video": "a.mp4", "question": "<video><video>?"}, '2 <video> marks for 1 video in field "video"'),
        ({"question": "<video>?"}, '1 <video> mark for 0 videos in field "video"'),
    ],
)
def test_bad_rows(tmp_path: Path, row: dict, problem: str) -> None:
    (tmp_path / "a.mp4").touch()
    file = rows(tmp_path / "rows.jsonl", {"question": "What?", **row})
    with pytest.raises(UserError) as caught:
        read_examples(file)
    assert str(caught.value).startswith(f"{file}:1: ")
    assert problem in str(caught.value)


@pytest.mark.parametrize("frames", [0, -1])
def test_some_frame_must_be_shown(tmp_path: Path, frames: int) -> None:
    with pytest.raises(UserError, match=f"at least 1 frame of a video must be shown, not {frames}"):
        Example("What?", frames=frames)
    with pytest.raises(UserError, match=rf"at least 1 frame .* \(--frames\), not {frames}"):
        read_examples(tmp_path, "What?", frames=frames)


def test_folders_of_videos(tmp_path: Path) -> None:
    for name in ("run/1.mp4", "run/deep/2.MOV", "walk/3.webm", "walk/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    examples = read_examples(tmp_path, "What?", require_labels=True, frames=3)
    assert [(e.id, e.label, e.images, e.frames) for e in examples] == [
        ("run/1.mp4", "run", (), 3),
        ("run/deep/2.MOV", "run", (), 3),
        ("walk/3.webm", "walk", (), 3),
    ]
    assert examples[0].videos == (tmp_path / "run/1.mp4",)
    (loose,) = read_examples(tmp_path / "walk", "What?")
    assert (loose.id, loose.label, loose.videos) == ("3.webm", None, (tmp_path / "walk/3.webm",))
    with pytest.raises(UserError, match=r"run: holds videos \(1.mp4, ...\) beside class folders \(deep, ...\)"):
        read_examples(tmp_path / "run", "What?")
    (tmp_path / "walk/4.png").touch()
    with pytest.raises(UserError, match=r"holds pictures \(.*4.png, ...\) and videos \(.*1.mp4, ...\); use one kind"):
        read_examples(tmp_path, "What?")


# Features


def test_features_are_kept_by_content_and_number_of_frames(
    lmm: sav_jax.LMM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "a.mov", counting(9))
    memory = Video(np.stack(counting(9)), fps=10)
    four = Example("What?", videos=(path,), frames=4)
    five = Example("What?", videos=(path,), frames=5)
    heads = sav_jax.extract_heads(lmm, [four, five], cache=tmp_path / "cache", progress=False)
    assert np.abs(heads[0] - heads[1]).max() > 0.01
    # The same pixels, by another way.
    other = sav_jax.extract_heads(lmm, [Example("What?", videos=(memory,), frames=4)], progress=False)
    np.testing.assert_allclose(other[0], heads[0], rtol=0, atol=1e-5)
    monkeypatch.setattr(Example, "load_videos", lambda self: pytest.fail("was in the cache"))
    again = sav_jax.extract_heads(lmm, [five, four], cache=tmp_path / "cache", progress=False)
    np.testing.assert_array_equal(again, heads[::-1])
    write_video(path, counting(9)[::-1])
    with pytest.raises(pytest.fail.Exception, match="was in the cache"):
        sav_jax.extract_heads(lmm, [four], cache=tmp_path / "cache", progress=False)
