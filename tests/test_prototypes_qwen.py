"""SQ-LLaVA's prototype extractor in front of the merger of a Qwen-VL, in the paper's form."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checkpoints import Reference, picture
from checkpoints_sq_llava import State, paper_clusters, paper_params, paper_state
from families import CASES, EIGHT, case_example, mesh_of, run_together

import sav_jax
from sav_jax.models.projectors import PrototypeConfig
from sav_jax.models.weights import save_checkpoint
from sav_jax.prototypes import with_prototype_extractor
from sav_jax.train.chats import Chat, Turn
from sav_jax.train.optimizer import Optimization
from sav_jax.train.recipes import Recipe
from sav_jax.train.tune import tune

PARITY = 1e-4  # as in models/test_families.py
INVARIANCE = 1e-5  # as there
K, ITERATIONS = 5, 2
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="module")
def state() -> State:
    return paper_state(24, 8, K)


@pytest.fixture(scope="module")
def plain(make_reference: Callable[..., Reference]) -> sav_jax.LMM:
    return sav_jax.load(make_reference("qwen2_vl").directory)


def saved(lmm: sav_jax.LMM, state: State, directory: Path) -> Path:
    """A checkpoint of ``lmm`` with the extractor of ``state``, as users save it."""
    shutil.copytree(lmm.name, directory)
    field = {"num_prototypes": K, "num_iterations": ITERATIONS}
    visual = {**lmm.params["visual"], "prototypes": paper_params(state)}
    save_checkpoint(directory, {**lmm.hf_config, "prototype_extractor": field}, {**lmm.params, "visual": visual})
    return directory


class TorchExtractor(torch.nn.Module):
    """In front of transformers' merger: every image's patches by themselves."""

    def __init__(self, state: State, merger: torch.nn.Module) -> None:
        super().__init__()
        self.state, self.merger, self.sizes, self.moved = state, merger, [0], 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        images = [paper_clusters(self.state, image[None], ITERATIONS)[0] for image in x.split(self.sizes)]
        self.moved = float((torch.cat(images) - x).abs().max())
        return self.merger(torch.cat(images))


@pytest.mark.parametrize("family", FAMILIES)
def test_parity_with_pytorch(
    make_reference: Callable[..., Reference],
    state: State,
    family: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every head and the logits, of prompts of several images of unlike sizes and of one, in one batch."""
    reference = make_reference(family)
    lmm = sav_jax.load(saved(sav_jax.load(reference.directory), state, tmp_path / "model"))
    extractor = TorchExtractor(state, reference.model.model.visual.merger)
    monkeypatch.setattr(reference.model.model.visual, "merger", extractor)
    examples = [case_example(case) for case in ("three", "two, marked", "odd", "text only")]
    mine = run_together(lmm, examples)
    for i, example in enumerate(examples):
        images = example.load_images()
        inputs = reference.inputs(lmm.processor.text(example.question, len(images)), images)
        if images:
            extractor.sizes = inputs["image_grid_thw"].prod(dim=1).tolist()
        heads, logits = reference.run(inputs)
        np.testing.assert_allclose(mine[0][i], heads, rtol=0, atol=PARITY, err_msg=example.question)
        np.testing.assert_allclose(mine[1][i], logits, rtol=0, atol=PARITY, err_msg=example.question)
        assert not images or extractor.moved > 0.1


def test_sharded(plain: sav_jax.LMM, state: State, tmp_path: Path) -> None:
    directory = saved(plain, state, tmp_path / "model")
    examples = [case_example(case) for case in EIGHT]
    assert max(len(CASES[case][0]) for case in EIGHT) > 1
    alone = run_together(sav_jax.load(directory), examples)
    sharded = run_together(sav_jax.load(directory, mesh=mesh_of({"data": 2, "model": 4})), examples)
    for one, other in zip(alone, sharded, strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=INVARIANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_saved_and_loaded(make_reference: Callable[..., Reference], family: str, tmp_path: Path) -> None:
    plain = sav_jax.load(make_reference(family).directory)
    lmm, again = (with_prototype_extractor(plain, 3, num_prototypes=K, form="paper") for _ in range(2))
    assert lmm.config.vision.prototypes == PrototypeConfig(K, 2, "paper", "gelu")
    assert lmm.fingerprint == again.fingerprint != plain.fingerprint
    jax.tree.map(np.testing.assert_array_equal, lmm.params, again.params)
    assert lmm.params["language_model"] is plain.params["language_model"]
    directory = Path(shutil.copytree(plain.name, tmp_path / "model"))
    save_checkpoint(directory, lmm.hf_config, lmm.params)
    loaded = sav_jax.load(directory)
    assert loaded.module == lmm.module
    jax.tree.map(np.testing.assert_array_equal, loaded.params, lmm.params)
    examples = [case_example(case) for case in ("square", "text only")]
    before, after, without = (run_together(model, examples)[0] for model in (lmm, loaded, plain))
    np.testing.assert_array_equal(before, after)
    assert np.abs(after[0] - without[0]).max() > 0.01
    np.testing.assert_allclose(after[1], without[1], rtol=0, atol=INVARIANCE)


@pytest.mark.parametrize("rate", [1e-3, 0.0])
def test_it_trains_with_the_projector(tmp_path: Path, rate: float) -> None:
    """Every part of it; at a rate of zero nothing of it."""
    lmm = with_prototype_extractor(sav_jax.load("tiny-qwen"), 0, num_prototypes=K, form="paper")
    turns = (Turn("user", "what is it?"), Turn("assistant", "a star"))
    chats = [Chat(turns, sav_jax.Example("-", (picture(40, 40, i),), id=str(i))) for i in range(4)]
    recipe = Recipe(
        projector_learning_rate=rate, steps=2, sq_ratio=0.0, optimization=Optimization(batch_size=4, warmup=0.0)
    )
    tuned = tune(lmm, chats, recipe, tmp_path / "run", progress=False)
    for part in ("prototypes", "merger"):
        before, after = (model.params["visual"][part] for model in (lmm, tuned))
        moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, after)
        if part == "prototypes":
            # Added alike to all prototypes' shares of a patch, it has no gradient but rounding.
            del moved["to_centers"]["bias"]
        assert {*jax.tree.leaves(moved)} == {rate > 0}


def test_fresh_on_a_mesh_in_bfloat16(plain: sav_jax.LMM) -> None:
    lmm = sav_jax.load(plain.name, dtype="bfloat16", mesh=mesh_of({"data": 2, "model": 4}), num_layers=2)
    sharded = with_prototype_extractor(lmm, 0, num_prototypes=K, form="paper")
    leaves = jax.tree.leaves(sharded.params["visual"]["prototypes"])
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("bfloat16")}
    assert {len(leaf.sharding.device_set) for leaf in leaves} == {8}
    heads = sav_jax.extract_heads(sharded, [case_example("square")], progress=False)
    assert np.isfinite(heads).all()


def test_what_cannot_be(plain: sav_jax.LMM, state: State, tmp_path: Path) -> None:
    for options in ({"form": "released"}, {"form": "paper", "keep_mlp": False}):
        with pytest.raises(sav_jax.UserError, match='has form="paper" and keep_mlp=True'):
            with_prototype_extractor(plain, 0, num_prototypes=K, **options)
    directory = saved(plain, state, tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    fields: tuple[tuple[Any, str], ...] = (
        ({"form": "released"}, "prototype_extractor.form 'released': .* only be 'paper'"),
        ({"hidden_act": "quick_gelu"}, "prototype_extractor.hidden_act 'quick_gelu': .* only be 'gelu'"),
        ({"num_prototypes": 0}, "num_prototypes 0 is not a whole number"),
        (3, "prototype_extractor 3 is not an object"),
        (None, "9 unknown: .*prototypes.centers"),
    )
    for field, message in fields:
        (directory / "config.json").write_text(json.dumps(config | {"prototype_extractor": field}))
        with pytest.raises(sav_jax.UserError, match=message):
            sav_jax.load(directory)
