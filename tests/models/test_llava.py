"""What is asked of LLaVA-1.5 and LLaVA-NeXT alone: options, key layouts, LLaVA's own releases, sizes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from checkpoints import Reference, picture
from checkpoints_llava import PINPOINTS, PIXELS, TILE, VISION
from checkpoints_sq_llava import released_state
from families import case_example, run_together
from safetensors.numpy import load_file, save_file

import sav_jax
from sav_jax.models.projectors import prototype_extractor_from_torch
from sav_jax.models.registry import read_config
from sav_jax.models.weights import save_checkpoint

PARITY = 1e-4  # as in test_families.py


@pytest.fixture(scope="module")
def llava(make_reference: Callable[..., Reference]) -> Reference:
    return make_reference("llava")


@pytest.fixture(scope="module")
def ours(llava: Reference) -> sav_jax.LMM:
    return sav_jax.load(llava.directory)


def assert_parity(reference: Reference) -> None:
    lmm = sav_jax.load(reference.directory)
    example = case_example("two")
    heads, logits = reference.run(reference.inputs(lmm.processor.text(example.question, 2), example.load_images()))
    mine = run_together(lmm, [example])
    np.testing.assert_allclose(mine[0][0], heads, rtol=0, atol=PARITY)
    np.testing.assert_allclose(mine[1][0], logits, rtol=0, atol=PARITY)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"vision_feature_layer": -1}, id="feature layer -1"),
        pytest.param({"vision_feature_select_strategy": "full"}, id="with the class token"),
        pytest.param(
            {
                "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False},
                "vision_feature_select_strategy": "full",
                "multimodal_projector_bias": False,
            },
            id="SigLIP",
        ),
        pytest.param({"text_config": {"model_type": "qwen2"}}, id="Qwen2"),
    ],
)
def test_config_options(make_reference: Callable[..., Reference], options: dict[str, Any]) -> None:
    assert_parity(make_reference("llava", **options))


def test_feature_layer_of_anyres(make_reference: Callable[..., Reference]) -> None:
    assert_parity(make_reference("llava_next", vision_feature_layer=1))


def test_class_tokens_make_no_grid(make_reference: Callable[..., Reference]) -> None:
    with pytest.raises(sav_jax.UserError, match="which makes no grid"):
        sav_jax.load(make_reference("llava_next", vision_feature_select_strategy="full").directory)


def test_padding_to_a_square(llava: Reference, tmp_path: Path) -> None:
    """Checkpoints may name LLaVA's own image processor, which pads instead of cropping."""
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    directory = Path(shutil.copytree(llava.directory, tmp_path / "model"))
    size = {"size": {"shortest_edge": TILE}, "crop_size": {"height": TILE, "width": TILE}}
    padding = LlavaImageProcessorPil(**size, **PIXELS, do_pad=True)
    padding.save_pretrained(directory)
    images = [picture(30, 90, 1), picture(70, 20, 2)]
    pixels = sav_jax.load(directory).processor.pixels(images)
    np.testing.assert_array_equal(pixels, np.stack(padding(images).pixel_values).transpose(0, 2, 3, 1))
    assert np.abs(pixels - sav_jax.load(llava.directory).processor.pixels(images)).max() > 0.1


def test_tokenizer_without_an_image_token(llava: Reference, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(llava.directory, tmp_path / "model"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "image_token_index": 999}))
    with pytest.raises(sav_jax.UserError, match="no image token \\(no token 999"):
        sav_jax.load(directory)


def in_memory(key: str) -> str:
    """The names transformers has had in memory since version 4.52."""
    if key.startswith("language_model.lm_head"):
        return key.removeprefix("language_model.")
    if key.startswith("language_model.model."):
        return "model.language_model." + key.removeprefix("language_model.model.")
    return "model." + key


def on_the_hub(key: str) -> str:
    """The names of the hub's llava-hf files."""
    return key if "vision_model." in key else key.replace("vision_tower.", "vision_tower.vision_model.")


def released(key: str) -> str:
    """The names of LLaVA's own releases."""
    for theirs, its in (
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
        ("vision_tower.", "model.vision_tower.vision_tower.vision_model."),
        ("image_newline", "model.image_newline"),
    ):
        if key.startswith(theirs):
            return its + key.removeprefix(theirs)
    raise AssertionError(key)


def write(directory: Path, tensors: dict[str, np.ndarray], file: str = "model.safetensors") -> None:
    save_file(tensors, directory / file, metadata={"format": "pt"})


def assert_same_params(one: sav_jax.LMM, other: sav_jax.LMM) -> None:
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


@pytest.mark.parametrize("rename", [in_memory, on_the_hub, released])
def test_key_layouts(llava: Reference, ours: sav_jax.LMM, tmp_path: Path, rename: Callable[[str], str]) -> None:
    directory = Path(shutil.copytree(llava.directory, tmp_path / "model"))
    tensors = load_file(directory / "model.safetensors")
    renamed = {rename(key): value for key, value in tensors.items()}
    assert renamed.keys() != tensors.keys()
    # Buffers of older files.
    renamed[rename("vision_tower.embeddings.position_ids")] = np.arange(50)[None]
    for layer in range(4):
        renamed[rename(f"language_model.model.layers.{layer}.self_attn.rotary_emb.inv_freq")] = np.ones(2, np.float32)
    write(directory, renamed)
    assert_same_params(sav_jax.load(directory), ours)


def release(llava: Reference, directory: Path, **fields: Any) -> dict[str, np.ndarray]:
    """Rewrite a checkpoint into the layout of LLaVA's releases; returns its tensors, the vision tower apart."""
    shutil.copytree(llava.directory, directory)
    config = json.loads((directory / "config.json").read_text())
    tower = directory / "clip"
    tower.mkdir()
    (tower / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": VISION}))
    text = {key: value for key, value in config["text_config"].items() if key != "rope_parameters"}
    theirs = {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": "clip",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "image_aspect_ratio": "pad",
        "tune_mm_mlp_adapter": False,
    }
    text |= {"vocab_size": config["image_token_index"]}
    (directory / "config.json").write_text(json.dumps({**text, **theirs, **fields}))
    tensors = {released(key): value for key, value in load_file(directory / "model.safetensors").items()}
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[key] = tensors[key][: config["image_token_index"]]
    write(directory, {key: value for key, value in tensors.items() if "vision_tower" not in key})
    return {key.removeprefix("model.vision_tower."): tensors[key] for key in tensors if "vision_tower" in key}


def test_a_release_without_its_vision_tower(llava: Reference, ours: sav_jax.LMM, tmp_path: Path) -> None:
    """LLaVA-1.5 as released: flat config, no token for an image, the tower in a repository of its own."""
    directory = tmp_path / "release"
    tower = release(llava, directory)
    with pytest.raises(sav_jax.UserError, match=r"the vision tower.s weights are missing.*mm_vision_tower"):
        sav_jax.load(directory)
    # OpenAI's CLIP has a text tower too.
    whole = {key.removeprefix("vision_tower."): value for key, value in tower.items()}
    rest = {"text_model.final_layer_norm.weight": np.ones(8, np.float32), "logit_scale": np.ones((), np.float32)}
    write(directory, {**whole, **rest}, "vision_tower.safetensors")
    lmm = sav_jax.load(directory)
    assert lmm.architecture.model_type == "llava"
    assert lmm.config.text.vocab_size == lmm.config.image_token_id
    examples = [case_example(name) for name in ("odd", "two, marked", "text only")]
    heads, logits = run_together(lmm, examples)
    expected = run_together(ours, examples)
    np.testing.assert_array_equal(heads, expected[0])
    np.testing.assert_array_equal(logits, expected[1][:, : lmm.config.text.vocab_size])

    # What is saved is a Hugging Face checkpoint, whole.
    save_checkpoint(directory, lmm.hf_config, lmm.params)
    assert not (directory / "vision_tower.safetensors").exists()
    assert read_config(directory) == lmm.hf_config
    assert_same_params(sav_jax.load(directory), lmm)
    model, info = type(llava.model).from_pretrained(directory, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert model.config.text_config.vocab_size == lmm.config.text.vocab_size


def test_a_release_with_its_vision_tower_and_tiles(make_reference: Callable[..., Reference], tmp_path: Path) -> None:
    """LLaVA-1.6 as released."""
    reference = make_reference("llava_next")
    directory = tmp_path / "release"
    fields = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
    tower = release(reference, directory, **fields, image_grid_pinpoints=[p[::-1] for p in PINPOINTS])
    tower = {f"model.vision_tower.{key}": value for key, value in tower.items()}
    write(directory, load_file(directory / "model.safetensors") | tower)
    examples = [case_example("two")]
    ours, theirs = (run_together(sav_jax.load(path), examples)[0] for path in (directory, reference.directory))
    np.testing.assert_array_equal(ours, theirs)


def test_a_release_of_sq_llava(llava: Reference, ours: sav_jax.LMM, tmp_path: Path) -> None:
    """Merged weights, as SQ-LLaVA's code saves them: its extractor under its names, its sizes in no config."""
    directory = tmp_path / "release"
    tower = {f"model.vision_tower.{key}": value for key, value in release(llava, directory).items()}
    config = json.loads((directory / "config.json").read_text())
    theirs = {"model_type": "llava", "mm_projector_type": "cluster", "num_latents": 64}
    (directory / "config.json").write_text(json.dumps(config | theirs))
    text = load_file(directory / "model.safetensors")
    state = {key: value.numpy() for key, value in released_state(24, 40).items()}
    projector = {f"model.mm_projector.{key}": value for key, value in state.items()}
    write(directory, {k: v for k, v in text.items() if "mm_projector" not in k} | tower | projector)
    lmm = sav_jax.load(directory)
    module, params = prototype_extractor_from_torch(state)
    assert (module.prototypes.num_prototypes, module.prototypes.num_iterations) == (256, 2)
    assert lmm.config.prototypes == module.prototypes
    assert (lmm.config.vision.depth, lmm.config.skipped_tokens) == (ours.config.vision.num_layers - 1, 1)
    jax.tree.map(np.testing.assert_array_equal, lmm.params["multi_modal_projector"], params)
    jax.tree.map(np.testing.assert_array_equal, lmm.params["vision_tower"], ours.params["vision_tower"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"mm_projector_type": "mlp3x_gelu"},
            "mm_projector_type 'mlp3x_gelu' is not supported \\(known: mlp2x_gelu, cluster\\)",
        ),
        ({"mm_projector_type": None}, "mm_projector_type None"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end True"),
        ({"mm_vision_tower": "google/vit"}, "mm_vision_tower 'google/vit' is neither a folder"),
        ({"model_type": "llava_mpt"}, "model_type 'llava_mpt' is not supported"),
        ({"image_aspect_ratio": "anyres"}, "mm_patch_merge_type None"),
    ],
    ids=str,
)
def test_releases_that_are_not_supported(
    llava: Reference, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    release(llava, tmp_path / "release", **fields)
    with pytest.raises(sav_jax.UserError, match=message):
        sav_jax.load(tmp_path / "release")
