"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL against transformers' PyTorch models, in float32, on the same safetensors files."""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import Reference, picture
from checkpoints_qwen import MAX_TOKENS, MIN_TOKENS, build_qwen2_5_vl, build_qwen2_vl, build_qwen3_vl
from PIL import Image
from safetensors.numpy import save_file

import sav_jax
from sav_jax.batching import BatchPlan, Bucket, assemble
from sav_jax.lmm import _init
from sav_jax.models.batch import Batch
from sav_jax.models.processor import Prompt, load_processor
from sav_jax.models.registry import architecture

# Values are of order one, float32 has 2^-24 relative spacing and a forward pass chains some hundred sums: 1e-4 absolute
# (the promised bound) leaves a margin of about 7 over what is measured (1.4e-5).
PARITY = 1e-4
# The same sums in another company differ by the order of addition only.
INVARIANCE = 1e-5

BUILDERS: dict[str, Callable[..., Reference]] = {
    "qwen2_vl": build_qwen2_vl,
    "qwen2_5_vl": build_qwen2_5_vl,
    "qwen3_vl": build_qwen3_vl,
}
HEADS_SHAPE = {"qwen2_vl": (4, 6, 12), "qwen2_5_vl": (4, 6, 12), "qwen3_vl": (4, 6, 16)}

CASES: dict[str, tuple[list[tuple[int, int]], str]] = {
    "none": ([], "What is the capital of France?"),
    "odd": ([(37, 53)], "Is this odd?"),
    "smaller than the least": ([(5, 7)], "What is it?"),
    "larger than the most": ([(300, 260)], "What is it?"),
    "a line": ([(6, 700)], "What is it?"),
    "a column": ([(600, 9)], "What is it?"),
    "two, marked": ([(40, 30), (20, 90)], "Is <image> left of <image>?"),
    "three": ([(28, 28), (60, 20), (100, 90)], "Which is odd?"),
    "long": ([(300, 260)], "Consider every detail with care. " * 15),
}


def case_images(name: str) -> list[Image.Image]:
    return [picture(height, width, seed) for seed, (height, width) in enumerate(CASES[name][0])]


@pytest.fixture(scope="module", params=BUILDERS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def qwen(family: str, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return BUILDERS[family](tmp_path_factory.mktemp(family))


@pytest.fixture(scope="module")
def ours(qwen: Reference) -> sav_jax.LMM:
    return sav_jax.load(qwen.directory)


@pytest.fixture(scope="module")
def prompts(ours: sav_jax.LMM) -> dict[str, Prompt]:
    return {name: ours.processor.plan(question, sizes) for name, (sizes, question) in CASES.items()}


@functools.cache
def _step(module: Any) -> Callable[..., Any]:
    return jax.jit(lambda params, batch: module.apply({"params": params}, batch, "read", mutable=["intermediates"]))


def run(lmm: sav_jax.LMM, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Heads ``[B, L, N, H]`` and logits ``[B, V]`` at the last tokens."""
    output, state = _step(lmm.module)(lmm.params, batch)
    heads = state["intermediates"]["language_model"]["layers"]["self_attn"]["head_outputs"]
    return np.asarray(heads)[:, :, 0].swapaxes(0, 1), np.asarray(output.logits)[:, 0]


def batch_of(prompts: list[Prompt], pixels: list[np.ndarray], tokens: int, rows: int) -> Batch:
    """All in one bucket of a given size."""
    plan = BatchPlan(Bucket(tokens=tokens, rows=rows, taps=1), tuple(range(len(prompts))), len(prompts))
    return assemble(plan, prompts, pixels)


@pytest.fixture(scope="module")
def mixed(ours: sav_jax.LMM, prompts: dict[str, Prompt]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Heads and logits of every case, all in one batch that is longer and wider than any of them needs."""
    pixels = [ours.processor.pixels(case_images(name)) for name in CASES]
    batch = batch_of(list(prompts.values()), pixels, tokens=832, rows=896)
    return dict(zip(CASES, zip(*run(ours, batch), strict=True), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_inputs_are_identical(qwen: Reference, ours: sav_jax.LMM, prompts: dict[str, Prompt], name: str) -> None:
    images = case_images(name)
    theirs = qwen.inputs(ours.processor.text(CASES[name][1], len(images)), images)
    prompt = prompts[name]
    np.testing.assert_array_equal(prompt.token_ids, theirs["input_ids"][0])
    patches = ours.processor.pixels(images)
    assert len(patches) == prompt.num_rows
    assert patches.dtype == np.float32
    assert prompt.positions is not None
    if not images:
        np.testing.assert_array_equal(prompt.positions, np.arange(len(prompt.token_ids))[:, None].repeat(3, 1))
        return
    np.testing.assert_array_equal(patches, theirs["pixel_values"])
    positions, _ = qwen.model.model.get_rope_index(
        theirs["input_ids"], theirs["mm_token_type_ids"], image_grid_thw=theirs["image_grid_thw"]
    )
    np.testing.assert_array_equal(prompt.positions, positions[:, 0].T)


@pytest.mark.parametrize("name", CASES)
def test_every_head_and_logit(
    family: str,
    qwen: Reference,
    ours: sav_jax.LMM,
    mixed: dict[str, tuple[np.ndarray, np.ndarray]],
    name: str,
) -> None:
    images = case_images(name)
    heads, logits = qwen.run(qwen.inputs(ours.processor.text(CASES[name][1], len(images)), images))
    assert heads.shape == ours.heads_shape == HEADS_SHAPE[family]
    assert 0.5 < np.abs(heads).max() < 20
    assert np.abs(heads).max(axis=-1).min() > 1e-2, "a head near zero would hide an error"
    np.testing.assert_allclose(mixed[name][0], heads, rtol=0, atol=PARITY)
    np.testing.assert_allclose(mixed[name][1], logits, rtol=0, atol=PARITY)


def test_cases_are_what_they_say(prompts: dict[str, Prompt]) -> None:
    visual = {name: int((prompt.visual_index >= 0).sum()) for name, prompt in prompts.items()}
    assert visual["none"] == 0
    assert MIN_TOKENS <= visual["smaller than the least"] < 2 * MIN_TOKENS
    assert 0.8 * MAX_TOKENS < visual["larger than the most"] <= MAX_TOKENS
    assert visual["a line"] == 88
    assert len(prompts["long"].token_ids) > 600


def test_every_dtype_stays_what_it_is(ours: sav_jax.LMM) -> None:
    """bfloat16 parameters give bfloat16 hidden states (strict promotion would raise on a mixture)."""
    abstract = jax.eval_shape(lambda: _init(ours.architecture, jax.random.key(0)))
    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16), abstract)
    batch = batch_of(
        [ours.processor.plan("What is it?", [(37, 53)])], [ours.processor.pixels([picture(37, 53)])], 128, 160
    )
    output, state = jax.eval_shape(_step(ours.module), abstract, batch)
    assert output.hidden.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("bfloat16")}


def test_names_of_other_releases_are_read(qwen: Reference, ours: sav_jax.LMM, tmp_path: Path) -> None:
    """What transformers calls them in memory."""
    for file in qwen.directory.iterdir():
        shutil.copy(file, tmp_path)
    state = {key: value.numpy() for key, value in qwen.model.state_dict().items()}
    assert any(key.startswith("model.visual.") for key in state)
    save_file(state, tmp_path / "model.safetensors")
    again = sav_jax.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again.params, ours.params)


def test_fewer_layers(qwen: Reference, mixed: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """One layer, fewer than Qwen3-VL's two that are given visual features."""
    shallow = sav_jax.load(qwen.directory, num_layers=1)
    assert shallow.params["language_model"]["layers"]["self_attn"]["q_proj"]["kernel"].shape[0] == 1
    example = sav_jax.Example(CASES["odd"][1], tuple(case_images("odd")))
    heads = sav_jax.extract_heads(shallow, [example], progress=False)[0]
    np.testing.assert_allclose(heads, mixed["odd"][0][:1], rtol=0, atol=INVARIANCE)


@pytest.mark.parametrize(
    "spelling",
    [
        {"min_pixels": 512, "max_pixels": 6400},
        {"min_pixels": 512, "max_pixels": 6400, "size": {"min_pixels": 512, "max_pixels": 6400}},
        {"size": {"shortest_edge": 512, "longest_edge": 6400}},
    ],
    ids=["first", "with size", "newest"],
)
def test_pixel_bounds_in_every_spelling(qwen: Reference, tmp_path: Path, spelling: dict[str, Any]) -> None:
    """As ``preprocessor_config.json`` of the hub's releases has them."""
    for file in qwen.directory.glob("*.json*"):
        shutil.copy(file, tmp_path)
    shutil.copy(qwen.directory / "chat_template.jinja", tmp_path)
    file = tmp_path / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    del settings["size"]
    file.write_text(json.dumps({**settings, **spelling}))
    processor = load_processor(tmp_path)
    counts = [len(processor.plan_images([size])[0].index) for size in ((5, 5), (400, 300))]
    assert counts == [9, 88]
    assert len(processor.pixels([picture(5, 5), picture(400, 300)])) == 4 * sum(counts)


def test_refusals_say_what_and_where(ours: sav_jax.LMM) -> None:
    with pytest.raises(sav_jax.UserError, match="2 x 500: one side is more than 200 times the other"):
        ours.processor.plan("What is it?", [(2, 500)])
    with pytest.raises(sav_jax.UserError, match="2 image tokens for 1 images"):
        ours.processor.plan("Is this an <|image_pad|>?", [(50, 50)])
    config = {**ours.hf_config, "vision_config": {**ours.hf_config["vision_config"], "hidden_act": "tanhish"}}
    with pytest.raises(sav_jax.UserError, match=r"vision_config.hidden_act 'tanhish' is not known"):
        architecture(config)
    config = {**ours.hf_config, "vision_config": {**ours.hf_config["vision_config"], "spatial_merge_size": 3}}
    with pytest.raises(sav_jax.UserError, match="spatial_merge_size 3 is not supported"):
        architecture(config)


def _decoder(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
    }


def _qwen2(tie: bool, **vision: Any) -> Callable[..., dict[str, Any]]:
    """The flat ``config.json`` of the hub's Qwen2-VL and Qwen2.5-VL."""

    def config(*decoder: int) -> dict[str, Any]:
        own = {"embed_dim": 1280, "mlp_ratio": 4, "hidden_size": decoder[0]}
        if vision:
            own = {"hidden_size": 1280, "out_hidden_size": decoder[0], **vision}
        shared = {"depth": 32, "num_heads": 16, "in_chans": 3, "patch_size": 14, "spatial_patch_size": 14}
        return {
            **_decoder(*decoder),
            "model_type": "qwen2_5_vl" if vision else "qwen2_vl",
            "tie_word_embeddings": tie,
            "rope_theta": 1e6,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "sliding_window": 32768,
            "use_sliding_window": False,
            "vision_config": {**shared, **own, "spatial_merge_size": 2, "temporal_patch_size": 2},
        }

    return config


def _qwen2_5(tie: bool, inner: int = 3420) -> Callable[..., dict[str, Any]]:
    windows = {"window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2}
    return _qwen2(tie, hidden_act="silu", intermediate_size=inner, **windows)


def _qwen3(tie: bool, *vision: Any) -> Callable[..., dict[str, Any]]:
    names = ("depth", "hidden_size", "intermediate_size", "deepstack_visual_indexes")

    def config(*decoder: int) -> dict[str, Any]:
        rope = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]}
        text = {"model_type": "qwen3_vl_text", "head_dim": 128, "rope_theta": 5e6, "rope_scaling": rope}
        return {
            "model_type": "qwen3_vl",
            "tie_word_embeddings": tie,
            "text_config": {**_decoder(*decoder), **text},
            "vision_config": {
                **dict(zip(names, vision, strict=True)),
                "model_type": "qwen3_vl",
                "num_heads": 16,
                "num_position_embeddings": 2304,
                "out_hidden_size": decoder[0],
                "patch_size": 16,
            },
        }

    return config


SMALL, LARGE = (24, 1024, 4096, [5, 11, 17]), (27, 1152, 4304, [8, 16, 24])


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        # The totals the hub states for the safetensors of each release.
        pytest.param(_qwen2(True)(1536, 8960, 28, 12, 2, 151936), 2_208_985_600, id="Qwen2-VL-2B"),
        pytest.param(_qwen2(False)(3584, 18944, 28, 28, 4, 152064), 8_291_375_616, id="Qwen2-VL-7B"),
        pytest.param(_qwen2(False)(8192, 29568, 80, 64, 8, 152064), 73_405_560_320, id="Qwen2-VL-72B"),
        pytest.param(_qwen2_5(True)(2048, 11008, 36, 16, 2, 151936), 3_754_622_976, id="Qwen2.5-VL-3B"),
        pytest.param(_qwen2_5(False)(3584, 18944, 28, 28, 4, 152064), 8_292_166_656, id="Qwen2.5-VL-7B"),
        pytest.param(_qwen2_5(False, 3456)(8192, 29568, 80, 64, 8, 152064), 73_410_777_344, id="Qwen2.5-VL-72B"),
        pytest.param(_qwen3(True, *SMALL)(2048, 6144, 28, 16, 8, 151936), 2_127_532_032, id="Qwen3-VL-2B"),
        pytest.param(_qwen3(True, *SMALL)(2560, 9728, 36, 32, 8, 151936), 4_437_815_808, id="Qwen3-VL-4B"),
        pytest.param(_qwen3(False, *LARGE)(4096, 12288, 36, 32, 8, 151936), 8_767_123_696, id="Qwen3-VL-8B"),
    ],
)
def test_real_sizes(config: dict[str, Any], parameters: int) -> None:
    arch = architecture(config)
    assert arch.config.text.head_dim == 128
    assert arch.config.vision.window_side in (None, 4)
    abstract = jax.eval_shape(lambda: _init(arch, jax.random.key(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract)) == parameters


def test_interleaved_wavelengths() -> None:
    """Qwen3-VL takes the axes in turns whatever its config says about it; Qwen2-VL in blocks."""
    config = _qwen3(False, *LARGE)(4096, 12288, 36, 32, 8, 151936)
    axes = architecture(config).config.text.rope_axes
    assert axes[:60] == (0, 1, 2) * 20
    assert axes[60:] == (0, 0, 0, 0)
    del config["text_config"]["rope_scaling"]
    config["text_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e6}
    assert architecture(config).config.text.rope_axes == axes
    blocks = architecture(_qwen2(False)(3584, 18944, 28, 28, 4, 152064)).config.text.rope_axes
    assert blocks == (0,) * 16 + (1,) * 24 + (2,) * 24


def test_padding_is_never_seen(ours: sav_jax.LMM, prompts: dict[str, Prompt]) -> None:
    """Whatever stands in padded patches, real ones give the same bits."""
    pixels = ours.processor.pixels(case_images("odd"))
    batch = batch_of([prompts["odd"]], [pixels], tokens=128, rows=160)
    dirty = np.array(batch.pixels)
    dirty[:, len(pixels) :] = 1e3
    for plain, other in zip(run(ours, batch), run(ours, replace(batch, pixels=dirty)), strict=True):
        np.testing.assert_array_equal(plain, other)
