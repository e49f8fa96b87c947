"""Give a model a fresh prototype extractor: where SQ-LLaVA's training starts."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import traverse_util

from sav_jax.errors import UserError
from sav_jax.lmm import LMM
from sav_jax.models.llava import LlavaConfig
from sav_jax.models.projectors import PackedPrototypes, PrototypeConfig, PrototypeExtractor
from sav_jax.models.qwen_vl import QwenVLConfig
from sav_jax.models.registry import architecture
from sav_jax.sharding import parameter_sharding


def takes_prototypes(lmm: LMM) -> bool:
    """Whether its family has a place for a prototype extractor."""
    return isinstance(lmm.config, LlavaConfig | QwenVLConfig)


def with_prototype_extractor(
    lmm: LMM,
    seed: int,
    *,
    num_prototypes: int = 256,
    num_iterations: int = 2,
    form: str = "released",
    keep_mlp: bool = True,
) -> LMM:
    """The same model with SQ-LLaVA's extractor (:mod:`sav_jax.models.projectors`), its weights fresh (Flax's default
    initialisers): in a LLaVA as its projector; in a Qwen2-VL, Qwen2.5-VL or Qwen3-VL, of which the paper has none,
    between the tower's last layer and the merger. An extractor it has already is replaced.

    Args:
        lmm: of one of these families.
        seed: of the fresh weights.
        num_prototypes, num_iterations, form: of the extractor; Qwen-VLs can only have the form "paper".
        keep_mlp: keep the two linear layers of the present projector, and the activation between them, behind the
            fresh clustering. If not, these are fresh too and the activation is QuickGELU: how SQ-LLaVA starts, whose
            language model has seen no image yet. Qwen-VLs keep theirs.

    Returns:
        What ``save_checkpoint(directory, lmm.hf_config, lmm.params)`` makes an ordinary checkpoint.

    Raises:
        UserError: a family without a place for it, or an impossible size, form or ``keep_mlp``.
    """
    settings = PrototypeConfig(num_prototypes, num_iterations, form)
    if isinstance(lmm.config, LlavaConfig):
        made = _in_llava(lmm, lmm.config, settings, seed, keep_mlp)
    elif isinstance(lmm.config, QwenVLConfig):
        made = _in_qwen_vl(lmm, lmm.config, settings, seed, keep_mlp)
    else:
        raise UserError(f"{lmm.name}: a {lmm.architecture.model_type} has no place for a prototype extractor")
    hf_config, params = made
    prototypes = PrototypeConfig.from_hf(hf_config["prototype_extractor"])
    facts = f"{lmm.fingerprint} {prototypes} seed {seed} keep_mlp {keep_mlp}"
    return dataclasses.replace(
        lmm,
        name=f"{lmm.name} (fresh prototype extractor, seed {seed})",
        architecture=architecture(hf_config, lmm.num_layers),
        params={**lmm.params, **params},
        fingerprint=hashlib.sha256(facts.encode()).hexdigest(),
        hf_config=hf_config,
    )


Made: TypeAlias = tuple[dict[str, Any], dict[str, Any]]
"""The new ``config.json``, and the parts of the parameters that are not the old ones."""


def _in_llava(lmm: LMM, config: LlavaConfig, prototypes: PrototypeConfig, seed: int, keep_mlp: bool) -> Made:
    if keep_mlp:
        present = config.projector_hidden_act if config.prototypes is None else config.prototypes.hidden_act
        prototypes = dataclasses.replace(prototypes, hidden_act=present)
    hf_config = {**lmm.hf_config, "prototype_extractor": prototypes.to_hf(), "multimodal_projector_bias": True}
    channels = config.vision.hidden_size
    module = PrototypeExtractor(prototypes, channels, config.text.hidden_size)
    fresh = _fresh(lambda key, x: module.init(key, x), channels, "multi_modal_projector", lmm, seed)
    if keep_mlp:
        for name in ("linear_1", "linear_2"):
            # A layer that had no bias gets one of zeros.
            fresh[name] = fresh[name] | lmm.params["multi_modal_projector"][name]
    return hf_config, {"multi_modal_projector": fresh}


def _in_qwen_vl(lmm: LMM, config: QwenVLConfig, prototypes: PrototypeConfig, seed: int, keep_mlp: bool) -> Made:
    if prototypes.form != "paper" or not keep_mlp:
        raise UserError(f'{lmm.name}: in front of its merger an extractor has form="paper" and keep_mlp=True')
    prototypes = dataclasses.replace(prototypes, hidden_act="gelu")
    channels = config.vision.hidden_size
    module = PackedPrototypes(prototypes, channels)
    fresh = _fresh(
        lambda key, x: module.init(key, x, jnp.zeros((1, 1), jnp.int32)), channels, "visual/prototypes", lmm, seed
    )
    visual = {**lmm.params["visual"], "prototypes": fresh}
    return {**lmm.hf_config, "prototype_extractor": prototypes.to_hf()}, {"visual": visual}


def _fresh(initialise: Callable[..., Any], channels: int, place: str, lmm: LMM, seed: int) -> dict[str, Any]:
    """Parameters of an extractor at ``place``, on the devices and in the dtype of the model."""

    def init(key: jax.Array) -> dict[str, jax.Array]:
        params = initialise(key, jnp.zeros((1, 1, channels), lmm.dtype))["params"]
        return {path: p.astype(lmm.dtype) for path, p in traverse_util.flatten_dict(params, sep="/").items()}

    shardings = None
    if lmm.mesh is not None:
        rule = parameter_sharding(lmm.mesh)
        shapes = jax.eval_shape(init, jax.random.key(0))
        shardings = {path: rule(f"{place}/{path}", p.shape) for path, p in shapes.items()}
    flat = jax.jit(init, out_shardings=shardings)(jax.random.key(seed))
    return traverse_util.unflatten_dict(flat, sep="/")
