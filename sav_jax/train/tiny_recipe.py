"""The recipe of the bundled models' training, and the optimiser it asks for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from optax.contrib import MuonDimensionNumbers, muon

Params = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """One part of the training.

    Attributes:
        name: "seeing" (tower, projector and word embeddings learn to classify single things), "answering" (all learn to
            answer several questions about an image) or "instructions" (the same, with the mix that the model is to end
            with).
        steps: how many.
        batch_size: images of a step ("large" and "two" prompts count twice).
        first, last: learning rates at its beginning and end, as shares of the peaks; linear in between.
        buckets: sorts of prompt and how often a step has each; see ``tiny_data.BUCKETS``.
        vision_share: factor on the tower's and the projector's learning rates.
        label_weight: of the loss of the first stage, kept beside the answers'.
    """

    name: str
    steps: int
    batch_size: int
    first: float
    last: float
    buckets: tuple[tuple[str, float], ...] = ()
    vision_share: float = 1.0
    label_weight: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """What decides the trained weights.

    Attributes:
        family: of ``world.checkpoint.FAMILIES``: which layout.
        stages: in order.
        turns: questions about an image (or pair of images), as many of them as fit.
        muon_rate, adam_rate: peak learning rates of matrices and of everything else.
        newton_schulz_steps: of Muon's orthogonalisation.
        weight_decay: of matrices, times the learning rate.
        warmup: steps of linear warm-up at the beginning of each stage.
        dtype: that the loss is computed in; parameters and the optimiser stay float32.
        seed: of the initial weights. The drawn world has its own, fixed seeds.
        log_every, evaluate_every: steps.
        evaluation_size: held-out scenes per kind while training; the final evaluation takes ``final_evaluation_size``.
        vision, text: sizes that differ from the bundled model's, for tests.
    """

    family: str
    stages: tuple[Stage, ...]
    turns: int = 4
    muon_rate: float = 0.015
    adam_rate: float = 1.5e-3
    newton_schulz_steps: int = 5
    weight_decay: float = 0.01
    warmup: int = 50
    dtype: str = "float32"
    seed: int = 0
    log_every: int = 100
    evaluate_every: int = 500
    evaluation_size: int = 64
    final_evaluation_size: int = 500
    vision: tuple[tuple[str, int], ...] = ()
    text: tuple[tuple[str, Any], ...] = ()

    @property
    def steps(self) -> int:
        """Of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def images(self) -> int:
        """Images that all stages draw, nearly."""
        return sum(stage.steps * stage.batch_size for stage in self.stages)

    def place(self, step: int) -> tuple[Stage, int]:
        """The stage of a step (counted over all stages) and its number within it.

        Raises:
            ValueError: behind the last.
        """
        for stage in self.stages:
            if step < stage.steps:
                return stage, step
            step -= stage.steps
        raise ValueError("a step behind the last")

    def rate(self, step: int) -> float:
        """The learning rate of a step as a share of the peak."""
        stage, at = self.place(step)
        warm = min((at + 1) / self.warmup, 1.0) if self.warmup else 1.0
        return warm * (stage.first + (stage.last - stage.first) * at / max(stage.steps, 1))

    def scaled(self, factor: float) -> Recipe:
        """The same with ``factor`` times as many steps in every stage."""
        stages = tuple(replace(stage, steps=max(round(stage.steps * factor), 1)) for stage in self.stages)
        return replace(self, stages=stages)


def _stages(several: float) -> tuple[Stage, ...]:
    """Three stages; ``several`` is the share of prompts with two images in the last."""
    return (
        Stage("seeing", 2200, 512, 1.0, 0.3),
        Stage("answering", 3000, 256, 1.0, 0.5, (("square", 0.94), ("large", 0.06)), 0.4, 0.2),
        Stage(
            "instructions",
            4000,
            256,
            0.6,
            0.01,
            (("square", 0.9 - several), ("large", 0.1), ("two", several)),
            0.4,
            0.1,
        ),
    )


_DEBUG = Recipe(
    family="tiny",
    stages=(
        Stage("seeing", 8, 16, 1.0, 0.5),
        Stage("answering", 3, 8, 1.0, 0.5, (("square", 1.0),), 0.4, 0.2),
        Stage("instructions", 3, 8, 0.5, 0.1, (("square", 0.5), ("two", 0.5)), 0.4, 0.1),
    ),
    newton_schulz_steps=1,  # compiles several times faster
    warmup=2,
    log_every=4,
    evaluate_every=7,
    evaluation_size=4,
    final_evaluation_size=8,
    vision=(("hidden_size", 40), ("intermediate_size", 80), ("num_hidden_layers", 2), ("num_attention_heads", 5)),
    text=(("hidden_size", 64), ("intermediate_size", 64), ("num_hidden_layers", 2)),
)

PRESETS: dict[str, Recipe] = {
    "tiny": Recipe(family="tiny", stages=_stages(several=0.25)),
    # A model of single images: prompts with several are what it has never seen.
    "tiny-qwen": Recipe(family="tiny-qwen", stages=_stages(several=0.0)),
    "debug": _DEBUG,
    "debug-qwen": replace(
        _DEBUG,
        family="tiny-qwen",
        vision=(("embed_dim", 32), ("depth", 2), ("hidden_size", 64)),
        text=(
            *_DEBUG.text,
            ("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}),
        ),
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
        # Outputs first; attention's output projection has two axes of inputs, heads and their width.
        first = 1 if "layers" in path else 0
        inputs = 2 if path[-2] in ("o_proj", "out_proj") else 1
        return MuonDimensionNumbers(
            tuple(range(value.ndim - inputs, value.ndim)), tuple(range(first, value.ndim - inputs))
        )

    return traverse_util.unflatten_dict({p: axes(p, v) for p, v in traverse_util.flatten_dict(params).items()})


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Muon for matrices and AdamW for the rest, at their peak rates: :func:`updated` scales what comes out."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            recipe.muon_rate,
            adam_learning_rate=recipe.adam_rate,
            ns_steps=recipe.newton_schulz_steps,
            adam_b2=0.99,
            weight_decay=recipe.weight_decay,
            muon_weight_dimension_numbers=muon_axes,
        ),
    )


def factors(recipe: Recipe, step: int) -> tuple[float, float, float]:
    """What a step's updates are multiplied by: the tower's and projector's, the word embeddings', the decoder's."""
    stage, _ = recipe.place(step)
    rate = recipe.rate(step)
    return rate * stage.vision_share, rate, 0.0 if stage.name == "seeing" else rate


def updated(
    transform: optax.GradientTransformation, params: Params, state: Any, gradients: Params, scale: jax.Array
) -> tuple[Params, Any, jax.Array]:
    """Parameters and optimiser state after a step.

    Args:
        transform: of :func:`optimizer`.
        params, state, gradients: before the step.
        scale: float32 ``[3]`` of :func:`factors`.

    Returns:
        The same two as they were if a gradient is not finite; and whether all are.
    """
    finite = jnp.isfinite(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradients)))
    # Optax's Muon mixes dtypes and ranks inside and would fail under JAX's strict settings, which our code keeps to.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates, new_state = transform.update(gradients, state, params)

    def share(path: tuple[str, ...]) -> int:
        if path[0] != "language_model":
            return 0
        return 1 if path[-1] == "embed_tokens" else 2

    flat = traverse_util.flatten_dict(updates)
    updates = traverse_util.unflatten_dict({path: value * scale[share(path)] for path, value in flat.items()})
    new = optax.apply_updates(params, updates), new_state
    kept = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, (params, state))
    return (*kept, finite)
