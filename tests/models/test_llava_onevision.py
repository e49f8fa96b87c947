"""LLaVA-OneVision against transformers' PyTorch model, in float32, on the same safetensors file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import Reference, picture
from PIL import Image

import sav_jax
from sav_jax.batching import assemble, plan_batches
from sav_jax.extract import plan_prompts

# Values are of order one, float32 has 2^-24 relative spacing and a forward pass chains some hundred sums: 1e-4 absolute
# (the bound) leaves a margin of about 30 over what is measured (3e-6).
PARITY = 1e-4
# The same sums in another company differ by the order of addition only.
INVARIANCE = 1e-5

CASES: dict[str, tuple[list[tuple[int, int]], str]] = {
    "text only": ([], "What is the capital of France?"),
    "square": ([(30, 30)], "What is it?"),
    "wide": ([(30, 90)], "What is it?"),
    "very wide": ([(11, 400)], "What is it?"),
    "tall": ([(91, 33)], "What is it?"),
    "odd": ([(37, 53)], "Is this odd?"),
    "larger than every pinpoint": ([(300, 260)], "What is it?"),
    "smaller than a tile": ([(13, 11)], "What is it?"),
    "two": ([(40, 30), (20, 60)], "Which is larger?"),
    "two, marked": ([(40, 30), (20, 60)], "Is <image> left of <image>?"),
    "three": ([(28, 28), (60, 20), (100, 90)], "Which is odd?"),
    "long": ([(300, 260)], "Consider every detail with care. " * 20),
    "long text": ([], "Consider every detail with care. " * 25),
}


def case_images(name: str) -> list[Image.Image]:
    return [picture(height, width, seed) for seed, (height, width) in enumerate(CASES[name][0])]


@pytest.fixture(scope="module")
def examples() -> dict[str, sav_jax.Example]:
    return {name: sav_jax.Example(CASES[name][1], tuple(case_images(name))) for name in CASES}


@pytest.fixture(scope="module")
def mixed(lmm: sav_jax.LMM, examples: dict[str, sav_jax.Example]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Heads and logits of every case, all run together."""
    rows = list(examples.values())
    heads = sav_jax.extract_heads(lmm, rows, batch_size=4, progress=False)
    logits = sav_jax.next_token_logits(lmm, rows, batch_size=4, progress=False)
    return dict(zip(examples, zip(heads, logits, strict=True), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_inputs_are_identical(reference: Reference, lmm: sav_jax.LMM, name: str) -> None:
    images, question = case_images(name), CASES[name][1]
    theirs = reference.inputs(lmm.processor.text(question, len(images)), images)
    prompt = lmm.processor.plan(question, [(image.height, image.width) for image in images])
    np.testing.assert_array_equal(prompt.token_ids, theirs["input_ids"][0])
    tiles = lmm.processor.tiles(images)
    assert len(tiles) == prompt.num_tiles
    if images:
        pixels = theirs["pixel_values"].numpy()
        pixels = pixels[0] if len(images) == 1 else pixels[:, 0]
        np.testing.assert_array_equal(tiles.transpose(0, 3, 1, 2), pixels)


@pytest.mark.parametrize("name", CASES)
def test_every_head_and_logit(
    reference: Reference, lmm: sav_jax.LMM, mixed: dict[str, tuple[np.ndarray, np.ndarray]], name: str
) -> None:
    images = case_images(name)
    heads, logits = reference.run(reference.inputs(lmm.processor.text(CASES[name][1], len(images)), images))
    assert heads.shape == lmm.heads_shape == (4, 10, 4)
    assert 0.5 < np.abs(heads).max() < 20
    assert np.abs(heads).max(axis=-1).min() > 1e-2, "a head near zero would hide an error"
    np.testing.assert_allclose(mixed[name][0], heads, rtol=0, atol=PARITY)
    np.testing.assert_allclose(mixed[name][1], logits, rtol=0, atol=PARITY)


def test_long_prompts_are_long(lmm: sav_jax.LMM, examples: dict[str, sav_jax.Example]) -> None:
    lengths = dict(zip(examples, [len(p.token_ids) for p in plan_prompts(lmm, list(examples.values()))], strict=True))
    assert lengths["long"] > 600
    assert lengths["long text"] > 600


def test_batch_padding_and_bucket_do_not_matter(
    lmm: sav_jax.LMM, examples: dict[str, sav_jax.Example], mixed: dict[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    """A batch mixing them equals the same examples one by one."""
    for name, example in examples.items():
        alone = sav_jax.extract_heads(lmm, [example], batch_size=1, progress=False)[0]
        np.testing.assert_allclose(alone, mixed[name][0], rtol=0, atol=INVARIANCE)


def test_one_batch_of_all_shapes(lmm: sav_jax.LMM, examples: dict[str, sav_jax.Example]) -> None:
    """Text, one image and several images in one padded batch, larger than any of them needs."""
    rows = [examples[name] for name in ("text only", "square", "larger than every pinpoint", "two, marked")]
    prompts = plan_prompts(lmm, rows)
    taps = 4
    prompts = [_with_taps(prompt, taps) for prompt in prompts]
    plan = plan_batches(prompts, 4)[0]
    plan = replace(plan, bucket=replace(plan.bucket, tokens=384, tiles=12), rows=tuple(range(4)), size=4)
    batch = assemble(plan, prompts, [lmm.processor.tiles(row.load_images()) for row in rows])
    heads = _heads(lmm, batch)
    alone = sav_jax.extract_heads(lmm, rows, batch_size=1, progress=False)
    np.testing.assert_allclose(heads[:, :, 0].transpose(1, 0, 2, 3), alone, rtol=0, atol=INVARIANCE)


def _with_taps(prompt: sav_jax.models.processor.Prompt, taps: int) -> sav_jax.models.processor.Prompt:
    missing = ((0, 0), (0, taps - prompt.visual_index.shape[1]))
    is_text = prompt.visual_index[:, :1] < 0
    index = np.where(is_text, -1, np.pad(prompt.visual_index, missing))
    return replace(prompt, visual_index=index.astype(np.int32), visual_weight=np.pad(prompt.visual_weight, missing))


def _heads(lmm: sav_jax.LMM, batch: sav_jax.models.batch.Batch) -> np.ndarray:
    state: Any = lmm.module.apply({"params": lmm.params}, batch, mutable=["intermediates"])[1]
    return np.asarray(state["intermediates"]["language_model"]["layers"]["self_attn"]["head_outputs"])


def test_capture_contract(lmm: sav_jax.LMM, examples: dict[str, sav_jax.Example]) -> None:
    """One collection, one leaf, [L, B, R, N, H]; any positions; nothing unless asked; the same under jit."""
    prompts = plan_prompts(lmm, [examples["odd"]])
    plan = plan_batches(prompts, 1)[0]
    tiles = [lmm.processor.tiles(examples["odd"].load_images())]
    length = len(prompts[0].token_ids)
    batch = assemble(plan, prompts, tiles)
    every = replace(batch, read_positions=np.arange(length, dtype=np.int32)[None])

    output: Any
    output, state = lmm.module.apply({"params": lmm.params}, every, mutable=["intermediates"])
    assert len(jax.tree.leaves(state)) == 1
    heads = _heads(lmm, every)
    assert heads.shape == (4, 1, length, 10, 4)
    assert output.logits is None
    np.testing.assert_allclose(heads[:, :, -1:], _heads(lmm, batch), rtol=0, atol=INVARIANCE)
    jitted = jax.jit(lambda params, batch: lmm.module.apply({"params": params}, batch, mutable=["intermediates"])[1])
    leaf = jax.tree.leaves(jitted(lmm.params, every))[0]
    np.testing.assert_allclose(np.asarray(leaf), heads, rtol=0, atol=INVARIANCE)

    plain: Any = lmm.module.apply({"params": lmm.params}, batch, logits="all")
    assert plain.logits.shape == (1, plan.bucket.tokens, lmm.config.text.vocab_size)
    read: Any = lmm.module.apply({"params": lmm.params}, batch, logits="read")
    np.testing.assert_allclose(read.logits[:, 0], plain.logits[:, length - 1], rtol=0, atol=INVARIANCE)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"tie": True}, id="tied embeddings"),
        pytest.param({"vision_feature_layer": -2}, id="feature layer -2"),
        pytest.param({"vision_feature_layer": 1}, id="feature layer 1"),
        pytest.param({"multimodal_projector_bias": False}, id="no projector bias"),
        pytest.param({"projector_hidden_act": "gelu_pytorch_tanh"}, id="projector activation"),
    ],
)
def test_config_options(make_reference: Callable[..., Reference], options: dict[str, object]) -> None:
    reference = make_reference(**options)
    lmm = sav_jax.load(reference.directory)
    example = sav_jax.Example("What is it?", (picture(37, 53),))
    theirs = reference.inputs(lmm.processor.text(example.question, 1), example.load_images())
    heads, logits = reference.run(theirs)
    np.testing.assert_allclose(sav_jax.extract_heads(lmm, [example], progress=False)[0], heads, rtol=0, atol=PARITY)
    np.testing.assert_allclose(
        sav_jax.next_token_logits(lmm, [example], progress=False)[0], logits, rtol=0, atol=PARITY
    )


def test_fewer_layers_give_the_same_first_heads(
    reference: Reference, examples: dict[str, sav_jax.Example], mixed: dict[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    shallow = sav_jax.load(reference.directory, num_layers=2)
    assert shallow.heads_shape == (2, 10, 4)
    assert shallow.params["language_model"]["layers"]["self_attn"]["q_proj"]["kernel"].shape[0] == 2
    heads = sav_jax.extract_heads(shallow, [examples["odd"]], progress=False)[0]
    np.testing.assert_allclose(heads, mixed["odd"][0][:2], rtol=0, atol=INVARIANCE)


@pytest.mark.parametrize("axes", [{"data": 4}, {"model": 2}, {"data": 2, "model": 2}], ids=str)
def test_any_mesh_gives_the_same_heads(
    reference: Reference,
    examples: dict[str, sav_jax.Example],
    mixed: dict[str, tuple[np.ndarray, np.ndarray]],
    axes: dict[str, int],
) -> None:
    devices = np.array(jax.devices()[: np.prod(list(axes.values()))]).reshape(tuple(axes.values()))
    lmm = sav_jax.load(reference.directory, mesh=jax.sharding.Mesh(devices, tuple(axes)))
    names = ["odd", "square", "two", "text only", "wide"]
    heads = sav_jax.extract_heads(lmm, [examples[name] for name in names], batch_size=2, progress=False)
    for row, name in zip(heads, names, strict=True):
        np.testing.assert_allclose(row, mixed[name][0], rtol=0, atol=INVARIANCE)
    if "model" in axes:
        kernel = lmm.params["language_model"]["layers"]["self_attn"]["q_proj"]["kernel"]
        assert kernel.addressable_shards[0].data.shape[2] == 5, "query heads are split over the model axis"


def test_bfloat16_stays_close_and_keeps_its_dtype(
    reference: Reference, examples: dict[str, sav_jax.Example], mixed: dict[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    lmm = sav_jax.load(reference.directory, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(lmm.params)} == {jnp.dtype("bfloat16")}
    heads = sav_jax.extract_heads(lmm, [examples["square"]], progress=False)[0]
    exact = mixed["square"][0]
    cosine = (heads * exact).sum(-1) / np.linalg.norm(heads, axis=-1) / np.linalg.norm(exact, axis=-1)
    # bfloat16 keeps 8 bits: a relative error of 2^-8 per operation, some 30 in a row along four layers, adds up to
    # about 2^-8 * sqrt(30) = 2 % of a vector, whose cosine then is 1 - 0.02^2 / 2; the median head must be well within
    # ten times that.
    assert np.median(1 - cosine) < 2e-3


def test_score_options_sums_token_log_probabilities(reference: Reference, lmm: sav_jax.LMM) -> None:
    import torch

    example = sav_jax.Example("What is it?", (picture(28, 28),))
    options = ["cat", "dog", "a", "giraffe"]
    ours = sav_jax.score_options(lmm, [example, example], options, progress=False)
    text = lmm.processor.text(example.question, 1)
    for column, option in enumerate(options):
        inputs = reference.inputs(text + option, example.load_images())
        with torch.no_grad():
            log_p = reference.model(**inputs).logits[0].log_softmax(-1)
        ids = inputs["input_ids"][0]
        start = len(ids) - len(option)  # byte-level vocabulary: one token a letter
        expected = sum(log_p[i - 1, ids[i]].item() for i in range(start, len(ids)))
        np.testing.assert_allclose(ours[:, column], expected, rtol=0, atol=PARITY)
    single = sav_jax.score_options(lmm, [example], ["a", "b"], progress=False)
    np.testing.assert_allclose(single[0, 0], ours[0, 2], rtol=0, atol=PARITY)
