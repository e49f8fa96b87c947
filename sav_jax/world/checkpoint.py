"""The bundled checkpoints without their weights: tokenizer, chat template, processor and model configuration.

There are two, trained alike: ``tiny`` in the layout of LLaVA-OneVision and ``tiny-qwen`` in that of Qwen2-VL.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sav_jax.world.questions import ANSWERS, ask, captions
from sav_jax.world.scene import KINDS, sample_scene
from sav_jax.world.several import ask_several, sample_images

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCAB_SIZE = 960
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
#: Qwen2-VL's names: its images and videos stand between two further tokens.
QWEN_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
FAMILIES = ("tiny", "tiny-qwen")
#: What :func:`write_skeleton` writes (the last one for LLaVA's layout only).
SKELETON_FILES = (
    "tokenizer.json", "chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json",
    "generation_config.json", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip

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
#: Qwen2-VL's, without its default system message: images and text in the order of the message.
QWEN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif content['type'] == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

PINPOINTS = [[32, 32], [32, 64], [64, 32], [64, 64]]
IMAGE_SIZE, PATCH_SIZE = 32, 8
#: Qwen2-VL layout: patches of 4 pixels, merged by 2 x 2 into a token; images of 16 to 144 tokens.
QWEN_PATCH, MIN_PIXELS, MAX_PIXELS = 4, 32 * 32, 96 * 96


def _corpus(scenes: int = 4000) -> Iterator[str]:
    """The world's own text; answers and role names often enough to become single tokens."""
    for seed in range(scenes):
        scene = sample_scene(seed, KINDS[seed % len(KINDS)])
        for qa in ask(scene, seed, 4):
            yield qa.question
            yield qa.answer
        if seed % 10 == 0:
            for qa in ask_several(sample_images(seed), seed, 3):
                yield qa.question
        if scene.kind in ("glyph", "shape", "pair"):
            yield captions(scene)[0]
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


def build_tokenizer(special_tokens: tuple[str, ...] = SPECIAL_TOKENS) -> Tokenizer:
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
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special_tokens],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    return tokenizer


def _text_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Sizes of the decoder, the same in both: 12 layers of 8 heads."""
    return {
        "model_type": "qwen2",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 192,
        "intermediate_size": 384,
        "num_hidden_layers": 12,
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
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
    }


def _llava_config(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "image_token_index": tokenizer.token_to_id("<image>"),
        "video_token_index": tokenizer.token_to_id("<video>"),
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
            "hidden_size": 144,
            "intermediate_size": 576,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
            "attention_dropout": 0.0,
            "vision_use_head": False,
        },
        "text_config": _text_config(tokenizer),
    }


def _qwen_config(tokenizer: Tokenizer) -> dict[str, Any]:
    text = _text_config(tokenizer)
    # Half a head of 24 has twelve wavelengths, shared out in Qwen2-VL's proportions.
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 4, 4]}
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "image_token_id": tokenizer.token_to_id("<|image_pad|>"),
        "video_token_id": tokenizer.token_to_id("<|video_pad|>"),
        "vision_start_token_id": tokenizer.token_to_id("<|vision_start|>"),
        "vision_end_token_id": tokenizer.token_to_id("<|vision_end|>"),
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "vision_config": {
            "model_type": "qwen2_vl",
            "depth": 6,
            "embed_dim": 128,
            "mlp_ratio": 4,
            "num_heads": 4,
            "in_channels": 3,
            "hidden_size": text["hidden_size"],
            "hidden_act": "quick_gelu",
            "patch_size": QWEN_PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "text_config": {**text, "model_type": "qwen2_vl_text", "rope_parameters": rope},
    }


def _preprocessor(family: str) -> dict[str, Any]:
    common = {
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    if family == "tiny-qwen":
        return {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2VLProcessor",
            **common,
            "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
            "patch_size": QWEN_PATCH,
            "temporal_patch_size": 2,
            "merge_size": 2,
        }
    return {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "processor_class": "LlavaOnevisionProcessor",
        **common,
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "do_pad": True,
        "image_grid_pinpoints": PINPOINTS,
    }


def write_skeleton(directory: Path, family: str = "tiny") -> dict[str, Any]:
    """Writes all files but the weights and ``config.json``, which is returned (saving the weights writes it).

    Args:
        directory: made if missing.
        family: of ``FAMILIES``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    qwen = family == "tiny-qwen"
    special = QWEN_TOKENS if qwen else SPECIAL_TOKENS
    tokenizer = build_tokenizer(special)
    config = (_qwen_config if qwen else _llava_config)(tokenizer)
    processor = "Qwen2VLProcessor" if qwen else "LlavaOnevisionProcessor"
    media = dict(zip(("image_token", "video_token"), special[-2:], strict=True))
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(QWEN_TEMPLATE if qwen else CHAT_TEMPLATE, encoding="utf-8")
    tokens = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None}
    files: dict[str, dict[str, Any]] = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": processor,
            "model_max_length": 4096,
            "clean_up_tokenization_spaces": False,
            "additional_special_tokens": list(special[1:]),
            **media,
            **tokens,
        },
        "special_tokens_map.json": {k: v for k, v in tokens.items() if v},
        "generation_config.json": {
            "bos_token_id": config["text_config"]["bos_token_id"],
            "eos_token_id": config["text_config"]["eos_token_id"],
            "pad_token_id": config["text_config"]["pad_token_id"],
        },
        "preprocessor_config.json": _preprocessor(family),
    }
    if not qwen:
        files["processor_config.json"] = {
            "processor_class": processor,
            "num_image_tokens": (IMAGE_SIZE // PATCH_SIZE) ** 2,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_4",
            **media,
        }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return config
