"""A LLaVA with SQ-LLaVA's prototype extractor is an ordinary checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints_qwen1 as qwen1
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checkpoints import Reference, picture
from checkpoints_sq_llava import released_extractor, released_similarity, released_state
from families import CASES, EIGHT, case_example, example_pixels, mesh_of, run_together

import sav_jax
from sav_jax.cli import main
from sav_jax.models.projectors import PrototypeConfig, prototype_extractor_from_torch
from sav_jax.models.weights import save_checkpoint
from sav_jax.prototypes import with_prototype_extractor

PARITY = 1e-4  # as in models/test_families.py
INVARIANCE = 1e-5  # as there
CLEAR = 1e-5
"""By how much the best prototype of every token leads the second: ten times what the vision tower's rounding, which
depends on how arrays are split, does to similarities. One iteration leaves prototypes more different than two.
"""
K, ITERATIONS = 5, 1  # of 49 tokens


@pytest.fixture(scope="module")
def llava(make_reference: Callable[..., Reference]) -> Reference:
    return make_reference("llava")


@pytest.fixture(scope="module")
def plain(llava: Reference) -> sav_jax.LMM:
    return sav_jax.load(llava.directory)


@pytest.fixture(scope="module")
def state(llava: Reference, plain: sav_jax.LMM) -> dict[str, torch.Tensor]:
    """The first random projector under which every token of the images of ``EIGHT`` chooses clearly."""
    pixels = np.concatenate([example_pixels(plain, case_example(case)) for case in EIGHT if CASES[case][0]])
    tower = llava.model.model.vision_tower
    with torch.no_grad():
        hidden = tower(torch.tensor(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True).hidden_states
    for seed in range(100):
        state = released_state(24, 40, seed)
        double = {key: value.double() for key, value in state.items()}
        similarity = released_similarity(double, hidden[-2][:, 1:].double(), K, ITERATIONS)
        best = similarity.topk(2, dim=1).values
        if float((best[:, 0] - best[:, 1]).min()) > CLEAR:
            return state
    raise AssertionError("no projector chooses clearly")


@pytest.fixture(scope="module")
def checkpoint(plain: sav_jax.LMM, state: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain LLaVA with the projector of ``state``, saved as users save it."""
    directory = tmp_path_factory.mktemp("sq") / "model"
    shutil.copytree(plain.name, directory)
    _, params = prototype_extractor_from_torch(state, num_prototypes=K, num_iterations=ITERATIONS)
    field = {"num_prototypes": K, "num_iterations": ITERATIONS, "form": "released"}
    config = {**plain.hf_config, "prototype_extractor": field}
    save_checkpoint(directory, config, {**plain.params, "multi_modal_projector": params})
    return directory


class TorchExtractor(torch.nn.Module):
    """In the place of transformers' projector; keeps the tokens it was given."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.state, self.tokens = state, torch.zeros(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.tokens = x
        return released_extractor(self.state, x, K, ITERATIONS)


def test_parity_with_pytorch(
    llava: Reference, checkpoint: Path, state: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads and logits of transformers' LLaVA with the extractor for a projector: it is given the patches of the last
    layer but one, without the class token.
    """
    extractor = TorchExtractor(state)
    monkeypatch.setattr(llava.model.model, "multi_modal_projector", extractor)
    lmm = sav_jax.load(checkpoint)
    example = case_example("two")
    heads, logits = llava.run(llava.inputs(lmm.processor.text(example.question, 2), example.load_images()))
    assert extractor.tokens.shape == (2, 49, 24)
    mine = run_together(lmm, [example])
    np.testing.assert_allclose(mine[0][0], heads, rtol=0, atol=PARITY)
    np.testing.assert_allclose(mine[1][0], logits, rtol=0, atol=PARITY)


def test_sharded(checkpoint: Path) -> None:
    examples = [case_example(case) for case in EIGHT]
    alone = run_together(sav_jax.load(checkpoint), examples)
    for axes in ({"model": 2}, {"data": 8}):
        sharded = run_together(sav_jax.load(checkpoint, mesh=mesh_of(axes)), examples)
        for one, other in zip(alone, sharded, strict=True):
            np.testing.assert_allclose(other, one, rtol=0, atol=INVARIANCE, err_msg=str(axes))


@pytest.mark.parametrize("form", ["released", "paper"])
def test_saved_and_loaded(plain: sav_jax.LMM, tmp_path: Path, form: str) -> None:
    """The same weights and outputs; head extraction and the command line need no word about it."""
    lmm = with_prototype_extractor(plain, 3, num_prototypes=K, form=form)
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
    assert len({loaded.fingerprint, plain.fingerprint, lmm.fingerprint}) == 3


def test_command_line(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAV_JAX_CACHE", str(tmp_path / "cache"))
    for label, shift in {"bright": 170, "dark": 0}.items():
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(2):
            image = picture(30, 34, i).point(lambda value, shift=shift: value // 3 + shift)
            image.save(tmp_path / "photos" / label / f"{i}.png")
    photos, classifier = str(tmp_path / "photos"), str(tmp_path / "clf")
    fit = ("fit", "--model", str(checkpoint), "--train", photos, "--question", "Day or night?")
    assert main([*fit, "--num-heads", "20", "--output", classifier]) == 0
    output = tmp_path / "predictions.jsonl"
    assert main(["predict", "--classifier", classifier, "--data", photos, "--output", str(output)]) == 0
    assert len(output.read_text().splitlines()) == 4


def test_weights_and_config_must_agree(checkpoint: Path, plain: sav_jax.LMM, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    (directory / "config.json").write_text(json.dumps(dict(plain.hf_config)))
    with pytest.raises(sav_jax.UserError, match=r"8 unknown: .*to_centers"):
        sav_jax.load(directory)
    config = json.loads((checkpoint / "config.json").read_text())
    for fields, message in (
        ({"prototype_extractor": {"form": "paper"}}, "3 missing: .*centers, .*to_residual.weight, .*; 2 unknown"),
        ({"prototype_extractor": {"count": 3}}, "prototype_extractor.count is not known"),
        ({"prototype_extractor": 3}, "prototype_extractor 3 is not an object"),
        ({"multimodal_projector_bias": False}, "a prototype extractor has biases"),
    ):
        (directory / "config.json").write_text(json.dumps(config | fields))
        with pytest.raises(sav_jax.UserError, match=message):
            sav_jax.load(directory)


def projector(lmm: sav_jax.LMM) -> Any:
    return lmm.params["multi_modal_projector"]


def test_what_is_fresh(plain: sav_jax.LMM) -> None:
    kept, other, again = (with_prototype_extractor(plain, seed, num_prototypes=K) for seed in (0, 1, 0))
    fresh = with_prototype_extractor(plain, 0, num_prototypes=K, keep_mlp=False)
    for name in ("linear_1", "linear_2"):
        for lmm in (kept, other):
            jax.tree.map(np.testing.assert_array_equal, projector(lmm)[name], projector(plain)[name])
        assert not np.array_equal(projector(fresh)[name]["kernel"], projector(plain)[name]["kernel"])
    jax.tree.map(np.testing.assert_array_equal, projector(kept), projector(again))
    assert not np.array_equal(projector(kept)["to_keys"]["kernel"], projector(other)["to_keys"]["kernel"])
    assert kept.config.prototypes == PrototypeConfig(K, 2, "released", "gelu")
    assert fresh.config.prototypes == PrototypeConfig(K, 2, "released", "quick_gelu")
    assert kept.fingerprint == again.fingerprint
    assert len({lmm.fingerprint for lmm in (plain, kept, other, fresh)}) == 4
    for part in ("vision_tower", "language_model"):
        assert kept.params[part] is plain.params[part]


def test_fresh_on_a_mesh_in_bfloat16_with_few_layers(plain: sav_jax.LMM) -> None:
    lmm = sav_jax.load(plain.name, dtype="bfloat16", mesh=mesh_of({"data": 2, "model": 4}), num_layers=2)
    sharded = with_prototype_extractor(lmm, 0, num_prototypes=K)
    leaves = jax.tree.leaves(projector(sharded))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("bfloat16")}
    assert {len(leaf.sharding.device_set) for leaf in leaves} == {8}
    assert sharded.num_layers == 2
    heads = sav_jax.extract_heads(sharded, [case_example("square")], progress=False)
    assert heads.shape == (1, *sharded.heads_shape)
    assert np.isfinite(heads).all()


def test_fresh_where_there_were_no_biases(make_reference: Callable[..., Reference]) -> None:
    plain = sav_jax.load(make_reference("llava", multimodal_projector_bias=False).directory)
    lmm = with_prototype_extractor(plain, 0, num_prototypes=K)
    assert not np.any(projector(lmm)["linear_1"]["bias"])
    np.testing.assert_array_equal(projector(lmm)["linear_1"]["kernel"], projector(plain)["linear_1"]["kernel"])


def test_a_family_without_a_place_for_it(tmp_path: Path) -> None:
    lmm = sav_jax.load(qwen1.build(tmp_path / "model", qwen1.CONFIGS["released"], chat=True))
    with pytest.raises(sav_jax.UserError, match="a qwen has no place for a prototype extractor"):
        with_prototype_extractor(lmm, 0)
