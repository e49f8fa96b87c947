"""Shares of the attention, against the weights that transformers' eager attention gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoints_llava import OneVisionReference

import sav_jax
from sav_jax.eval.methods.icl import in_turns
from sav_jax.eval.tasks import Item, Task
from sav_jax.extract import plan_prompts
from sav_jax.lmm import BUNDLED
from sav_jax.models import decoder
from sav_jax.models.attention import attention
from sav_jax.models.quiet import quiet_transformers
from sav_jax.world.scene import draw, sample_scene
from scripts.reproduction import aim
from scripts.reproduction import attention as looking
from scripts.reproduction.study import Study


def prompts() -> list[sav_jax.Example]:
    """Two demonstrations of unlike length and a query, in turns, twice."""
    task = Task("t", "", lambda _: None)  # type: ignore[arg-type, return-value]
    pictures = [draw(sample_scene(seed, "shape")) for seed in range(4)]
    shown = [
        Item(sav_jax.Example("what color is the background?", (pictures[0],), label="red")),
        Item(sav_jax.Example("what is it?", (pictures[1],), label="star")),
    ]
    return [in_turns(task, shown, sav_jax.Example("what is it now?", (picture,))) for picture in pictures[2:]]


def test_shares_are_those_of_transformers() -> None:
    lmm, examples = sav_jax.load("tiny"), prompts()
    found, tokens = looking.shares_of(lmm, examples)
    assert vars(decoder)["attention"] is attention
    with quiet_transformers():
        import torch
        import transformers
        from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
            LlavaOnevisionImageProcessorPil,
        )

        directory = BUNDLED["tiny"]
        model = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        processor = LlavaOnevisionImageProcessorPil.from_pretrained(directory)
        theirs = OneVisionReference(directory, model, processor, transformers.AutoTokenizer.from_pretrained(directory))
    for row, example in enumerate(examples):
        text = lmm.processor.text(example.question, len(example.images), (), example.history)
        images = example.load_images()
        with torch.no_grad():
            output = model(**theirs.inputs(text, images), output_attentions=True)
        weights = np.array([layer[0, :, -1].numpy() for layer in output.attentions])  # [L, N, T]
        (prompt,) = plan_prompts(lmm, [example])
        kinds = looking.kinds_of(lmm, prompt, example)
        assert weights.shape == (12, 8, len(kinds))
        # Float32 sums of weights that are 1 together; six digits are left after a dozen layers.
        np.testing.assert_allclose(found[row], (weights @ kinds).mean(axis=(0, 1)), rtol=0, atol=1e-5)
        np.testing.assert_allclose(tokens[row], kinds.sum(axis=0) / kinds.sum())


@pytest.mark.parametrize("name", list(BUNDLED))
def test_kinds_are_of_demonstrations_alone(name: str) -> None:
    lmm = sav_jax.load(name)
    example = prompts()[0]
    (prompt,) = plan_prompts(lmm, [example])
    kinds = looking.kinds_of(lmm, prompt, example)
    tokenizer = lmm.processor.tokenizer
    # Questions and answers to the letter, without the template's words and line breaks between them.
    assert tokenizer.decode(prompt.token_ids[kinds[:, 0] > 0]) == "what color is the background?redwhat is it?star"
    # Two of the three pictures, which are as large.
    assert kinds[:, 1].sum() * 3 == 2 * (prompt.visual_index[:, 0] >= 0).sum()
    assert not (kinds[:, 0] * kinds[:, 1]).any()


def test_the_row_is_oriented_as_the_claim(tmp_path: Path) -> None:
    def sheet(attention: float) -> dict[str, object]:
        values = {"text of the attention": attention, "text of the tokens": 0.4, "demonstrations": 0.5}
        rng = np.random.default_rng(0)
        of = {
            name: [" ".join(f"{value + rng.normal(0, 0.02):.2f}" for _ in range(30)) for _ in range(3)]
            for name, value in values.items()
        }
        return {"task": {"sheet": {"clusters": [[str(i) for i in range(30)]] * 3, "values": of}}}

    study = Study(tmp_path)
    assert aim.attention_row(study, "tiny", sheet(0.7)).verdict == "holds"
    failed = aim.attention_row(study, "tiny", sheet(0.1))
    assert failed.verdict == "does not hold"
    assert failed.difference == pytest.approx(-30.0, abs=2)
