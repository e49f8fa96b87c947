"""What the tiny random checkpoints of all families share: a saved PyTorch model, its tokenizer and its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sav_jax.models.quiet import quiet_transformers


@dataclass(frozen=True)
class Reference:
    """A checkpoint directory and its PyTorch model; a family says how transformers prepares its inputs."""

    directory: Path
    model: Any
    image_processor: Any
    tokenizer: Any

    def inputs(self, text: str, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        """What transformers' combined processor gives for a prompt: the arguments of the model."""
        raise NotImplementedError

    def pixels(self, inputs: dict[str, torch.Tensor]) -> np.ndarray:
        """The pixels in ``inputs`` as rows of ours: patches ``[P, C]``, or tiles with their channels last."""
        values = inputs["pixel_values"].numpy()
        return values if values.ndim == 2 else values.transpose(0, 2, 3, 1)

    def run(self, inputs: dict[str, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """Heads ``[L, N, H]`` at the last token (the input of every o_proj) and its logits ``[V]``."""
        layers = self.model.model.language_model.layers
        config = self.model.config.text_config
        captured: list[torch.Tensor] = []
        hooks = [
            layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: captured.append(args[0][0, -1].clone()))
            for layer in layers
        ]
        with torch.no_grad():
            logits = self.model(**inputs).logits[0, -1]
        for hook in hooks:
            hook.remove()
        heads = torch.stack(captured).reshape(len(layers), config.num_attention_heads, -1)
        return heads.numpy(), logits.numpy()

    def greedy(self, inputs: dict[str, torch.Tensor], count: int) -> list[int]:
        """The ``count`` likeliest next tokens, one by one."""
        with torch.no_grad():
            tokens = self.model.generate(
                **inputs, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        return tokens[0, inputs["input_ids"].shape[1] :].tolist()


def byte_tokenizer(
    special: Sequence[str], *, eos: str, pad: str, bos: str | None = None, append_eos: bool = False, **options: Any
) -> Any:
    """A fast tokenizer whose vocabulary is the bytes and some special tokens.

    Args:
        special: further special tokens.
        eos, pad: the special tokens of these roles.
        bos: the special token put before every text, unless special tokens are not wanted; None for none.
        append_eos: put ``eos`` behind every text.
        options: of ``PreTrainedTokenizerFast``.
    """
    with quiet_transformers():
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, pad_token=pad, bos_token=bos, **options
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    around = [token for token, there in ((bos, bos is not None), ("$A", True), (eos, append_eos)) if there]
    if len(around) > 1:
        backend = tokenizer.backend_tokenizer
        ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in around if token != "$A"]
        backend.post_processor = processors.TemplateProcessing(single=" ".join(map(str, around)), special_tokens=ids)
    return tokenizer


def scale_weights(model: Any, seed: int) -> Any:
    """Random weights so large that every value of the forward pass is of order one; returns ``model`` for inference."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                fan_in = parameter[0].numel() if "embed" not in name or "patch" in name else 1
                parameter.normal_(std=1.5 * fan_in**-0.5)
            elif "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.3)
    return model.eval()


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth random colours: not so noisy that resizing decides everything."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
