"""The bundled checkpoints are ordinary ones: transformers reads the same directories and gives the same numbers."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from checkpoints import Reference
from checkpoints_llava import OneVisionReference
from checkpoints_qwen import QwenReference

import sav_jax
from sav_jax.lmm import BUNDLED
from sav_jax.models.quiet import quiet_transformers
from sav_jax.world.scene import draw, sample_scene
from sav_jax.world.several import sample_images

PROMPTS = {
    "one": ([draw(sample_scene(1, "pair"))], "What is on the left?"),
    "large": ([draw(sample_scene(2, "glyph", side=64))], "what color is the background?"),
    "two": ([draw(scene) for scene in sample_images(3)], "same or different color?"),
    "none": ([], "is there a red star?"),
}


def reference(directory: Path) -> Reference:
    """transformers' model in float32, image processor and tokenizer of a bundled checkpoint."""
    with quiet_transformers():
        import torch
        import transformers
        from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
            LlavaOnevisionImageProcessorPil,
        )
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        if directory.name == "tiny":
            model = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
            processor = LlavaOnevisionImageProcessorPil.from_pretrained(directory)
            return OneVisionReference(directory, model.eval(), processor, tokenizer)
        model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
        processor = Qwen2VLImageProcessorPil.from_pretrained(directory)
        return QwenReference(directory, model.eval(), processor, tokenizer)


@pytest.mark.rounding
@pytest.mark.parametrize("name", list(BUNDLED))
def test_transformers_gives_the_same_heads_and_logits(name: str) -> None:
    lmm, theirs = sav_jax.load(name), reference(BUNDLED[name])
    examples = [sav_jax.Example(question, tuple(images)) for images, question in PROMPTS.values()]
    heads = sav_jax.extract_heads(lmm, examples, progress=False)
    logits = sav_jax.next_token_logits(lmm, examples, progress=False)
    assert heads.shape[1:3] == (12, 8)
    for row, (images, question) in enumerate(PROMPTS.values()):
        expected = theirs.run(theirs.inputs(lmm.processor.text(question, len(images)), images))
        # float32 sums in another order, over two dozen layers: 1e-5 of the largest value.
        for ours, wanted in zip((heads[row], logits[row]), expected, strict=True):
            np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("name", list(BUNDLED))
def test_checkpoints_are_small_and_their_cards_say_what_they_do(name: str) -> None:
    directory = BUNDLED[name]
    assert sum(file.stat().st_size for file in directory.iterdir()) <= 12 * 10**6
    card = (directory / "README.md").read_text()
    assert f'lmm = sav_jax.load("{name}")' in card
    assert len(re.findall(r"^\| [a-z][^|]*\([^|]*\) \| \d\.\d{3} \| \d\.\d{3} \| \d+ \|$", card, flags=re.M)) > 60
    assert re.search(r"--preset \S+ --steps-scale 0.55 --stop-step \d+ --run-dir", card), "this training, step by step"
