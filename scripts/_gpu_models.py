"""What ``bench_gpu.py`` measures: 7B-shaped models of random weights and prompts, for this library and transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

QUESTION = "Which of these does the picture show? Answer with the letter of the best option. A. a field B. a street"


# Checkpoints


def sizes(family: str, small: bool, layers: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Vision and text sizes of a family's 7B model; with ``layers``, both cut to so many and a smaller vocabulary."""
    text: dict[str, Any] = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    if small:
        text |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
        text |= {"num_key_value_heads": 2, "vocab_size": 512}
    if family == "onevision":
        vision: dict[str, Any] = {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 26,
            "num_attention_heads": 16,
        }
        vision |= {"image_size": 384, "patch_size": 14, "vision_use_head": False}
        if small:
            vision |= {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
            vision |= {"image_size": 32, "patch_size": 8}
    else:
        vision = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "hidden_size": text["hidden_size"]}
        if small:
            vision |= {"depth": 2, "embed_dim": 32, "num_heads": 2}
    if layers is not None:
        text |= {"num_hidden_layers": layers, "vocab_size": min(32_000, text["vocab_size"])}
        vision["num_hidden_layers" if family == "onevision" else "depth"] = min(4, layers)
    return vision, text


def write_skeleton(directory: Path, family: str, small: bool, layers: int | None = None) -> Any:
    """Everything of a checkpoint but its weights, in Hugging Face layout; returns transformers' config."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from sav_jax.models.quiet import quiet_transformers

    with quiet_transformers():
        from transformers import (
            LlavaOnevisionConfig,
            PreTrainedTokenizerFast,
            Qwen2Config,
            Qwen2VLConfig,
            SiglipVisionConfig,
        )

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>")
    special = ["<|im_start|>", "<image>", "<video>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    number = tokenizer.convert_tokens_to_ids
    mark = "<image>\n" if family == "onevision" else "<|vision_start|><image><|vision_end|>"
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + mark + "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
        "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    vision, text = sizes(family, small, layers)
    if family == "onevision":
        side = vision["image_size"]
        pinpoints = [[side * h, side * w] for h in range(1, 7) for w in range(1, 7)]
        config = LlavaOnevisionConfig(
            vision_config=SiglipVisionConfig(**vision),
            text_config=Qwen2Config(**text),
            image_token_index=number("<image>"),
            video_token_index=number("<video>"),
            image_grid_pinpoints=pinpoints,
            tie_word_embeddings=False,
        )
        images: dict[str, Any] = {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "image_grid_pinpoints": pinpoints,
        }
        images |= {"size": {"height": side, "width": side}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    else:
        half = text["hidden_size"] // text["num_attention_heads"] // 2
        sections = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]  # 16, 24, 24 of the real one
        rope = {"rope_type": "default", "rope_theta": text.pop("rope_theta"), "mrope_section": sections}
        config = Qwen2VLConfig(
            vision_config={"patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2, **vision},
            text_config={**text, "rope_parameters": rope},
            image_token_id=number("<image>"),
            video_token_id=number("<video>"),
            vision_start_token_id=number("<|vision_start|>"),
            vision_end_token_id=number("<|vision_end|>"),
            tie_word_embeddings=False,
        )
        images = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "merge_size": 2}
        images |= {"size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1600}, "temporal_patch_size": 2}
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(directory)
    config.save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(images))
    return config


def torch_model(config: Any, device: str) -> Any:
    """transformers' model in bfloat16 with random weights, made on the device; values of order one in every layer."""
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    torch.manual_seed(0)
    with torch.device(device), no_init_weights():
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=1.0 if "embed_tokens" in name else parameter[0].numel() ** -0.5)
            elif name.endswith("weight"):  # of a norm
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.1)
    return model.eval()


def shared_lmm(directory: Path, model: Any) -> Any:
    """This library's model with the very values of ``model``, stacked by layer on the device, without a file."""
    import jax
    import torch
    from flax import traverse_util

    from sav_jax.lmm import LMM
    from sav_jax.models.processor import load_processor
    from sav_jax.models.registry import architecture, read_config

    raw = read_config(directory)
    arch = architecture(raw)
    stored = {arch.table.canonical(key): value for key, value in model.state_dict().items()}
    flat = {}
    for entry in arch.table.entries:
        if entry.copy:
            continue
        parts: list[Any] = [entry.to_param(stored[key]) for key in entry.stored_keys()]  # einops takes tensors, too
        tensor = parts[0] if entry.layers is None else torch.stack(parts)
        flat[entry.target] = jax.dlpack.from_dlpack(tensor.detach().contiguous())
    jax.block_until_ready(flat)
    return LMM(
        name="random",
        architecture=arch,
        params=traverse_util.unflatten_dict(flat, sep="/"),
        processor=load_processor(directory, raw),
        fingerprint="random",
        dtype=flat["language_model/embed_tokens"].dtype,
        mesh=None,
        hf_config=raw,
        stop_token_ids=(),
    )


# Prompts


def make_examples(family: str, small: bool, count: int, seed: int = 0) -> list[Any]:
    """Prompts of one picture each, all of one size and no two alike."""
    from PIL import Image

    import sav_jax

    side = (64 if small else 768) if family == "onevision" else (84 if small else 1092)
    rng = np.random.default_rng(seed)
    coarse = [rng.integers(0, 256, (8, 8, 3), np.uint8) for _ in range(count)]
    pictures = [Image.fromarray(c).resize((side, side), Image.Resampling.BICUBIC) for c in coarse]
    return [sav_jax.Example(QUESTION, (picture,), "A") for picture in pictures]


@dataclass
class Prompts:
    """A batch for both sides: ours on the device, theirs as keyword arguments; sizes for counting."""

    batch: Any
    inputs: dict[str, Any]
    tokens: int
    rows: int


def prepare(lmm: Any, examples: Sequence[Any], device: str, dtype: Any = None) -> Prompts:
    """The same prompts as a batch of ours and as arguments of transformers' model, unpadded: all are of one length."""
    import jax
    import torch

    from sav_jax.batching import assemble, plan_batches
    from sav_jax.extract import plan_prompts

    prompts = plan_prompts(lmm, examples)
    (plan,) = plan_batches(prompts, len(examples))
    pixels = [lmm.processor.pixels(list(example.images)) for example in examples]
    batch = jax.device_put(assemble(plan, prompts, [pixels[row] for row in plan.rows]))
    ids = torch.tensor(np.stack([prompt.token_ids for prompt in prompts])).long().to(device)
    inputs: dict[str, Any] = {"input_ids": ids}
    values = torch.tensor(np.stack(pixels)).to(device, dtype or torch.bfloat16)
    if values.ndim == 5:
        inputs["pixel_values"] = values.permute(0, 1, 4, 2, 3).contiguous()
        sizes = [[picture.height, picture.width] for example in examples for picture in example.images]
        inputs["image_sizes"] = torch.tensor(sizes, device=device)
    else:
        side = int(np.sqrt(values.shape[1]))
        inputs["pixel_values"] = values.flatten(0, 1)
        inputs["image_grid_thw"] = torch.tensor([[1, side, side]] * len(examples), device=device)
        inputs["mm_token_type_ids"] = (ids == lmm.config.image_token_id).int()
    return Prompts(batch, inputs, ids.numel(), sum(len(p) for p in pixels))


def torch_heads(model: Any, inputs: dict[str, Any]) -> Any:
    """Heads [B, L, N * H] at the last token: what enters every output projection."""
    import torch

    captured: list[Any] = []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: captured.append(args[0][:, -1].clone()))
        for layer in model.model.language_model.layers
    ]
    try:
        with torch.inference_mode():
            model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(captured, dim=1)


def model_flops(lmm: Any, tokens: int, rows: int, batch: int) -> float:
    """Floating-point operations of one forward pass up to the last layer's end, without the output head.

    Args:
        lmm: the model.
        tokens: of all prompts, without padding; all prompts have equally many.
        rows: of pixels (tiles or patches) of all prompts.
        batch: prompts.
    """
    import jax

    config = lmm.config
    leaves = jax.tree_util.tree_flatten_with_path(lmm.params)[0]
    products: dict[str, int] = {}
    for path, leaf in leaves:
        names = [key.key for key in path]
        if names[-1] == "kernel" and "unread_layers" not in names and "lm_head" not in names:
            part = names[0] if "merger" not in names else "merger"
            products[part] = products.get(part, 0) + leaf.size
    text, vision = config.text, config.vision
    length = tokens / batch
    causal = 2 * length**2 * text.num_heads * text.head_dim * text.num_layers * batch
    flops = 2.0 * products.pop("language_model") * tokens + causal
    if hasattr(vision, "num_tokens"):
        each, images, depth = vision.num_tokens, rows, vision.depth
    else:
        each, images, depth = rows // batch, batch, vision.num_layers
        flops += 2.0 * products.pop("merger") * rows / vision.merge_size**2
    flops += 2.0 * sum(products.values()) * each * images  # the tower and, for tiles, the projector
    return flops + 4.0 * each**2 * vision.hidden_size * depth * images
