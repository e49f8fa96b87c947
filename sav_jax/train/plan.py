"""A step of training, compiled for a pod that is not there (:mod:`sav_jax.plan`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from sav_jax.batching import round_tokens
from sav_jax.plan import Report, abstract_batch, abstract_lmm, on_every_chip, plan, topology_devices
from sav_jax.sharding import batch_sharding, mesh_of
from sav_jax.train import loop, supervised
from sav_jax.train.data import LessonBatch
from sav_jax.train.optimizer import Pace
from sav_jax.train.recipes import Recipe


def plan_training(
    model: str | Path,
    topology: str,
    mesh: str,
    recipe: Recipe,
    max_tokens: int | None = None,
    image_rows: int = 1,
) -> Report:
    """Compile one step of a recipe, at its longest: every conversation has ``max_tokens`` tokens, each of them learned.

    Args:
        model: a ``config.json``, a folder that has one, or a bundled model.
        topology: such as ``v5e:4x4``.
        mesh: such as ``data=4,model=4``.
        recipe: what trains, rows of a step, micro-batches and remat.
        max_tokens: of a conversation; by default the recipe's, or 2,048.
        image_rows: rows of pixels of a conversation: tiles (LLaVA), patches (Qwen); 0 for text alone.

    Raises:
        UserError: bad input, or a batch that the mesh cannot share.
    """
    settings = recipe.optimization
    placed = mesh_of(topology_devices(topology), mesh)
    loop.check_batch(settings, placed)
    lmm = abstract_lmm(model, placed)
    problem = supervised.problem(lmm, recipe.targets, recipe.groups, None, settings.remat)
    transform = loop.transform_of(settings)
    state = loop.abstract_state(problem, transform)
    rows, tokens = settings.batch_size, round_tokens(max_tokens or recipe.max_tokens or 2048)
    split = batch_sharding(placed)
    targets: Any = jax.ShapeDtypeStruct((rows, tokens), np.int32, sharding=split)
    weights: Any = jax.ShapeDtypeStruct((rows, tokens), np.float32, sharding=split)
    batch = LessonBatch(
        abstract_batch(lmm.module, placed, rows, tokens, tokens, image_rows), targets=targets, weights=weights
    )
    pace = on_every_chip(Pace.of(settings, problem.groups), placed)
    micro = f" in {settings.micro_batches} parts" if settings.micro_batches > 1 else ""
    trained = sum(int(np.prod(leaf.shape)) for leaf in state.trainable.values())
    return plan(
        f"a training step of {rows} x {tokens} tokens{micro}, {trained / 1e6:,.1f} million parameters train",
        topology,
        placed,
        loop.make_step(problem.loss, transform, settings.micro_batches),
        (state, problem.frozen, batch, pace),
        lambda path: path.startswith(("[1]", "[0].trainable['params/")),
    )
