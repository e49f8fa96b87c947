"""From a ``config.json`` to the code that runs it: one row per model family."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sav_jax.errors import UserError
from sav_jax.models import llava, llava_release, qwen1_processor, qwen1_vl, qwen_vl
from sav_jax.models.llava_processor import LlavaProcessor
from sav_jax.models.multimodal import HEADS_PATH, MultimodalModel
from sav_jax.models.processor import NamedImageProcessor, Processor
from sav_jax.models.quiet import quiet_transformers
from sav_jax.models.qwen_processor import QwenVLProcessor
from sav_jax.models.weights import Table


@dataclass(frozen=True)
class Architecture:
    """A model family at the sizes of one checkpoint.

    Attributes:
        model_type: ``model_type`` of ``config.json``.
        config: the family's frozen config.
        module: the Linen module; all families share one call signature (``models/multimodal.py``).
        table: its checkpoint layout.
        processor: its processor class.
        image_processor_class: gives transformers' PIL image processor class (imported late: it is heavy).
        load_tokenizer: makes the tokenizer of a directory in families that transformers has none for.
        video_defaults: settings for frames of videos, where no file says otherwise and images have others; None in
            families that read no videos.
        heads_path: where its heads stand in the ``intermediates`` collection.
    """

    model_type: str
    config: Any
    module: MultimodalModel
    table: Table
    processor: type[Processor]
    image_processor_class: Callable[[], Any]
    load_tokenizer: Callable[[Path], Any] | None = None
    video_defaults: Mapping[str, Any] | None = None
    heads_path: tuple[str, ...] = HEADS_PATH


def _llava(config: Mapping[str, Any]) -> Architecture:
    def image_processor_class() -> Any:
        if config["model_type"] == "llava_onevision":
            from transformers.models.llava_onevision import image_processing_pil_llava_onevision as onevision

            return onevision.LlavaOnevisionImageProcessorPil
        if config["model_type"] == "llava_next":
            from transformers.models.llava_next import image_processing_pil_llava_next as next_

            return next_.LlavaNextImageProcessorPil
        # LLaVA-1.5 leaves it to the checkpoint: CLIP's, SigLIP's, or LLaVA's own, which can pad to a square.
        return NamedImageProcessor

    parsed = llava.LlavaConfig.from_hf(config)
    return Architecture(
        model_type=config["model_type"],
        config=parsed,
        module=llava.Llava(parsed),
        table=llava.checkpoint_table(parsed),
        processor=LlavaProcessor,
        image_processor_class=image_processor_class,
        video_defaults={} if parsed.video_token_id is not None else None,
    )


def _qwen_vl(config: Mapping[str, Any]) -> Architecture:
    def image_processor_class() -> Any:
        # One for all of them; they differ by its settings.
        from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as module

        return module.Qwen2VLImageProcessorPil

    parsed = qwen_vl.QwenVLConfig.from_hf(config)
    return Architecture(
        model_type=config["model_type"],
        config=parsed,
        module=qwen_vl.QwenVL(parsed),
        table=qwen_vl.checkpoint_table(parsed),
        processor=QwenVLProcessor,
        image_processor_class=image_processor_class,
        video_defaults=qwen_vl.VIDEO_DEFAULTS[config["model_type"]],
    )


def _qwen1_vl(config: Mapping[str, Any]) -> Architecture:
    parsed = qwen1_vl.Qwen1VLConfig.from_hf(config)
    return Architecture(
        model_type=config["model_type"],
        config=parsed,
        module=qwen1_vl.Qwen1VL(parsed),
        table=qwen1_vl.checkpoint_table(parsed),
        processor=qwen1_processor.Qwen1VLProcessor,
        image_processor_class=lambda: qwen1_processor.SquareImages,
        load_tokenizer=qwen1_processor.load_tokenizer,
    )


FAMILIES: dict[str, Callable[[Mapping[str, Any]], Architecture]] = {
    "llava": _llava,
    "llava_next": _llava,
    "llava_onevision": _llava,
    "qwen": _qwen1_vl,
    "qwen2_vl": _qwen_vl,
    "qwen2_5_vl": _qwen_vl,
    "qwen3_vl": _qwen_vl,
}


def read_config(directory: Path) -> dict[str, Any]:
    """The raw ``config.json`` of a checkpoint directory, or that file itself; that of LLaVA's own releases is rewritten
    to Hugging Face's layout.

    Raises:
        UserError: missing or not a JSON object.
    """
    file = directory if directory.is_file() else directory / "config.json"
    directory = file.parent
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{directory}: no config.json in it; a model is a directory in Hugging Face layout") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: unreadable ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{file}: not a JSON object")
    return llava_release.as_hugging_face(config, directory) if llava_release.is_release(config) else config


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with every field its Hugging Face class would default, in today's spelling (old hub files leave most
    out).
    """
    model_type = config.get("model_type")
    if model_type == "qwen":
        return qwen1_vl.with_defaults(config)  # transformers has no class for it
    with quiet_transformers():  # it warns of its own defaults (SigLIP's)
        from transformers import CONFIG_MAPPING

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
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        hint = "; this is a dual encoder: load_dual_encoder, --clip or --siglip" * (model_type in ("clip", "siglip"))
        raise UserError(
            f"config.json: model_type {model_type!r} is not known (known: {', '.join(sorted(FAMILIES))}){hint}"
        )
    for part in ("text_config", "vision_config"):
        if part in config and not isinstance(config[part], Mapping):
            raise UserError(f"config.json: {part} is not an object")
    full = with_defaults(config)
    if num_layers is not None:
        depth = full["text_config"]["num_hidden_layers"]
        if not 1 <= num_layers <= depth:
            raise UserError(f"num_layers {num_layers} is out of range: the model has {depth} layers")
        full["text_config"]["num_hidden_layers"] = num_layers
    with impossible_values(model_type):
        return FAMILIES[model_type](full)


@contextlib.contextmanager
def impossible_values(model_type: str) -> Iterator[None]:
    """While a config is read: what Python has to say of a size that is no number, or zero, becomes a UserError."""
    try:
        yield
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"config.json: a {model_type} with an impossible or missing value ({reason})") from error
