"""Instruction tuning: low-rank updates, and chosen parameters of the model, learn what conversations teach."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from sav_jax.lmm import LMM
from sav_jax.models import lora
from sav_jax.models.decoder import read_at
from sav_jax.models.lora import Target
from sav_jax.models.multimodal import MultimodalModel, rematerialized
from sav_jax.sharding import parameter_sharding
from sav_jax.train.data import LessonBatch
from sav_jax.train.loop import Loss, Problem
from sav_jax.train.optimizer import Group, trainable_groups

_CHUNK = 256  # targets of a row whose logits are in memory together


def next_token_loss(
    module: MultimodalModel, variables: Mapping[str, Any], data: LessonBatch, rngs: Mapping[str, jax.Array] | None
) -> tuple[jax.Array, jax.Array]:
    """Sum of the cross-entropies of a batch's targets, and how many there are; both float32.

    Logits are made for the targets alone, some at a time, and again in the backward pass: a vocabulary of 150,000 times
    the tokens of a long row would not fit.
    """
    output: Any = module.apply(variables, data.batch, rngs=None if rngs is None else dict(rngs))
    hidden = read_at(output.hidden, data.batch.read_positions)

    @jax.checkpoint
    def part(given: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        hidden, targets, weights = given
        logits: Any = module.apply(variables, hidden, method=lambda m, x: m.language_model.logits(x))
        chosen = jnp.take_along_axis(logits, targets[:, :, None], axis=-1)[:, :, 0]
        return jnp.sum((jax.nn.logsumexp(logits, axis=-1) - chosen) * weights)

    whole = hidden, jnp.asarray(data.targets), jnp.asarray(data.weights)
    width = data.targets.shape[1]
    if width <= _CHUNK or width % _CHUNK:
        return part(whole), jnp.sum(whole[2])
    chunks = jax.tree.map(lambda x: x.reshape(x.shape[0], width // _CHUNK, _CHUNK, *x.shape[2:]).swapaxes(0, 1), whole)
    return jnp.sum(jax.lax.map(part, chunks)), jnp.sum(whole[2])


@functools.lru_cache(maxsize=16)
def supervised_loss(module: MultimodalModel, targets: tuple[Target, ...]) -> Loss:
    """The loss of conversations, the same object for equal arguments; what trains are ``lora/...`` matrices and
    ``params/...`` leaves.
    """

    def loss(
        trainable: Mapping[str, jax.Array], frozen: Mapping[str, Any], data: LessonBatch, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        variables = with_trainable(module, targets, frozen, trainable, training=True)
        return next_token_loss(module, variables, data, {"dropout": key})

    return loss


def with_trainable(
    module: MultimodalModel,
    targets: Sequence[Target],
    frozen: Mapping[str, Any],
    trainable: Mapping[str, Any],
    training: bool = False,
) -> dict[str, Any]:
    """The variables of a forward pass: frozen parameters, those that train in the frozen ones' dtype, and LoRA.

    Args:
        module: the model.
        targets: of the low-rank updates.
        frozen: flat parameters that do not train.
        trainable: flat, ``params/...`` and ``lora/...``.
        training: with dropout.
    """
    dtype = next(iter(frozen.values())).dtype
    flat = dict(frozen)
    flat.update({p.removeprefix("params/"): v.astype(dtype) for p, v in trainable.items() if p.startswith("params/")})
    variables: dict[str, Any] = {"params": traverse_util.unflatten_dict(flat, sep="/")}
    if targets:
        matrices = {p.removeprefix("lora/"): v for p, v in trainable.items() if p.startswith("lora/")}
        variables["lora"] = lora.variables(module, targets, matrices, training)
    return variables


def problem(
    lmm: LMM,
    targets: Sequence[Target],
    groups: Sequence[Group],
    seed: int | None,
    remat: str = "none",
    facts: Mapping[str, Any] | None = None,
) -> Problem:
    """The problem of tuning a model.

    Args:
        lmm: the base model.
        targets: of low-rank updates; empty for none.
        groups: over all leaves ``lora/...`` and ``params/...``.
        seed: of the low-rank updates' first values; None: shapes alone, of a model of shapes (:mod:`sav_jax.plan`).
        remat: see :class:`~sav_jax.train.optimizer.Optimization`.
        facts: see :class:`~sav_jax.train.loop.Problem`; where kernels train, how they lie is added.

    Raises:
        UserError: a target or group matches nothing, or a leaf is in no group.
    """
    params = traverse_util.flatten_dict(lmm.params, sep="/")
    matrices: Mapping[str, Any] = {}
    if targets and seed is None:
        shapes = lora.shapes(lmm.module, targets)
        matrices = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    elif targets and seed is not None:
        matrices = lora.init(lmm.module, targets, seed)
    leaves = {f"lora/{path}": value for path, value in matrices.items()}
    leaves |= {f"params/{path}": value for path, value in params.items()}
    chosen = trainable_groups(leaves, groups)
    trained = {path.removeprefix("params/") for path in chosen if path.startswith("params/")}
    if facts is not None and any(path.endswith("/kernel") for path in trained):
        facts = {**facts, "kernels": "outputs first"}
    shardings = None
    if lmm.mesh is not None:
        of = parameter_sharding(lmm.mesh)
        shardings = {
            path: of(path.removeprefix("params/"), leaves[path].shape)
            if path.startswith("params/")
            else lora.sharding(lmm.module, lmm.mesh, of, path.removeprefix("lora/"), leaves[path].shape)
            for path in chosen
        }
    return Problem(
        loss=supervised_loss(rematerialized(lmm.module, remat), tuple(targets)),
        initial={path: leaves[path] for path in chosen},
        groups=chosen,
        frozen={path: value for path, value in params.items() if path not in trained},
        mesh=lmm.mesh,
        shardings=shardings,
        facts=facts,
    )


def tuned(lmm: LMM, targets: Sequence[Target], trainable: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters of the tuned model, updates merged in."""
    flat = traverse_util.flatten_dict(lmm.params, sep="/")
    for path, value in trainable.items():
        if path.startswith("params/"):
            name = path.removeprefix("params/")
            flat[name] = value.astype(flat[name].dtype)
    params = traverse_util.unflatten_dict(flat, sep="/")
    matrices = {p.removeprefix("lora/"): v for p, v in trainable.items() if p.startswith("lora/")}
    return lora.merged(lmm.module, params, targets, matrices) if targets else params
