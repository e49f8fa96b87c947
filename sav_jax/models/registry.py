"""From a ``config.json`` to the code that runs it: one row per model family."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flax import linen as nn

from sav_jax.errors import UserError
from sav_jax.models import llava_onevision
from sav_jax.models.weights import Table


@dataclass(frozen=True)
class Architecture:
    """A model family at the sizes of one checkpoint.

    Attributes:
        model_type: ``model_type`` of ``config.json``.
        config: the family's frozen config.
        module: the Linen module; all families share one call signature (``models/llava_onevision.py``).
        table: its checkpoint layout.
        heads_path: where its heads stand in the ``intermediates`` collection.
    """

    model_type: str
    config: Any
    module: nn.Module
    table: Table
    heads_path: tuple[str, ...]


def _llava_onevision(config: Mapping[str, Any]) -> Architecture:
    parsed = llava_onevision.LlavaOnevisionConfig.from_hf(config)
    return Architecture(
        model_type="llava_onevision",
        config=parsed,
        module=llava_onevision.LlavaOnevision(parsed),
        table=llava_onevision.checkpoint_table(parsed),
        heads_path=llava_onevision.HEADS_PATH,
    )


FAMILIES: dict[str, Callable[[Mapping[str, Any]], Architecture]] = {"llava_onevision": _llava_onevision}


def read_config(directory: Path) -> dict[str, Any]:
    """The raw ``config.json`` of a checkpoint directory.

    Raises:
        UserError: missing or not a JSON object.
    """
    file = directory / "config.json"
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{directory}: no config.json in it; a model is a directory in Hugging Face layout") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: unreadable ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{file}: not a JSON object")
    return config


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with every field its Hugging Face class would default, in today's spelling (old hub files leave most
    out).
    """
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    try:
        return CONFIG_MAPPING[model_type](**{k: v for k, v in config.items() if k != "model_type"}).to_dict()
    except Exception as error:  # transformers validates strictly and with many exception types
        raise UserError(f"config.json: not a valid {model_type} config: {' '.join(str(error).split())}") from None


def architecture(config: Mapping[str, Any], num_layers: int | None = None) -> Architecture:
    """Build the architecture of a raw ``config.json``.

    Args:
        config: as read by :func:`read_config`.
        num_layers: keep only the first so many decoder layers.

    Raises:
        UserError: unknown ``model_type``, an unsupported option, or ``num_layers`` out of range.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise UserError(f"config.json: model_type {model_type!r} is not known (known: {', '.join(sorted(FAMILIES))})")
    full = with_defaults(config)
    if num_layers is not None:
        depth = full["text_config"]["num_hidden_layers"]
        if not 1 <= num_layers <= depth:
            raise UserError(f"num_layers {num_layers} is out of range: the model has {depth} layers")
        full["text_config"]["num_hidden_layers"] = num_layers
    return FAMILIES[model_type](full)
