"""What is trained, how fast, and by which optimiser."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from sav_jax.errors import UserError

REMAT = ("none", "dots", "full")


def check(settings: Any, names: Iterable[str], wanted: str, holds: Callable[[Any], bool]) -> None:
    """Raise a UserError unless each of these fields is a finite number that is as wanted."""
    for name in names:
        value = getattr(settings, name)
        if not (math.isfinite(value) and holds(value)):
            raise UserError(f"{name} must be {wanted}, not {value}")


def check_name(what: str, name: str, known: Sequence[str]) -> None:
    """Raise a UserError unless a name is known."""
    if name not in known:
        raise UserError(f"{what} {name!r} is not known (known: {', '.join(known)})")


@dataclass(frozen=True)
class Group:
    """Leaves that are trained alike.

    Attributes:
        pattern: of their paths (``re.fullmatch``), for example ``"lora/language_model/.*"`` or
            ``"params/multi_modal_projector/.*"``.
        learning_rate: its peak; 0 leaves them frozen.
        weight_decay: decoupled, times the learning rate.
    """

    pattern: str
    learning_rate: float
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Optimization:
    """AdamW with linear warm-up and cosine decay to zero.

    Attributes:
        steps: how many.
        batch_size: rows of one step, over all processes.
        micro_batches: into how many parts a batch is cut, one after the other, to save memory.
        warmup: share of the steps.
        clip: largest global norm of the gradient of all that trains; 0 leaves it.
        beta1, beta2, epsilon: of Adam.
        remat: what a layer keeps for its backward pass ("none", "dots", "full").
        seed: of order, dropout and initial values.
        checkpoint_every, keep: steps between checkpoints, and how many are kept.
        log_every: steps.
    """

    steps: int = 1000
    batch_size: int = 16
    micro_batches: int = 1
    warmup: float = 0.03
    clip: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    remat: str = "none"
    seed: int = 0
    checkpoint_every: int = 200
    keep: int = 2
    log_every: int = 10

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "micro_batches", "checkpoint_every", "keep", "log_every")
        check(self, counts, "at least 1", lambda x: x >= 1)
        check(self, ("clip", "seed"), "at least 0", lambda x: x >= 0)
        check(self, ("epsilon",), "above 0", lambda x: x > 0)
        check(self, ("warmup", "beta1", "beta2"), "at least 0 and below 1", lambda x: 0 <= x < 1)
        check_name("remat", self.remat, REMAT)
        if self.batch_size % self.micro_batches:
            raise UserError(f"batch_size {self.batch_size} cannot be cut into {self.micro_batches} micro-batches")


def trainable_groups(paths: Iterable[str], groups: Sequence[Group]) -> dict[str, Group]:
    """The group of every leaf that trains; the first that matches counts.

    Raises:
        UserError: a leaf belongs to no group, or a group has no leaves; names them.
    """
    paths = list(paths)
    chosen = {}
    for path in paths:
        found = next((group for group in groups if re.fullmatch(group.pattern, path)), None)
        if found is not None:
            chosen[path] = found
    uncovered = sorted(set(paths) - set(chosen))
    if uncovered:
        shown = ", ".join(uncovered[:5]) + (f" and {len(uncovered) - 5} more" if len(uncovered) > 5 else "")
        raise UserError(f"no learning rate is given for {shown} (a group with rate 0 leaves parameters frozen)")
    for group in groups:
        if group.learning_rate and group not in chosen.values():
            raise UserError(f"{group.pattern!r} matches nothing that could be trained")
    return {path: group for path, group in chosen.items() if group.learning_rate}


@struct.dataclass
class Pace:
    """How fast everything is trained: arrays, so that runs with other rates, lengths and seeds share a compiled step.

    Attributes:
        key: of dropout; each step folds its number in.
        steps, warmup: int32, of the whole run and of its linear warm-up.
        rates, decays: path -> float32 peak learning rate and weight decay.
    """

    key: Any
    steps: Any
    warmup: Any
    rates: dict[str, Any]
    decays: dict[str, Any]

    @classmethod
    def of(cls, settings: Optimization, groups: Mapping[str, Group]) -> Pace:
        """Of the leaves that train, by path."""
        return cls(
            key=jax.random.key_data(jax.random.key(settings.seed)),
            steps=np.int32(settings.steps),
            warmup=np.int32(round(settings.steps * settings.warmup)),
            rates={path: np.float32(group.learning_rate) for path, group in groups.items()},
            decays={path: np.float32(group.weight_decay) for path, group in groups.items()},
        )

    def factor(self, step: jax.Array) -> jax.Array:
        """Share of the peak rate at a step counted from 0: rising to 1 over the warm-up, then half a cosine to 0."""
        done = step.astype(jnp.float32)
        warmup = jnp.asarray(self.warmup).astype(jnp.float32)
        rest = jnp.maximum(jnp.asarray(self.steps).astype(jnp.float32) - warmup, 1.0)
        falling = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip((done - warmup) / rest, 0.0, 1.0)))
        return jnp.where(done < warmup, (done + 1) / jnp.maximum(warmup, 1.0), falling)


def preconditioner(settings: Optimization) -> optax.GradientTransformation:
    """Clipping over all leaves together, then Adam; rates and decay are applied by :func:`updated`."""
    parts = [optax.scale_by_adam(settings.beta1, settings.beta2, settings.epsilon)]
    if settings.clip:
        parts.insert(0, optax.clip_by_global_norm(settings.clip))
    return optax.chain(*parts)


def updated(
    transform: optax.GradientTransformation,
    pace: Pace,
    step: jax.Array,
    trainable: Mapping[str, jax.Array],
    state: Any,
    gradients: Mapping[str, jax.Array],
) -> tuple[dict[str, jax.Array], Any]:
    """Leaves and optimiser state after a step of AdamW (arXiv 1711.05101)."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax relies on it
        directions, state = transform.update(dict(gradients), state, dict(trainable))
    factor = pace.factor(step)
    moved = {
        path: value - factor * pace.rates[path] * (directions[path] + pace.decays[path] * value)
        for path, value in trainable.items()
    }
    return moved, state
