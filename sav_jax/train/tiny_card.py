"""The bundled model's card, from its evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CARD = """---
library_name: sav_jax
license: apache-2.0
pipeline_tag: image-text-to-text
---

# sav_jax tiny

A real but very small large multimodal model in the LLaVA-OneVision layout: {parameters:.2f} million parameters, a
SigLIP tower (6 layers x 160, 32-pixel tiles, 8-pixel patches), a two-layer projector and a Qwen2 decoder (8 layers x
160, 8 heads each, 64 heads in all), with its own byte-level BPE tokenizer. It is there so that everything in sav_jax
can be tried, tested and shown on a laptop. It answers short questions about small drawn scenes. It is not a photo
model, and knows no English beyond its questions.

```python
import sav_jax

lmm = sav_jax.load("tiny")
```

`transformers` loads the same directory with `AutoTokenizer` and `LlavaOnevisionForConditionalGeneration`.

## How it was trained

From random weights, on images that `sav_jax/world` draws procedurally (shapes, colours, sizes, textures, positions,
counts; digits and letters in the fonts that matplotlib ships and in pen strokes written for this project), never on a
data set:

1. *Seeing*, {label_steps} steps of {label_batch_size} images: tower and projector only; the mean projected token of an
   image is classified against the word embeddings (digit, letter, shape, colour, texture, category).
2. *Answering*, {question_steps} steps of {question_batch_size} images with two questions each: the whole model, loss
   on the answers only.

Muon for matrices ({muon_rate} peak), AdamW for the rest ({adam_rate} peak); every batch follows from the step number,
so a killed run resumes to the same weights. To train it again (about 50 minutes on two idle CPU cores; measured there:
275 images/s in the first stage, 53 in the second):

```sh
python scripts/train_tiny.py --run-dir runs/tiny --output sav_jax/models/tiny
```

The exact numbers of the recipe are in `evaluation.json` beside this file.

## What it can do

Exact-match accuracy on held-out scenes with the stored bfloat16 weights: {scenes} scenes of each kind, one question
about each. A row is one type of question, so that it rests on 30 to 400 of them and may be off by up to 8 points
(standard error). Glyphs are in typefaces and pen styles that training never drew. "Constant" is the share of the
commonest answer: what answering without looking would reach. Answers are free (an argmax over the whole vocabulary,
token by token), not a choice among options.

| question (scene) | accuracy | constant |
|---|---:|---:|
{questions}

Scene kinds: *scan* one glyph scanned at 8x8 pixels and enlarged; *glyph* one glyph at 32x32, any colours, place and
size; *shape* one shape; *pair* two things; *group* one to four things; *64 pixels* a glyph in an image of four tiles;
*two images* two images in one prompt.

The vision tower alone (mean projected token against the words of the group):

| group (scene) | accuracy |
|---|---:|
{labels}

## Limits

- Rows close to their constant, or below it, are not learned. It names what it sees, and counts everything; it does not
  *compare* words with the image: yes/no questions are answered without looking, of two things it does not know which
  is at the named side, and counts of one colour or shape are poor. A thousand more steps with more such questions did
  not help.
- Everything it saw was drawn by one program. On photographs its answers mean nothing, though its features still serve
  as an example of features.
- Questions must be short and look like the world's own (`sav_jax/world/questions.py`, with or without a capital);
  other English is unknown to it. Captions of two things are almost always wrong somewhere.
- One seed, one run; no spread is known. Training again gives losses that agree at first to about eight digits and, last
  bits growing, another model of much the same quality.
"""


def model_card(evaluation: Mapping[str, Any]) -> str:
    """Markdown of the card. ``evaluation`` is what ``Trainer.export`` writes to ``evaluation.json``."""
    questions, guesses = evaluation["questions"], evaluation["guess"]
    return _CARD.format(
        **evaluation["recipe"],
        parameters=evaluation["parameters"] / 1e6,
        scenes=evaluation["scenes_per_kind"],
        questions="\n".join(f"| {name} | {value:.3f} | {guesses[name]:.3f} |" for name, value in questions.items()),
        labels="\n".join(f"| {name} | {value:.3f} |" for name, value in evaluation["labels"].items()),
    )
