"""What is asked of Qwen2-VL, Qwen2.5-VL and Qwen3-VL alone (the rest is in ``test_families.py``)."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import Reference, picture
from checkpoints_qwen import MAX_TOKENS, MIN_TOKENS
from families import CASES, FAMILIES, Family, case_example, case_images, run, run_together, together

import sav_jax
from sav_jax.models.multimodal import init_params
from sav_jax.models.processor import load_processor
from sav_jax.models.registry import architecture

PARITY, INVARIANCE = 1e-4, 1e-5  # as in test_families.py

SHAPES: dict[str, list[tuple[int, int]]] = {
    "smaller than the least": [(5, 7)],
    "larger than the most": [(300, 260)],
    "a line": [(6, 700)],
    "a column": [(600, 9)],
}


@pytest.fixture(scope="module", params=[name for name in FAMILIES if name.startswith("qwen")])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family.build(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def qwen(family: Family) -> Reference:
    return family.reference


@pytest.fixture(scope="module")
def ours(family: Family) -> sav_jax.LMM:
    return family.lmm


@pytest.mark.parametrize("name", CASES)
def test_positions_are_identical(family: Family, name: str) -> None:
    sizes, question = CASES[name]
    theirs, prompt = family.theirs(name), family.lmm.processor.plan(question, sizes)
    assert prompt.positions is not None
    if not sizes:
        np.testing.assert_array_equal(prompt.positions, np.arange(len(prompt.token_ids))[:, None].repeat(3, 1))
        return
    positions, _ = family.reference.model.model.get_rope_index(
        theirs["input_ids"], theirs["mm_token_type_ids"], image_grid_thw=theirs["image_grid_thw"]
    )
    np.testing.assert_array_equal(prompt.positions, positions[:, 0].T)


def test_images_of_extreme_sizes(qwen: Reference, ours: sav_jax.LMM) -> None:
    """Up to the bounds on visual tokens, and one token wide."""
    examples = {
        name: sav_jax.Example("What is it?", tuple(picture(*size) for size in sizes)) for name, sizes in SHAPES.items()
    }
    heads, logits = run_together(ours, list(examples.values()))
    for i, example in enumerate(examples.values()):
        theirs = qwen.inputs(ours.processor.text(example.question, 1), example.load_images())
        np.testing.assert_array_equal(ours.processor.pixels(example.load_images()), theirs["pixel_values"])
        expected_heads, expected_logits = qwen.run(theirs)
        np.testing.assert_allclose(heads[i], expected_heads, rtol=0, atol=PARITY)
        np.testing.assert_allclose(logits[i], expected_logits, rtol=0, atol=PARITY)
    plans = {name: ours.processor.plan_images(sizes)[0] for name, sizes in SHAPES.items()}
    visual = {name: len(plan.index) for name, plan in plans.items()}
    assert MIN_TOKENS <= visual["smaller than the least"] < 2 * MIN_TOKENS
    assert 0.8 * MAX_TOKENS < visual["larger than the most"] <= MAX_TOKENS
    assert visual["a line"] == 88
    assert plans["a line"].grid == (1, 1, 88)


def test_every_dtype_stays_what_it_is(ours: sav_jax.LMM) -> None:
    """bfloat16 parameters give bfloat16 hidden states (strict promotion would raise on a mixture)."""
    abstract = jax.eval_shape(lambda: init_params(ours.architecture.module, jax.random.key(0)))
    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16), abstract)
    batch = together(ours, [case_example("odd")])
    output, state = jax.eval_shape(
        lambda params: ours.module.apply({"params": params}, batch, mutable=["intermediates"]), abstract
    )
    assert output.hidden.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("bfloat16")}


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


def test_padding_is_never_seen(ours: sav_jax.LMM) -> None:
    """Whatever stands in padded patches, real ones give the same bits."""
    batch = together(ours, [case_example("odd")], rows=160)
    dirty = np.array(batch.pixels)
    dirty[:, len(ours.processor.pixels(case_images("odd"))) :] = 1e3
    for plain, other in zip(run(ours, batch), run(ours, replace(batch, pixels=dirty)), strict=True):
        np.testing.assert_array_equal(plain, other)
