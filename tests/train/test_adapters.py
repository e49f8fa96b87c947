"""LoRA against PEFT: the same adapter gives the same model, whoever wrote it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints_qwen1 as qwen1
import numpy as np
import pytest
import torch
from checkpoints import Reference
from families import case_example, run_together
from peft import LoraConfig, PeftModel, get_peft_model

import sav_jax
from sav_jax import adapters
from sav_jax.errors import UserError
from sav_jax.models import lora
from sav_jax.models.lora import Target
from sav_jax.models.registry import architecture

# PEFT asks transformers by a name that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

PARITY = 1e-4  # as in test_families.py
TEXT = "language_model/layers/.*"
# What each family's language model and tower call their linear layers.
MODULES = {
    "llava_onevision": r".*(language_model.*(q_proj|k_proj|v_proj|o_proj|up_proj)|vision_tower.*(q_proj|fc1))",
    "llava": r".*(language_model.*(q_proj|down_proj)|vision_tower.*(out_proj|fc2)|multi_modal_projector.linear_1)",
    "qwen2_vl": r".*(language_model.*(v_proj|gate_proj)|visual.blocks.*(attn\.qkv|mlp\.fc1))",
    "qwen3_vl": r".*(language_model.*(k_proj|o_proj)|visual.blocks.*(attn\.proj|mlp\.linear_fc2))",
}


@pytest.fixture(scope="module", params=MODULES)
def family(request: pytest.FixtureRequest, make_reference: Callable[..., Reference]) -> tuple[Reference, str]:
    return make_reference(request.param), MODULES[request.param]


def randomized(model: Any, seed: int) -> Any:
    """PEFT leaves B zero: nothing would be compared. So small, values stay of order one, which PARITY is for."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    return model.eval()


def outputs(lmm: sav_jax.LMM, names: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    heads, logits = run_together(lmm, [case_example(name) for name in names])[:2]
    return list(zip(heads, logits, strict=True))


def compare(reference: Reference, model: Any, lmm: sav_jax.LMM) -> None:
    """Every head of every layer, and the logits."""
    wrapped = Reference.__new__(type(reference))
    for name, value in vars(reference).items():
        object.__setattr__(wrapped, name, value)
    object.__setattr__(wrapped, "model", model)
    names = ["odd", "two", "text only"]
    for name, (heads, logits) in zip(names, outputs(lmm, names), strict=True):
        example = case_example(name)
        text = lmm.processor.text(example.question, len(example.images))
        theirs = wrapped.run(reference.inputs(text, example.load_images()))
        np.testing.assert_allclose(heads, theirs[0], rtol=0, atol=PARITY)
        np.testing.assert_allclose(logits, theirs[1], rtol=0, atol=PARITY)


@pytest.mark.parametrize("stabilised", [False, True])
def test_pefts_adapter_gives_pefts_model(family: tuple[Reference, str], tmp_path: Path, stabilised: bool) -> None:
    reference, modules = family
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=modules,
        rank_pattern={r".*layers\.1\..*": 2},
        alpha_pattern={r".*layers\.2\..*": 9},
        use_rslora=stabilised,
    )
    model = randomized(get_peft_model(reference.model, config), seed=1)
    try:
        model.save_pretrained(tmp_path)
        compare(reference, model.get_base_model(), sav_jax.load(reference.directory, adapter=tmp_path))
    finally:
        model.unload()


def test_a_matrix_that_is_no_linear_layer_is_refused(tmp_path: Path) -> None:
    """The first Qwen-VL's ``visual.proj`` is a parameter of its own: PEFT has no name for updates of it."""
    arch = architecture(qwen1.CONFIGS["released"])
    targets = [Target("visual/proj", rank=2)]
    weights = lora.init(arch.module, targets, 0)
    with pytest.raises(UserError, match="cannot hold updates of visual/proj: it is not a linear layer"):
        adapters.save(tmp_path / "adapter", arch, targets, weights)
    assert not (tmp_path / "adapter").exists()
    targets = [Target("visual/layers/qkv", rank=2)]
    weights = {path: value + np.float32(1) for path, value in lora.init(arch.module, targets, 0).items()}
    weights = {
        path: value * np.arange(value.size, dtype=np.float32).reshape(value.shape) for path, value in weights.items()
    }
    adapters.save(tmp_path / "adapter", arch, targets, weights)
    _, found = adapters.load(tmp_path / "adapter", arch)
    for path, value in weights.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def test_our_adapter_gives_our_model_in_peft(family: tuple[Reference, str], tmp_path: Path) -> None:
    reference, _ = family
    plain = sav_jax.load(reference.directory)
    tower = next(p for p in lora.projections(plain.module) if "layers" in p and not p.startswith("language_model"))
    targets = (Target(TEXT, 3, 5.0), Target(tower, 2, 7.0))
    rng = np.random.default_rng(0)
    weights = {
        path: (0.1 * rng.standard_normal(shape)).astype(np.float32)
        for path, shape in lora.shapes(plain.module, targets).items()
    }
    adapters.save(tmp_path, plain.architecture, targets, weights)
    # What is read back is what was written.
    again, read = adapters.load(tmp_path, plain.architecture)
    assert {target.rank for target in again} == {2, 3}
    for path, value in weights.items():
        np.testing.assert_array_equal(read[path], value)
    model = PeftModel.from_pretrained(reference.model, tmp_path).eval()
    try:
        compare(reference, model.get_base_model(), sav_jax.load(reference.directory, adapter=tmp_path))
    finally:
        model.unload()
