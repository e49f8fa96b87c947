"""The recipe of the bundled model's training, and the optimiser it asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import optax
from flax import traverse_util
from optax.contrib import MuonDimensionNumbers, muon

Params = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """What decides the trained weights.

    Attributes:
        label_steps, label_batch_size: stage 1.
        question_steps, question_batch_size: stage 2; a batch has two questions per image.
        muon_rate, adam_rate: peak learning rates of matrices and of everything else.
        newton_schulz_steps: of Muon's orthogonalisation.
        vision_share: factor on the vision tower's and the projector's rates in stage 2.
        weight_decay: of matrices, times the learning rate.
        warmup: steps of linear warm-up of each stage.
        decay: share of each stage over which the rates fall linearly to a hundredth of the peak.
        seed: of the initial weights. The drawn world has its own, fixed seeds.
        checkpoint_every, evaluate_every: steps.
        evaluation_size: held-out scenes per kind while training; the final evaluation takes ``final_evaluation_size``.
        vision, text: sizes that differ from the bundled model's, for tests.
    """

    label_steps: int = 5000
    label_batch_size: int = 64
    question_steps: int = 2400
    question_batch_size: int = 32
    muon_rate: float = 0.012
    adam_rate: float = 1e-3
    newton_schulz_steps: int = 5
    vision_share: float = 0.2
    weight_decay: float = 0.01
    warmup: int = 50
    decay: float = 1.0
    seed: int = 0
    checkpoint_every: int = 250
    evaluate_every: int = 500
    evaluation_size: int = 256
    final_evaluation_size: int = 1000
    vision: tuple[tuple[str, int], ...] = ()
    text: tuple[tuple[str, int], ...] = ()

    def steps(self, stage: int) -> int:
        """Steps of stage 1 or 2."""
        return self.label_steps if stage == 1 else self.question_steps


PRESETS: dict[str, Recipe] = {
    "tiny": Recipe(),
    "debug": Recipe(
        label_steps=24,
        label_batch_size=16,
        question_steps=5,
        question_batch_size=8,
        newton_schulz_steps=1,  # compiles several times faster
        warmup=2,
        checkpoint_every=4,
        evaluate_every=12,
        evaluation_size=16,
        final_evaluation_size=16,
        vision=(("hidden_size", 40), ("intermediate_size", 80), ("num_hidden_layers", 2)),
        text=(("hidden_size", 64), ("intermediate_size", 64), ("num_hidden_layers", 2)),
    ),
}


def muon_axes(params: Params) -> Params:
    """For every parameter which of its axes are a matrix's inputs and outputs; None for what Muon leaves to AdamW.

    A leading layer axis is neither: each layer's matrix is orthogonalised on its own. Attention's head axes are one
    axis of the matrix.
    """

    def axes(path: tuple[str, ...], value: jax.Array) -> MuonDimensionNumbers | None:
        if path[-1] != "kernel":
            return None
        first = 1 if "layers" in path else 0
        inputs = 2 if path[-2] in ("o_proj", "out_proj") else 1
        return MuonDimensionNumbers(tuple(range(first, first + inputs)), tuple(range(first + inputs, value.ndim)))

    return traverse_util.unflatten_dict({p: axes(p, v) for p, v in traverse_util.flatten_dict(params).items()})


def updated(
    transform: optax.GradientTransformation, params: Params, state: Any, gradients: Params
) -> tuple[Params, Any]:
    """Parameters and optimiser state after a step."""
    # Optax's Muon mixes dtypes and ranks inside and would fail under JAX's strict settings, which our code keeps to.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates, state = transform.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


def optimizer(recipe: Recipe, stage: int) -> optax.GradientTransformation:
    """Muon and AdamW with one shape of schedule: warm-up, constant, linear decay."""

    steps = recipe.steps(stage)

    def schedule(peak: float) -> optax.Schedule:
        falling = max(round((steps - recipe.warmup) * recipe.decay), 1)
        level = steps - recipe.warmup - falling
        return optax.join_schedules(
            [
                optax.linear_schedule(peak / max(recipe.warmup, 1), peak, recipe.warmup),
                optax.constant_schedule(peak),
                optax.linear_schedule(peak, peak / 100, falling),
            ],
            [recipe.warmup, recipe.warmup + level],
        )

    def is_vision(params: Params) -> Params:
        flat = traverse_util.flatten_dict(params)
        return traverse_util.unflatten_dict({path: path[0] != "language_model" for path in flat})

    parts = [
        optax.clip_by_global_norm(1.0),
        muon(
            schedule(recipe.muon_rate),
            adam_learning_rate=schedule(recipe.adam_rate),
            ns_steps=recipe.newton_schulz_steps,
            adam_b2=0.99,
            weight_decay=recipe.weight_decay,
            muon_weight_dimension_numbers=muon_axes,
        ),
    ]
    if stage == 2:
        parts.append(optax.masked(optax.scale(recipe.vision_share), is_vision))
    return optax.chain(*parts)
