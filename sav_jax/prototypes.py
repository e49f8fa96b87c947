"""Give a LLaVA a fresh prototype extractor: where SQ-LLaVA's training starts."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from sav_jax.errors import UserError
from sav_jax.lmm import LMM
from sav_jax.models.llava import LlavaConfig
from sav_jax.models.projectors import PrototypeConfig, PrototypeExtractor
from sav_jax.models.registry import architecture
from sav_jax.sharding import parameter_sharding


def with_prototype_extractor(
    lmm: LMM,
    seed: int,
    *,
    num_prototypes: int = 256,
    num_iterations: int = 2,
    form: str = "released",
    keep_mlp: bool = True,
) -> LMM:
    """The same LLaVA with SQ-LLaVA's extractor (:mod:`sav_jax.models.projectors`) as its projector, with fresh
    weights (Flax's default initialisers). An extractor it has already is replaced.

    Args:
        lmm: of a LLaVA family.
        seed: of the fresh weights.
        num_prototypes, num_iterations, form: of the extractor.
        keep_mlp: keep the two linear layers of the present projector, and the activation between them, behind the
            fresh clustering. If not, these are fresh too and the activation is QuickGELU: how SQ-LLaVA starts, whose
            language model has seen no image yet.

    Returns:
        What ``save_checkpoint(directory, lmm.hf_config, lmm.params)`` makes an ordinary checkpoint.

    Raises:
        UserError: not a LLaVA, or an impossible size.
    """
    config = lmm.config
    if not isinstance(config, LlavaConfig):
        raise UserError(f"{lmm.name}: a {lmm.architecture.model_type} has no place for a prototype extractor")
    present = config.projector_hidden_act if config.prototypes is None else config.prototypes.hidden_act
    act = {"hidden_act": present} if keep_mlp else {}
    prototypes = PrototypeConfig(num_prototypes, num_iterations, form, **act)
    hf_config = {**lmm.hf_config, "prototype_extractor": prototypes.to_hf(), "multimodal_projector_bias": True}
    fresh = _fresh(prototypes, config, lmm, seed)
    if keep_mlp:
        for name in ("linear_1", "linear_2"):
            # A layer that had no bias gets one of zeros.
            fresh[name] = fresh[name] | lmm.params["multi_modal_projector"][name]
    settings = f"{lmm.fingerprint} {prototypes} seed {seed} keep_mlp {keep_mlp}"
    return dataclasses.replace(
        lmm,
        name=f"{lmm.name} (fresh prototype extractor, seed {seed})",
        architecture=architecture(hf_config, lmm.num_layers),
        params={**lmm.params, "multi_modal_projector": fresh},
        fingerprint=hashlib.sha256(settings.encode()).hexdigest(),
        hf_config=hf_config,
    )


def _fresh(prototypes: PrototypeConfig, config: LlavaConfig, lmm: LMM, seed: int) -> dict[str, Any]:
    """Parameters of an extractor, on the devices and in the dtype of the model."""
    module = PrototypeExtractor(prototypes, config.vision.hidden_size, config.text.hidden_size)

    def init(key: jax.Array) -> dict[str, jax.Array]:
        params = module.init(key, jnp.zeros((1, 1, module.channels), lmm.dtype))["params"]
        return {path: p.astype(lmm.dtype) for path, p in traverse_util.flatten_dict(params, sep="/").items()}

    shardings = None
    if lmm.mesh is not None:
        rule = parameter_sharding(lmm.mesh)
        shapes = jax.eval_shape(init, jax.random.key(0))
        shardings = {path: rule(f"multi_modal_projector/{path}", p.shape) for path, p in shapes.items()}
    flat = jax.jit(init, out_shardings=shardings)(jax.random.key(seed))
    return traverse_util.unflatten_dict(flat, sep="/")
