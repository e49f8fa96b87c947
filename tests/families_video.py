"""The table of families that read videos: what is compared with transformers, alike for all of them.

transformers' video processors cannot run here (they resize with torchvision). What they do is put together from its own
parts: the PIL image processor's arithmetic for frames, Qwen3-VL's ``smart_resize`` and ``patchify``, the combined
processors' expansion of placeholders and their metadata.

``python tests/families_video.py [name ...]`` prints the table in ``docs/parity.md``.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":
    import conftest  # noqa: F401  (the settings the tests run under)

import numpy as np
import torch
from checkpoints import Reference, picture
from families import FAMILIES, run_together
from PIL import Image

import sav_jax
from sav_jax.extract import plan_prompts

NAMES = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@dataclass(frozen=True)
class Case:
    """A prompt: (height, width) of images; frames, height, width and rate of videos; how many frames are shown; marks
    in the question as a user writes them.
    """

    question: str
    videos: tuple[tuple[int, int, int, float], ...] = ()
    images: tuple[tuple[int, int], ...] = ()
    shown: int = 4

    def load_images(self) -> list[Image.Image]:
        return [picture(*size, seed) for seed, size in enumerate(self.images)]

    def load_videos(self) -> list[sav_jax.Video]:
        return [moving(*video, seed=10 + seed) for seed, video in enumerate(self.videos)]

    def example(self) -> sav_jax.Example:
        return sav_jax.Example(
            self.question, tuple(self.load_images()), videos=tuple(self.load_videos()), frames=self.shown
        )


CASES = {
    "even": Case("What happens?", ((8, 40, 52, 10.0),)),
    "odd": Case("What happens?", ((5, 37, 53, 3.0),), shown=5),
    "all of sixteen": Case("What happens?", ((200, 24, 44, 29.97),), shown=16),
    "wide": Case("What happens?", ((6, 11, 300, 25.0),), shown=3),
    "small": Case("What happens?", ((9, 5, 7, 1.0),), shown=6),
    "large": Case("What happens?", ((4, 170, 131, 2.0),)),
    "reversed": Case("What happens?", ((8, 40, 52, -10.0),)),
    "two": Case("Which is longer?", ((4, 30, 30, 1.0), (40, 20, 60, 24.0))),
    "two, marked": Case("Does <video> come before <video>?", ((4, 30, 30, 1.0), (40, 20, 60, 24.0))),
    "image": Case("Is it in the video?", ((7, 30, 64, 2.0),), ((37, 53),), shown=3),
    "image after video": Case("Does <video> show <image>?", ((7, 30, 64, 2.0),), ((37, 53),), shown=3),
    "images": Case("Does <image> or <image> show <video>?", ((7, 30, 64, 2.0),), ((37, 53), (30, 30))),
    "no video": Case("What is it?", images=((37, 53),)),
    "no image": Case("What is the capital of France?"),
}
ALONE = ("odd", "two, marked", "images", "no image")
"""Cases that are also run one by one."""


def moving(frames: int, height: int, width: int, rate: float, *, seed: int = 0) -> sav_jax.Video:
    """One picture turning into another; played backwards where the rate is negative."""
    first, last = picture(height, width, seed), picture(height, width, seed + 50)
    images = [Image.blend(first, last, i / max(frames - 1, 1)) for i in range(frames)]
    return sav_jax.Video(images if rate > 0 else images[::-1], fps=abs(rate))


def inputs(reference: Reference, case: Case) -> dict[str, Any]:
    """What transformers' combined processor would give: the arguments of the PyTorch model."""
    onevision = reference.model.config.model_type == "llava_onevision"
    shell = _shell(reference)
    images, videos = case.load_images(), case.load_videos()
    arguments: dict[str, Any] = {}
    image_text, video_text = [], []
    if images:
        values = reference.image_processor([images] if onevision else images, return_tensors="pt")
        arguments |= values
        image_text = [shell.replace_image_token(values, i) for i in range(len(images))]
    if videos:
        prepared = (_onevision if onevision else _qwen)(reference, shell, videos, case.shown)
        metadata = prepared["video_metadata"]
        video_text = [shell.replace_video_token(prepared, i) for i in range(len(videos))]
        arguments |= {name: value for name, value in prepared.items() if name != "video_metadata"}
        if reference.model.config.model_type == "qwen2_5_vl":
            arguments["second_per_grid_ts"] = torch.tensor([2 / one.sampled_fps for one in metadata])
    (text,), _ = shell.get_text_with_replacements([_chat(reference, case)], image_text, video_text)
    ids = torch.tensor([reference.tokenizer(text, add_special_tokens=False)["input_ids"]])
    arguments["input_ids"] = ids
    if not onevision:
        config = reference.model.config
        arguments["mm_token_type_ids"] = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
    return arguments


def pixels(reference: Reference, arguments: dict[str, Any]) -> np.ndarray:
    """The pixels in ``arguments`` as rows of ours: images first."""
    rows = [reference.pixels(arguments)] if "pixel_values" in arguments else []
    if "pixel_values_videos" in arguments:
        values = arguments["pixel_values_videos"]
        rows.append((values if values.ndim == 2 else values.flatten(0, 1).permute(0, 2, 3, 1)).numpy())
    return np.concatenate(rows)


def _chat(reference: Reference, case: Case) -> str:
    """The chat template's text with one placeholder for each image and video, marks being replaced by the same."""
    kinds = (("image", case.images), ("video", case.videos))
    onevision = reference.model.config.model_type == "llava_onevision"
    content, question = [], case.question
    for kind, items in kinds:
        if f"<{kind}>" not in question:
            content += [{"type": kind}] * len(items)
        elif not onevision:
            question = question.replace(f"<{kind}>", f"<|vision_start|><|{kind}_pad|><|vision_end|>")
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    return reference.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def _shell(reference: Reference) -> Any:
    """A combined processor without the parts that cannot be built."""
    from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    config = reference.model.config
    kind: Any = {
        "llava_onevision": LlavaOnevisionProcessor,
        "qwen2_vl": Qwen2VLProcessor,
        "qwen2_5_vl": Qwen2_5_VLProcessor,
        "qwen3_vl": Qwen3VLProcessor,
    }[config.model_type]
    shell = kind.__new__(kind)
    shell.image_processor = reference.image_processor
    if config.model_type == "llava_onevision":
        shell.image_token, shell.video_token = "<image>", "<video>"
        shell.num_image_tokens = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        shell.vision_feature_select_strategy = "full"
        shell.vision_aspect_ratio = config.vision_aspect_ratio
        return shell
    shell.image_token, shell.video_token = "<|image_pad|>", "<|video_pad|>"
    shell.vision_start_token, shell.vision_end_token = "<|vision_start|>", "<|vision_end|>"
    shell.video_processor = SimpleNamespace(merge_size=2, temporal_patch_size=2)
    return shell


def _metadata(videos: Sequence[sav_jax.Video], shown: int) -> list[Any]:
    from transformers.video_utils import VideoMetadata

    return [
        VideoMetadata(
            total_num_frames=len(video.frames),
            fps=video.fps,
            frames_indices=np.linspace(0, len(video.frames) - 1, min(shown, len(video.frames))).astype(int).tolist(),
        )
        for video in videos
    ]


def _settings(reference: Reference) -> dict[str, Any]:
    return json.loads((reference.directory / "video_preprocessor_config.json").read_text())


def _onevision(reference: Reference, shell: Any, videos: Sequence[sav_jax.Video], shown: int) -> dict[str, Any]:
    """Every frame stretched to a tile: the base view of a lone image."""
    processor = type(reference.image_processor)(
        **_settings(reference), image_grid_pinpoints=reference.image_processor.image_grid_pinpoints
    )
    metadata = _metadata(videos, shown)
    frames = [
        torch.tensor(np.stack([processor([[video.image(i)]])["pixel_values"][0][0] for i in one.frames_indices]))
        for video, one in zip(videos, metadata, strict=True)
    ]
    return {"pixel_values_videos": torch.stack(frames), "video_metadata": metadata}


def _qwen(reference: Reference, shell: Any, videos: Sequence[sav_jax.Video], shown: int) -> dict[str, Any]:
    from transformers.image_utils import SizeDict
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor, smart_resize

    config, settings = reference.model.config.vision_config, _settings(reference)
    processor = type(reference.image_processor)(**settings)
    metadata = _metadata(videos, shown)
    patches, grids = [], []
    for video, one in zip(videos, metadata, strict=True):
        frames = []
        for i in one.frames_indices:
            frame = np.asarray(video.image(i)).transpose(2, 0, 1)
            factor, size, resize = 2 * config.patch_size, SizeDict(**settings["size"]), processor.resize
            if reference.model.config.model_type == "qwen3_vl":
                # Its own bounds, then the resizing all image processors share.
                bounds = settings["size"]["shortest_edge"], settings["size"]["longest_edge"]
                height, width = smart_resize(len(one.frames_indices), *frame.shape[1:], 2, factor, *bounds)
                size = SizeDict(height=height, width=width)
                resize = functools.partial(super(type(processor), processor).resize)
            options = {} if reference.model.config.model_type == "qwen3_vl" else {"factor": factor}
            frame = resize(frame, size=size, resample=processor.resample, **options)
            frame = processor.normalize(processor.rescale(frame, 1 / 255), processor.image_mean, processor.image_std)
            frames.append(frame)
        stacked = torch.tensor(np.stack(frames)[None])
        cut, *grid = Qwen3VLVideoProcessor.patchify(None, stacked, config.patch_size, 2, 2)
        patches.append(cut[0])
        grids.append(grid)
    return {
        "pixel_values_videos": torch.cat(patches),
        "video_grid_thw": torch.tensor(grids),
        "video_metadata": metadata,
    }


@dataclass(frozen=True)
class VideoFamily:
    """One row of the table: the reference, and the same checkpoint loaded by this library in float32."""

    name: str
    reference: Reference
    lmm: sav_jax.LMM

    @classmethod
    def build(cls, name: str, directory: Path) -> VideoFamily:
        reference = FAMILIES[name](directory)
        return cls(name, reference, sav_jax.load(reference.directory))

    @functools.cached_property
    def theirs(self) -> dict[str, dict[str, Any]]:
        """The arguments of the PyTorch model in every case."""
        return {name: inputs(self.reference, case) for name, case in CASES.items()}

    @functools.cached_property
    def expected(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Heads ``[L, N, H]`` and logits ``[V]`` of every case, from PyTorch."""
        return {name: self.reference.run(arguments) for name, arguments in self.theirs.items()}

    @functools.cached_property
    def mixed(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The same of ours, all cases in one batch that is as long and as wide as any of them needs."""
        heads, logits = run_together(self.lmm, [case.example() for case in CASES.values()])
        return dict(zip(CASES, zip(heads, logits, strict=True), strict=True))

    @functools.cached_property
    def alone(self) -> dict[str, np.ndarray]:
        """Heads of some cases, each run by itself."""
        return {name: sav_jax.extract_heads(self.lmm, [CASES[name].example()], 1, progress=False)[0] for name in ALONE}

    def pixels(self, name: str) -> np.ndarray:
        """Ours."""
        example = CASES[name].example()
        return self.lmm.processor.pixels(example.load_images(), example.load_videos())

    def token_ids(self, name: str) -> np.ndarray:
        """Ours."""
        return plan_prompts(self.lmm, [CASES[name].example()])[0].token_ids


def deviations(family: VideoFamily) -> dict[str, float]:
    """The largest deviation of each kind; see the table's head."""
    for name in CASES:
        np.testing.assert_array_equal(family.token_ids(name), family.theirs[name]["input_ids"][0])
    difference: Callable[[str], float] = lambda name: np.abs(  # noqa: E731
        family.pixels(name) - pixels(family.reference, family.theirs[name])
    ).max()
    heads, logits = (
        max(np.abs(family.mixed[name][i] - family.expected[name][i]).max() for name in CASES) for i in (0, 1)
    )
    return {
        "pixels": float(max(difference(name) for name in CASES if name != "no image")),
        "heads": float(heads),
        "logits": float(logits),
        "alone": float(max(np.abs(family.mixed[name][0] - family.alone[name]).max() for name in ALONE)),
    }


def main(names: Sequence[str]) -> None:
    """Print the table, or the rows of some families."""
    print("| family, with videos | heads [L, N, H] | pixels | heads | logits | alone - in a mixed batch |")
    print("|---|---|---|---|---|---|")
    for name in [name for name in NAMES if name in names or not names]:
        with tempfile.TemporaryDirectory() as directory:
            family = VideoFamily.build(name, Path(directory))
            cells = [f"{value:.1e}" if value else "identical" for value in deviations(family).values()]
            print(f"| {' | '.join([name, str(family.lmm.heads_shape), *cells])} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
