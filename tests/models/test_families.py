"""Every family against transformers' PyTorch model, in float32, on the same safetensors file: one test over a table."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from checkpoints import Reference
from families import ALONE, CASES, FAMILIES, MESHES, Family, assert_invariant, case_example, case_images

import sav_jax
from sav_jax.models.weights import save_checkpoint

# Values are of order one, float32 has 2^-24 relative spacing and a forward pass chains some hundred sums: 1e-4 absolute
# (the promised bound) leaves a margin of about 5 over what is measured (docs/parity.md).
PARITY = 1e-4


pytestmark = pytest.mark.rounding


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family.build(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("case", CASES)
def test_inputs_are_identical(family: Family, case: str) -> None:
    processor, images = family.lmm.processor, case_images(case)
    theirs = family.theirs(case)
    prompt = processor.plan(CASES[case][1], [(image.height, image.width) for image in images])
    np.testing.assert_array_equal(prompt.token_ids, theirs["input_ids"][0])
    pixels = processor.pixels(images)
    assert pixels.dtype == np.float32
    assert len(pixels) == prompt.num_rows
    if images:
        np.testing.assert_array_equal(pixels, family.reference.pixels(theirs))


@pytest.mark.parametrize("case", CASES)
def test_every_head_and_logit(family: Family, case: str) -> None:
    heads, logits = family.expected[case]
    assert heads.shape == family.lmm.heads_shape
    assert 0.5 < np.abs(heads).max() < 20
    assert np.abs(heads).max(axis=-1).min() > 1e-2, "a head near zero would hide an error"
    np.testing.assert_allclose(family.mixed[case][0], heads, rtol=0, atol=PARITY)
    np.testing.assert_allclose(family.mixed[case][1], logits, rtol=0, atol=PARITY)


@pytest.mark.parametrize("case", ALONE)
def test_batch_padding_and_bucket_do_not_matter(family: Family, case: str) -> None:
    assert_invariant(family.alone[case], family.mixed[case][0])


def test_images_and_their_places_matter(family: Family) -> None:
    """The cases above would not notice a tower whose output never arrives."""
    heads = [family.expected[case][0] for case in ("square", "smaller than a tile", "two", "two, marked")]
    for i, one in enumerate(heads):
        for other in heads[:i]:
            assert np.abs(one - other).max() > 0.01


def test_long_prompts_are_long(family: Family) -> None:
    for case in ("long", "long text"):
        example = case_example(case)
        assert len(family.lmm.processor.plan(example.question, example.image_sizes()).token_ids) > 600


@pytest.mark.parametrize("case", ALONE)
def test_greedy_tokens(family: Family, case: str) -> None:
    """16 of them: prompts without an image, with one and two, short and long, all in one batch."""
    assert family.greedy[case] == family.expected_greedy[case]
    assert len({token for tokens in family.greedy.values() for token in tokens}) > 8, "few tokens would hide an error"


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_any_mesh_gives_the_same_heads(family: Family, axes: dict[str, int]) -> None:
    lmm, *ours = family.sharded(axes)
    for mine, plain in zip(ours, family.eight, strict=True):
        assert_invariant(mine, plain)
    layers, ways = lmm.params["language_model"]["layers"], axes.get("model", 1)
    query, gate = layers["self_attn"]["q_proj"]["kernel"], layers["mlp"]["gate_proj"]["kernel"]
    assert len(gate.sharding.device_set) == np.prod(list(axes.values()))
    assert gate.addressable_shards[0].data.shape[1] == gate.shape[1] // ways
    # Heads are split where they can be: 10 and 6 of them two ways, not four.
    assert query.addressable_shards[0].data.shape[1] == query.shape[1] // (1 if query.shape[1] % ways else ways)


def test_fewer_layers_give_the_same_first_heads(family: Family) -> None:
    """One, fewer than Qwen3-VL's two that are given visual features."""
    shallow = sav_jax.load(family.reference.directory, num_layers=1)
    assert shallow.heads_shape[0] == 1
    assert {len(leaf) for leaf in jax.tree.leaves(shallow.params["language_model"]["layers"])} == {1}
    heads = sav_jax.extract_heads(shallow, [case_example("odd")], progress=False)[0]
    assert_invariant(heads, family.mixed["odd"][0][:1])


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_round_trip_is_exact_and_transformers_reads_it(
    family: Family, make_reference: Callable[..., Reference], tie: bool, tmp_path: Path
) -> None:
    reference = make_reference(family.name, tie=True) if tie else family.reference
    lmm = sav_jax.load(reference.directory)
    assert ("lm_head" in lmm.params["language_model"]) != tie
    directory = tmp_path / "saved"
    shutil.copytree(reference.directory, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    save_checkpoint(directory, lmm.hf_config, lmm.params, max_shard_bytes=50_000)
    jax.tree.map(np.testing.assert_array_equal, sav_jax.load(directory).params, lmm.params)
    model, info = type(reference.model).from_pretrained(directory, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    ours, theirs = model.state_dict(), reference.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
