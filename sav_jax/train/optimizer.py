"""What is trained, how fast, and by which optimiser."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optax

from sav_jax.errors import UserError


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
        for name in ("steps", "batch_size", "micro_batches", "checkpoint_every", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.batch_size % self.micro_batches:
            raise UserError(f"batch_size {self.batch_size} cannot be cut into {self.micro_batches} micro-batches")
        if not 0 <= self.warmup < 1:
            raise UserError(f"warmup must be at least 0 and below 1, not {self.warmup}")


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


def make_optimizer(settings: Optimization, groups: Mapping[str, Group]) -> optax.GradientTransformation:
    """Clipping over all leaves, then AdamW at each group's rate.

    Args:
        settings: the schedule.
        groups: path -> group, of the leaves that train.
    """
    warmup = round(settings.steps * settings.warmup)

    def adamw(group: Group) -> optax.GradientTransformation:
        # The first step moves already: at rate 1 / warmup of the peak.
        rising = optax.linear_schedule(group.learning_rate / max(warmup, 1), group.learning_rate, max(warmup - 1, 0))
        falling = optax.cosine_decay_schedule(group.learning_rate, max(settings.steps - warmup, 1))
        schedule = optax.join_schedules([rising, falling], [warmup]) if warmup else falling
        return optax.adamw(
            schedule, settings.beta1, settings.beta2, settings.epsilon, weight_decay=group.weight_decay
        )

    names = {group: str(i) for i, group in enumerate(dict.fromkeys(groups.values()))}
    parts = [optax.multi_transform({name: adamw(group) for group, name in names.items()}, label_tree(groups, names))]
    if settings.clip:
        parts.insert(0, optax.clip_by_global_norm(settings.clip))
    return optax.chain(*parts)


def label_tree(groups: Mapping[str, Group], names: Mapping[Group, str]) -> dict[str, Any]:
    """Path -> the name of its group."""
    return {path: names[group] for path, group in groups.items()}
