"""The bundled checkpoint without its weights: tokenizer, chat template, processor and model configuration."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sav_jax.world.questions import ANSWERS, ask
from sav_jax.world.scene import sample_scene

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCAB_SIZE = 640
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")

#: How text is cut before merging: as Qwen2 does, so that every digit is a token of its own.
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

#: LLaVA-OneVision's template: within a message the images first, then the text. Unlike the original, an assistant's
#: message in the history has no space between the role and the newline, so that a transcript reads as the generation
#: prompt continues it.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] }}"
    "{% if message['role'] != 'assistant' %}{{ ' ' }}{% endif %}"
    "{% if message['content'] is string %}{{ '\\n' + message['content'] }}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\\n' + content['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

PINPOINTS = [[32, 32], [32, 64], [64, 32], [64, 64]]
IMAGE_SIZE, PATCH_SIZE = 32, 8


def _corpus(scenes: int = 4000) -> Iterator[str]:
    """The world's own text; answers and role names often enough to become single tokens."""
    for seed in range(scenes):
        kind = ("scan", "glyph", "shape", "pair", "group")[seed % 5]
        for qa in ask(sample_scene(seed, kind), seed, 4):
            yield qa.question
            yield qa.answer
    for _ in range(scenes // 10):
        yield from ANSWERS
        yield from (f" {answer}" for answer in ANSWERS)
        yield from (
            "user",
            "assistant",
            "system",
            "digit",
            "number",
            " number",
            " image",
            "image",
            "picture",
            " picture",
            " photo",
        )
    yield from (
        "the quick brown fox jumps over the lazy dog. who, when and why? this image shows an example of a class.",
    ) * 20


def build_tokenizer() -> Tokenizer:
    """Trains the byte-level BPE tokenizer on the world's text; always the same."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    return tokenizer


def model_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """The ``config.json`` of the bundled model."""
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "image_token_index": ids["<image>"],
        "video_token_index": ids["<video>"],
        "image_grid_pinpoints": PINPOINTS,
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": True,
        "vision_aspect_ratio": "anyres_max_4",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "dtype": "bfloat16",
        "vision_config": {
            "model_type": "siglip_vision_model",
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
            "num_channels": 3,
            "hidden_size": 160,
            "intermediate_size": 640,
            "num_hidden_layers": 6,
            "num_attention_heads": 5,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
            "attention_dropout": 0.0,
            "vision_use_head": False,
        },
        "text_config": {
            "model_type": "qwen2",
            "vocab_size": tokenizer.get_vocab_size(),
            "hidden_size": 160,
            "intermediate_size": 448,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "hidden_act": "silu",
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "attention_dropout": 0.0,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
    }


def write_skeleton(directory: Path) -> dict[str, Any]:
    """Writes all files but the weights and ``config.json``, which is returned (saving the weights writes it)."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    config = model_config(tokenizer)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    tokens = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None}
    files: dict[str, dict[str, Any]] = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "LlavaOnevisionProcessor",
            "model_max_length": 4096,
            "clean_up_tokenization_spaces": False,
            "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
            "image_token": "<image>",
            "video_token": "<video>",
            **tokens,
        },
        "special_tokens_map.json": {k: v for k, v in tokens.items() if v},
        "generation_config.json": {
            "bos_token_id": config["text_config"]["bos_token_id"],
            "eos_token_id": config["text_config"]["eos_token_id"],
            "pad_token_id": config["text_config"]["pad_token_id"],
        },
        "preprocessor_config.json": {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "processor_class": "LlavaOnevisionProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            "resample": 3,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "do_pad": True,
            "image_grid_pinpoints": PINPOINTS,
        },
        "processor_config.json": {
            "processor_class": "LlavaOnevisionProcessor",
            "num_image_tokens": (IMAGE_SIZE // PATCH_SIZE) ** 2,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_4",
            "image_token": "<image>",
            "video_token": "<video>",
        },
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return config
