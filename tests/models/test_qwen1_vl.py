"""The first Qwen-VL against what its published PyTorch code gave on the same weights (``tests/data/qwen1_vl``), in
float32.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints_qwen1 as qwen1
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checkpoints_qwen1 import OUTPUTS, PROMPTS, QUESTIONS, REAL, example_of, prompts_of
from families import MESHES, assert_invariant, continue_together, mesh_of, run, run_together, step_of, together
from safetensors.numpy import load_file, save_file

import sav_jax
from sav_jax.errors import UserError
from sav_jax.extract import plan_prompts
from sav_jax.generation import extend, prefill
from sav_jax.models.batch import Batch
from sav_jax.models.decoder import log_n_scale, stretched_theta
from sav_jax.models.multimodal import init_params
from sav_jax.models.processor import load_processor
from sav_jax.models.qwen1_vision import bicubic_matrix, sincos_positions
from sav_jax.models.registry import architecture
from sav_jax.models.weights import CheckpointError, save_checkpoint

# Values are of order one, float32 has 2^-24 relative spacing and a forward pass chains some hundred sums, the angles of
# its rotations being of order hundred: 1e-4 absolute (the promised bound) leaves a margin of 4 over what is measured
# (2.4e-5).
PARITY = 1e-4


@pytest.fixture(scope="session")
def load_qwen1(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], sav_jax.LMM]:
    """By the name of the config; each is built and loaded once."""

    @functools.cache
    def load(config: str) -> sav_jax.LMM:
        directory = tmp_path_factory.mktemp("qwen1_vl") / "model"
        return sav_jax.load(qwen1.build(directory, qwen1.CONFIGS[config], qwen1.is_chat(config)))

    return load


@pytest.fixture(scope="session")
def ours(load_qwen1: Callable[[str], sav_jax.LMM]) -> sav_jax.LMM:
    return load_qwen1("released")


@pytest.fixture(scope="session")
def computed(load_qwen1: Callable[[str], sav_jax.LMM]) -> Callable[[str], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Heads ``[L, N, H]`` and logits ``[V]`` of all prompts of a config, run together."""

    @functools.cache
    def compute(config: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        lmm, names = load_qwen1(config), prompts_of(config)
        heads, logits = run(lmm, batch_of(lmm, [example_of(name) for name in names]))
        return dict(zip(names, zip(heads, logits, strict=True), strict=True))

    return compute


def batch_of(lmm: sav_jax.LMM, examples: list[sav_jax.Example]) -> Batch:
    """All in one batch, some tokens longer than the longest needs."""
    longest = max(len(prompt.token_ids) for prompt in plan_prompts(lmm, examples))
    return together(lmm, examples, tokens=longest + 9)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_inputs_are_identical(load_qwen1: Callable[[str], sav_jax.LMM], prompt: str) -> None:
    lmm, example = load_qwen1(prompt.split("/")[0]), example_of(prompt)
    planned = lmm.processor.plan(example.question, example.image_sizes())
    recorded = OUTPUTS[f"{prompt}/ids"].copy()
    # The published code writes the path of an image where its features go.
    visual = planned.visual_index[:, 0] >= 0
    assert visual.sum() == lmm.config.vision.num_queries * len(example.images)
    recorded[visual] = lmm.config.image_token_id
    np.testing.assert_array_equal(planned.token_ids, recorded)
    if f"{prompt}/pixels" in OUTPUTS:
        pixels = lmm.processor.pixels(example.load_images())
        assert pixels.dtype == np.float32
        assert len(pixels) == planned.num_rows
        np.testing.assert_array_equal(pixels.transpose(0, 3, 1, 2), OUTPUTS[f"{prompt}/pixels"])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_head_and_logit(computed: Callable[[str], dict[str, tuple[np.ndarray, np.ndarray]]], prompt: str) -> None:
    heads, logits = OUTPUTS[f"{prompt}/heads"], OUTPUTS[f"{prompt}/logits"]
    ours, our_logits = computed(prompt.split("/")[0])[prompt]
    assert heads.shape == ours.shape == (3, 8, 32)
    assert np.abs(heads).max() < 20
    assert np.abs(heads).max(axis=-1).min() > 0.5, "a head near zero would hide an error"
    np.testing.assert_allclose(ours, heads, rtol=0, atol=PARITY)
    np.testing.assert_allclose(our_logits, logits, rtol=0, atol=PARITY)


@pytest.mark.parametrize("config", qwen1.CONFIGS)
def test_greedy_tokens(load_qwen1: Callable[[str], sav_jax.LMM], config: str) -> None:
    """16 of them, also where generation passes the trained length or a multiple of it."""
    lmm, names = load_qwen1(config), prompts_of(config)
    made = continue_together(lmm, [example_of(name) for name in names])
    assert made == [OUTPUTS[f"{name}/greedy"].tolist() for name in names]


def test_chats_end_where_a_turn_ends(load_qwen1: Callable[[str], sav_jax.LMM]) -> None:
    """The first stop token of any recorded continuation, put where a stop token of the files would stand."""
    lmm, name = load_qwen1("released"), "released/text only"
    recorded = OUTPUTS[f"{name}/greedy"].tolist()
    stopping = dataclasses.replace(lmm, stop_token_ids=(*lmm.stop_token_ids, recorded[3]))
    (made,) = sav_jax.generate(stopping, [example_of(name)], 16, progress=False)
    assert list(made.token_ids) == recorded[: recorded.index(recorded[3])]


@functools.cache
def encode(module: Any) -> Any:
    return jax.jit(lambda variables, batch: module.apply(variables, batch, method=module.encode_images))


@pytest.mark.parametrize("prompt", [name for name in PROMPTS if f"{name}/features" in OUTPUTS])
def test_visual_tokens(load_qwen1: Callable[[str], sav_jax.LMM], prompt: str) -> None:
    lmm, example = load_qwen1(prompt.split("/")[0]), example_of(prompt)
    pixels = lmm.processor.pixels(example.load_images())
    queries = lmm.config.vision.num_queries
    table: Any
    table, deepstack = encode(lmm.module)({"params": lmm.params}, together(lmm, [example]))
    assert deepstack is None
    assert table.shape == (1, 1 + len(pixels) * queries, 256)
    np.testing.assert_array_equal(table[:, 0], 0)
    features = np.asarray(table[0, 1:]).reshape(len(pixels), queries, 256)[:, ::32]
    np.testing.assert_allclose(features, OUTPUTS[f"{prompt}/features"], rtol=0, atol=PARITY)


@pytest.mark.parametrize("config", ["released", "long"])
def test_company_does_not_matter(
    load_qwen1: Callable[[str], sav_jax.LMM],
    computed: Callable[[str], dict[str, tuple[np.ndarray, np.ndarray]]],
    config: str,
) -> None:
    """Every prompt has wavelengths of its own: those of its length, not of the batch's."""
    lmm = load_qwen1(config)
    for name in prompts_of(config)[1:3]:
        alone = sav_jax.extract_heads(lmm, [example_of(name)], progress=False)[0]
        assert_invariant(alone, computed(config)[name][0])


def test_first_layers_alone(
    ours: sav_jax.LMM, tmp_path: Path, computed: Callable[[str], dict[str, tuple[np.ndarray, np.ndarray]]]
) -> None:
    shallow = sav_jax.load(qwen1.build(tmp_path, qwen1.CONFIGS["released"], chat=True), num_layers=2)
    heads = sav_jax.extract_heads(shallow, [example_of("released/one image")], progress=False)[0]
    assert_invariant(heads, computed("released")["released/one image"][0][:2])


def test_a_kept_prefix_keeps_its_wavelengths(load_qwen1: Callable[[str], sav_jax.LMM]) -> None:
    """What follows a prompt is read as the prompt was, however much it is at once, and whatever length is reached."""
    lmm, names = load_qwen1("long"), prompts_of("long")
    batch = batch_of(lmm, [example_of(name) for name in names])
    read, further = (
        jax.jit(function, static_argnums=(0, *static)) for function, static in ((prefill, [3]), (extend, []))
    )
    prefix = read(lmm.module, lmm.params, batch, 16)
    greedy = np.stack([OUTPUTS[f"{name}/greedy"] for name in names])
    lengths = jnp.full(len(names), 15)
    further = jax.jit(extend, static_argnums=0)
    logits, prefix = further(lmm.module, lmm.params, prefix, jnp.asarray(greedy[:, :15]), lengths)
    np.testing.assert_array_equal(np.argmax(logits, axis=-1), greedy[:, 1:])
    for row, name in enumerate(names):
        np.testing.assert_allclose(logits[row, -1], OUTPUTS[f"{name}/later"], rtol=0, atol=PARITY)
    np.testing.assert_array_equal(prefix.cache.lengths, batch.lengths + 15)
    np.testing.assert_array_equal(prefix.cache.prompt_lengths, batch.lengths)


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_any_mesh_gives_the_same_heads(
    load_qwen1: Callable[[str], sav_jax.LMM], tmp_path: Path, axes: dict[str, int]
) -> None:
    directory = qwen1.build(tmp_path, qwen1.CONFIGS["long"], chat=False)
    sharded = sav_jax.load(directory, mesh=mesh_of(axes))
    examples = [example_of(name) for name in ("long/one image", "long/97 tokens")] * 4
    for ours, plain in zip(run_together(sharded, examples), run_together(load_qwen1("long"), examples), strict=True):
        assert_invariant(ours, plain)
    kernel = sharded.params["language_model"]["layers"]["self_attn"]["qkv"]["kernel"]
    assert kernel.addressable_shards[0].data.shape[2] == 8 // axes.get("model", 1), "heads are split"


def test_bfloat16(load_qwen1: Callable[[str], sav_jax.LMM], tmp_path: Path) -> None:
    """Runs, and means about the same."""
    lmm = sav_jax.load(qwen1.build(tmp_path, qwen1.CONFIGS["long"], chat=False), dtype="bfloat16")
    heads = sav_jax.extract_heads(lmm, [example_of("long/one image")], progress=False)[0]
    recorded = OUTPUTS["long/one image/heads"]
    assert np.abs(heads - recorded).mean() < 0.05 * np.abs(recorded).mean()


# Weights


@pytest.mark.parametrize("config", ["released", "as many patches as positions"])
def test_round_trip_is_exact(load_qwen1: Callable[[str], sav_jax.LMM], tmp_path: Path, config: str) -> None:
    lmm = load_qwen1(config)
    assert lmm.hf_config == qwen1.CONFIGS[config]
    save_checkpoint(tmp_path, lmm.hf_config, lmm.params)
    stored = load_file(tmp_path / "model.safetensors")
    expected = {key: qwen1.weight(key, shape) for key, shape in qwen1.shapes(qwen1.CONFIGS[config]).items()}
    assert stored.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(stored[key], value)


def test_every_misfit_is_named(tmp_path: Path) -> None:
    qwen1.build(tmp_path, qwen1.CONFIGS["released"], chat=True)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    # Buffers of earlier releases are no misfits.
    tensors["transformer.h.0.attn.masked_bias"] = np.array([-1e4], np.float32)
    tensors["transformer.rotary_emb.inv_freq"] = np.zeros(16, np.float32)
    save_file(tensors, file)
    assert sav_jax.load(tmp_path).num_layers == 3

    del tensors["transformer.visual.attn_pool.kv_proj.weight"]
    tensors["transformer.visual.attn_pool.kv_proj.bias"] = np.zeros(256, np.float32)
    tensors["transformer.h.1.mlp.w1.weight"] = np.zeros((87, 256), np.float32)
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as caught:
        sav_jax.load(tmp_path)
    assert caught.value.missing == ["transformer.visual.attn_pool.kv_proj.weight"]
    assert caught.value.unknown == ["transformer.visual.attn_pool.kv_proj.bias"]
    assert caught.value.misshapen == ["transformer.h.1.mlp.w1.weight is [87, 256], not [88, 256]"]


def test_tied_embeddings(tmp_path: Path) -> None:
    qwen1.build(tmp_path, {**qwen1.CONFIGS["released"], "tie_word_embeddings": True}, chat=True)
    with pytest.raises(UserError, match=r"lm_head\.weight differs from transformer\.wte\.weight"):
        sav_jax.load(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    example = example_of("released/text only")
    logits = sav_jax.next_token_logits(sav_jax.load(tmp_path), [example], progress=False)
    assert np.isfinite(logits).all()


def test_number_of_parameters() -> None:
    """Qwen-VL has 9.6 billion: 7.7 of the language model, 1.9 of the ViT, 0.08 of the resampler (arXiv 2308.12966,
    table 1).
    """
    arch = architecture(REAL)
    tree: Any = jax.eval_shape(lambda: init_params(arch.module, jax.random.key(0)))

    def count(part: Any) -> int:
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(part))

    width, inner = 4096, 11008
    layer = width * 3 * width + 3 * width + width * width + 3 * width * inner + 2 * width
    language = 2 * 151936 * width + 32 * layer + width
    assert count(tree["language_model"]) == language == 7_721_324_544

    tower, inner = 1664, 8192
    norm = 2 * tower
    block = 2 * norm + 3 * (tower + 1) * tower + (tower + 1) * tower + (tower + 1) * inner + (inner + 1) * tower
    vit = 14 * 14 * 3 * tower + 256 * tower + norm + 48 * block
    attention = 3 * (width + 1) * width + (width + 1) * width
    resampler = tower * width + 2 * 256 * width + attention + 2 * 2 * width
    visual = tree["visual"]
    assert count(visual["resampler"]) == resampler == 76_054_528
    rest = {name: part for name, part in visual.items() if name not in ("resampler", "post_layernorm", "proj")}
    assert count(rest) == vit == 1_842_770_688
    assert count(visual) == vit + resampler + 2 * width + width * width
    assert count(tree) == 9_656_935_168


# Configs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual": None}, r'without a "visual" part is a language model'),
        ({"quantization_config": {"bits": 4}}, r"quantised weights \(quantization_config\) are not supported"),
        ({"rotary_pct": 0.5}, r"rotary_pct 0\.5 is not supported \(known: 1\.0\)"),
        ({"no_bias": False}, r"no_bias False is not supported \(known: True\)"),
        ({"kv_channels": 64}, r"kv_channels times num_attention_heads must be hidden_size"),
        ({"seq_length": None}, r"seq_length is missing, which use_dynamic_ntk and use_logn_attn need"),
        ({"visual": {**REAL["visual"], "output_dim": 1024}}, r"visual\.output_dim must be hidden_size"),
        ({"visual": {**REAL["visual"], "output_dim": 1000}}, r"visual\.output_dim must be a multiple of 128"),
        ({"visual": {**REAL["visual"], "n_queries": 255}}, r"visual\.n_queries 255 is not a square"),
        ({"visual": {**REAL["visual"], "image_start_id": None}}, r"visual has no image_start_id"),
        ({"visual": {"image_start_id": 3}}, r"visual has no image_size, patch_size, width, layers, heads, mlp_ratio"),
    ],
)
def test_unsupported_configs(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        architecture({**REAL, **change})


def test_num_layers_out_of_range() -> None:
    with pytest.raises(UserError, match="num_layers 33 is out of range: the model has 32 layers"):
        architecture(REAL, 33)


def test_options_that_are_off_need_no_length() -> None:
    config = {**REAL, "use_logn_attn": False, "use_dynamic_ntk": False}
    del config["seq_length"]
    assert architecture(config).config.text.dynamic_ntk is False


# Prompts


@pytest.mark.parametrize("case", QUESTIONS["texts"], ids=lambda case: ascii(case["text"][:20]))
def test_tokens_are_identical(ours: sav_jax.LMM, case: dict[str, Any]) -> None:
    assert ours.processor.encode(case["text"]) == case["ids"]
    assert ours.processor.tokenizer.decode(case["ids"]) == case["decoded"]


@pytest.mark.parametrize("case", QUESTIONS["chats"], ids=lambda case: ascii(case["question"]))
def test_chats_are_identical(ours: sav_jax.LMM, case: dict[str, Any]) -> None:
    """Also where a question begins or ends with white space, which tokenised whole would join its neighbours."""
    sizes = [OUTPUTS[f"image/{name}"].shape[:2] for name in case["images"]]
    prompt = ours.processor.plan(case["question"], sizes)
    expected = np.where(prompt.visual_index[:, 0] >= 0, ours.config.image_token_id, case["ids"])
    np.testing.assert_array_equal(prompt.token_ids, expected)


def test_marks_stand_where_they_are_put(load_qwen1: Callable[[str], sav_jax.LMM]) -> None:
    processor = load_qwen1("long").processor
    text = processor.text("Is <image> left of <image>?", 2)
    assert text == "Is <img><imgpad></img> left of <img><imgpad></img>?"
    assert processor.plan("Is <image> left of <image>?", [(3, 4), (5, 6)]).num_rows == 2
    with pytest.raises(UserError, match="1 <image> marks for 2 images"):
        processor.text("Is <image> odd?", 2)
    with pytest.raises(UserError, match="1 image tokens for 0 images"):
        processor.plan("What is <imgpad>?", [])


def test_prompt_formats(load_qwen1: Callable[[str], sav_jax.LMM]) -> None:
    picture = "Picture 1: <img><imgpad></img>\nPicture 2: <img><imgpad></img>\n"
    chat, base = load_qwen1("released"), load_qwen1("long")
    assert base.processor.text("What?", 2) == f"{picture}What?"
    assert chat.processor.text("What?", 2) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{picture}What?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert base.stop_token_ids == (768,)
    assert chat.stop_token_ids == (768, 770, 769)
    tokenizer = chat.processor.tokenizer
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "c"}]},
    ]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nPicture 1: <img><imgpad></img>\na<|im_end|>\n"
        "<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nPicture 1: <img><imgpad></img>\nc<|im_end|>\n"
    )


def test_a_template_of_the_checkpoint_wins(tmp_path: Path) -> None:
    directory = qwen1.build(tmp_path, qwen1.CONFIGS["released"], chat=True)
    (directory / "chat_template.jinja").write_text("{{ messages[0]['content'][0]['text'] }} Answer:")
    assert load_processor(directory).text("What?", 0) == "What? Answer:"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"qwen\.tiktoken: missing"),
        ("IQ== 0\n", "every byte must be a token"),
        ("IQ==\n", r"qwen\.tiktoken: unreadable"),
        ("?? 0\n", r"qwen\.tiktoken: unreadable"),
    ],
)
def test_damaged_vocabularies(tmp_path: Path, content: str | None, message: str) -> None:
    directory = qwen1.build(tmp_path, qwen1.CONFIGS["released"], chat=True)
    (directory / "qwen.tiktoken").unlink()
    if content is not None:
        (directory / "qwen.tiktoken").write_text(content)
    with pytest.raises(UserError, match=message):
        load_processor(directory)


def test_vocabulary_and_config_must_agree(tmp_path: Path) -> None:
    config = qwen1.CONFIGS["released"]
    config = {**config, "visual": {**config["visual"], "image_start_id": qwen1.IMAGE_START - 2}}
    with pytest.raises(UserError, match="image_start_id is not the token of <img>"):
        load_processor(qwen1.build(tmp_path, config, chat=True))


# Formulas


@pytest.mark.parametrize(("before", "after"), [(16, 32), (16, 10), (16, 33), (8, 16), (4, 4), (2, 7)])
def test_bicubic_matrix(before: int, after: int) -> None:
    table = np.random.default_rng(before).standard_normal((before, before, 5)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.tensor(table).permute(2, 0, 1)[None], (after, after), mode="bicubic", align_corners=False
    )[0].permute(1, 2, 0)
    matrix = bicubic_matrix(before, after)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, rtol=0, atol=1e-6)
    ours = np.einsum("ip,jq,pqd->ijd", matrix, matrix, table)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=5e-6)


def test_sincos_positions(ours: sav_jax.LMM) -> None:
    """As the published code fills them when nothing is loaded; a fresh model has them too."""
    np.testing.assert_allclose(sincos_positions(16, 256)[::17], OUTPUTS["sincos"], rtol=0, atol=1e-6)
    fresh: Any = jax.jit(
        lambda key: init_params(ours.architecture.module, key)["visual"]["resampler"]["position_embedding"]
    )
    np.testing.assert_array_equal(fresh(jax.random.key(0)), sincos_positions(16, 256))


def test_stretched_theta() -> None:
    """As released: from the length of the prompt, by the next power of two."""
    lengths = np.array([1, 2047, 2048, 2049, 4096, 4097, 8192, 8193, 40_000, 2**30], np.int32)
    alphas = [max(2 ** math.ceil(math.log2(n / 2048) + 1) - 1, 1) for n in lengths.tolist()]
    assert alphas[:8] == [1, 1, 1, 3, 3, 7, 7, 15]
    expected = [10000.0 * alpha ** (128 / 126) for alpha in alphas]
    np.testing.assert_allclose(stretched_theta(10000.0, 128, lengths, 2048), expected, rtol=1e-6)


def test_log_n_scale() -> None:
    positions = np.array([[0, 2046, 2047, 2048, 4095, 2048**2 - 1]], np.int32)
    expected = [[1, 1, 1, math.log(2049, 2048), 12 / 11, 2]]
    np.testing.assert_allclose(log_n_scale(positions, 2048), expected, rtol=1e-6)


def test_longer_prompts_compile_nothing_new(load_qwen1: Callable[[str], sav_jax.LMM]) -> None:
    """Which wavelengths a prompt gets is decided by arithmetic, not by tracing."""
    lmm = load_qwen1("long")
    batch = batch_of(lmm, [example_of("long/192 tokens"), example_of("long/193 tokens")])
    run(lmm, batch)
    step = step_of(lmm.module, lmm.architecture.heads_path)
    before = step._cache_size()
    shorter = replace(batch, lengths=np.array([96, 97], np.int32), read_positions=np.array([[95], [96]], np.int32))
    run(lmm, shorter)
    assert step._cache_size() == before
