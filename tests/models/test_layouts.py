"""Directories as the hub has them, not only as today's transformers writes them: configs, key names, settings files.

Each test rewrites a tiny checkpoint the way a release is stored and asks for the same model. (LLaVA's own releases:
``test_llava.py``; the first Qwen-VL: ``test_qwen1_vl.py``; SigLIP's tokenizer: ``test_dual_encoder.py``.)
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from checkpoints import Reference
from checkpoints_dual import build_clip, images
from checkpoints_llava import PIXELS, TILE
from families import case_example, case_images
from safetensors.numpy import load_file, save_file

import sav_jax
from sav_jax.dual_encoder import dual_encoder_config
from sav_jax.models.dual_encoder import DualEncoderConfig


def edit(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Rewrite a JSON file."""
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def assert_same_model(directory: Path, original: sav_jax.LMM) -> None:
    lmm = sav_jax.load(directory)
    assert lmm.config == original.config
    assert lmm.max_tokens == original.max_tokens
    jax.tree.map(np.testing.assert_array_equal, lmm.params, original.params)


@pytest.mark.parametrize(
    ("whole", "text"), [(False, True), (None, True), (True, False), (True, None)], ids=["text", "text only", "1", "2"]
)
def test_tied_embeddings_may_be_said_in_either_place(
    make_reference: Callable[..., Reference], tmp_path: Path, whole: bool | None, text: bool | None
) -> None:
    """The hub's LLaVA-OneVision 0.5B says so of its decoder and denies it of the whole; no head is stored."""
    reference = make_reference(tie=True)
    original = sav_jax.load(reference.directory)
    directory = Path(shutil.copytree(reference.directory, tmp_path / "model"))

    def change(config: dict[str, Any]) -> dict[str, Any]:
        for part, value in ((config, whole), (config["text_config"], text)):
            part.pop("tie_word_embeddings", None)
            if value is not None:
                part["tie_word_embeddings"] = value
        return config

    edit(directory / "config.json", change)
    assert_same_model(directory, original)


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """The decoder's fields beside the others, and rotations as they were spelt in 2024."""
    text = config["text_config"]
    rope = text.pop("rope_parameters")
    decoder = {key: value for key, value in text.items() if key not in ("model_type", "layer_types", "dtype")}
    whole = {key: value for key, value in config.items() if key != "text_config"}
    old = {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
    return {**decoder, **whole, **old, "use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 4}


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_flat_configs(make_reference: Callable[..., Reference], tmp_path: Path, family: str, tie: bool) -> None:
    """``Qwen/Qwen2-VL-*-Instruct`` and ``Qwen/Qwen2.5-VL-*-Instruct``; the tied ones also with the head stored."""
    reference = make_reference(family, tie=tie)
    original = sav_jax.load(reference.directory)
    directory = Path(shutil.copytree(reference.directory, tmp_path / "model"))
    edit(directory / "config.json", flat)
    assert "text_config" not in json.loads((directory / "config.json").read_text())
    assert_same_model(directory, original)
    heads = sav_jax.extract_heads(sav_jax.load(directory, num_layers=2), [case_example("odd")], progress=False)
    expected = sav_jax.extract_heads(original, [case_example("odd")], progress=False)[:, :2]
    np.testing.assert_allclose(heads, expected, rtol=0, atol=1e-5)  # the same sums
    if tie:
        tensors = load_file(directory / "model.safetensors")
        (embedding,) = (value for key, value in tensors.items() if key.endswith("embed_tokens.weight"))
        save_file({**tensors, "lm_head.weight": embedding}, directory / "model.safetensors")
        assert_same_model(directory, original)


def in_memory(key: str) -> str:
    """As transformers has them in memory, and as ``Qwen/Qwen3-VL-*`` are stored."""
    key = re.sub(r"^visual\.", "model.visual.", key)
    return re.sub(r"^model\.(?!visual\.|language_model\.)", "model.language_model.", key)


def bare(key: str) -> str:
    """As ``Qwen/Qwen2-VL-*`` and ``Qwen/Qwen2.5-VL-*`` are stored."""
    return re.sub(r"^model\.(visual\.)", r"\1", re.sub(r"^model\.language_model\.", "model.", key))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("rename", [in_memory, bare])
def test_key_names_of_qwen(
    make_reference: Callable[..., Reference], tmp_path: Path, family: str, rename: Callable[[str], str]
) -> None:
    reference = make_reference(family)
    directory = Path(shutil.copytree(reference.directory, tmp_path / "model"))
    tensors = {rename(key): value for key, value in load_file(directory / "model.safetensors").items()}
    roots = {key.split(".")[0] for key in tensors}
    assert roots == ({"model", "lm_head"} if rename is in_memory else {"model", "visual", "lm_head"})
    save_file(tensors, directory / "model.safetensors")
    assert_same_model(directory, sav_jax.load(reference.directory))


def fast(settings: dict[str, Any]) -> dict[str, Any]:
    """The class that needs torchvision; its settings are the same."""
    return {**settings, "image_processor_type": f"{settings['image_processor_type']}Fast"}


def feature_extractor(settings: dict[str, Any]) -> dict[str, Any]:
    """What image processors were once called."""
    name = settings.pop("image_processor_type").replace("ImageProcessor", "FeatureExtractor")
    return {**settings, "feature_extractor_type": name}


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision", "qwen2_vl"])
@pytest.mark.parametrize("change", [fast, feature_extractor, None], ids=["fast", "extractor", "in processor_config"])
def test_settings_of_the_image_processor(
    make_reference: Callable[..., Reference], tmp_path: Path, family: str, change: Any
) -> None:
    reference = make_reference(family)
    directory = Path(shutil.copytree(reference.directory, tmp_path / "model"))
    file = directory / "preprocessor_config.json"
    if change is None:
        settings = {"image_processor": json.loads(file.read_text()), "processor_class": "SomeProcessor"}
        (directory / "processor_config.json").write_text(json.dumps(settings))
        file.unlink()
    else:
        edit(file, change)
    ours, theirs = (
        sav_jax.load(path).processor.pixels(case_images("two")) for path in (directory, reference.directory)
    )
    np.testing.assert_array_equal(ours, theirs)


def test_openai_clip(tmp_path: Path) -> None:
    """Sizes as numbers, and an extractor of features (``openai/clip-vit-*``)."""
    build_clip(tmp_path)
    original = sav_jax.load_dual_encoder(tmp_path)
    settings = {
        "crop_size": TILE,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        **PIXELS,
        "resample": 3,
        "size": TILE,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    ours = sav_jax.load_dual_encoder(tmp_path)
    np.testing.assert_array_equal(ours.embed_images(images()[:3]), original.embed_images(images()[:3]))


def test_openai_clip_says_its_sizes_twice() -> None:
    """``openai/clip-vit-large-patch14`` has ``text_config_dict`` beside ``text_config``."""
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
    config = {"model_type": "clip", "projection_dim": 768, "text_config": text, "vision_config": vision}
    legacy = {"bad_words_ids": None, "num_beams": 1, "torchscript": False, "eos_token_id": 2, "bos_token_id": 0}
    old = {
        **config,
        "text_config": {**text, **legacy, "model_type": "clip_text_model"},
        "vision_config": {**vision, "model_type": "clip_vision_model"},
        "text_config_dict": text,
        "vision_config_dict": vision,
        "torch_dtype": "float32",
    }
    parsed: DualEncoderConfig = dual_encoder_config(old)
    assert parsed.vision == dual_encoder_config(config).vision
    assert parsed.text.hidden_size == 768
    # The end of text, or what old configs say for it (models/dual_encoder.py reads both alike).
    assert parsed.text.eos_token_id in (2, 49407)
