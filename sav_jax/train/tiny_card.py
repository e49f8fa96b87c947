"""The bundled models' cards, from their evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CURVE = "curve.svg"

_LAYOUTS = {
    "tiny": """A real but very small large multimodal model in the LLaVA-OneVision layout: {parameters:.2f} million
parameters, a SigLIP tower (6 layers x 144, 32-pixel tiles, 8-pixel patches), a two-layer projector and a Qwen2 decoder
(12 layers x 192, 8 heads each, 96 heads in all), with its own byte-level BPE tokenizer.""",
    "tiny-qwen": """A real but very small large multimodal model in the Qwen2-VL layout: {parameters:.2f} million
parameters, a tower for images of any size (6 layers x 128, 4-pixel patches, 2 x 2 of which make a visual token; 16 to
144 tokens an image) and a Qwen2 decoder with M-RoPE (12 layers x 192, 8 heads each, 96 heads in all), with its own
byte-level BPE tokenizer.""",
}
_CLASSES = {"tiny": "LlavaOnevisionForConditionalGeneration", "tiny-qwen": "Qwen2VLForConditionalGeneration"}

_CARD = """---
library_name: sav_jax
license: apache-2.0
pipeline_tag: image-text-to-text
---

# sav_jax {family}

{layout}

It is there so that everything in sav_jax can be tried, tested and shown on a laptop. It answers short questions about
small drawn scenes. It is not a photo model, and knows no English beyond its questions.

```python
import sav_jax

lmm = sav_jax.load("{family}")
```

`transformers` loads the same directory with `AutoTokenizer` and `{class_}`.

## How it was trained

From random weights, on images that `sav_jax/world` draws procedurally (docs/world.md): shapes, objects, colours,
textures, sizes, places, counts and relations; digits, letters and words in the fonts that matplotlib ships and in pen
strokes written for this project. Never on a data set.

| stage | steps | images a step | learning rate | prompts |
|---|---:|---:|---|---|
{stages}

*seeing*: tower and projector only; the mean projected token of an image is classified against the word embeddings.
*answering*, *instructions*: the whole model, up to {turns} questions about each image in one chat, loss on the answers
only (and the first stage's, small). {several}

Muon for matrices ({muon_rate} peak), AdamW for the rest ({adam_rate} peak), losses in {dtype}; every batch follows from
the step number, so a killed run resumes to the same weights, and the same command on the same machine gives the same
losses and weights, bit for bit (docs/world.md shows it on a shortened run). This training, step by step:

```sh
python scripts/train_tiny.py --preset {family}{options} --run-dir runs/{family} --output runs/{family}-trained
```

{account}The exact numbers of the recipe and the training's log are in `evaluation.json` beside this file.

![training curve](curve.svg)

## What it can do

Exact-match accuracy on held-out scenes with the stored bfloat16 weights: {scenes} scenes of each kind, one question
about each. A row is one type of question about one kind of scene; "n" is how many of them it rests on: where it is
small, read the row with its neighbours. Glyphs and words are in typefaces and
pen styles that training never drew; one combination of colour and shape or object in eleven is new. "Constant" is the
share of the commonest answer: what answering without looking would reach. Answers are free (an argmax over the whole
vocabulary, token by token), not a choice among options. All together: {all:.3f}.

| question (scene) | accuracy | constant | n |
|---|---:|---:|---:|
{questions}

Types "is ...", "exists", "more" are yes/no questions, "claim" asks true or false, "choice" for the letter of an option.
Scene kinds: *scan* one glyph scanned at 8x8 pixels and enlarged; *glyph*, *shape*, *object*, *word* one of them;
*swatch* a surface of a texture without a name; *pair* two things; *group* one to four; *crowd* one to nine; *64 pixels*
a glyph in a larger image{pairs}.

The vision tower alone (mean visual token against the words of the group):

| group (scene) | accuracy |
|---|---:|
{labels}

## Limits

- Rows close to their constant are not learned. What training never asks (docs/world.md: whether an object is dangerous,
  whether two images are drawn in one manner, what the unnamed textures are called, parity and other rules) it cannot be
  asked; whether its heads know is what the study measures.
- Everything it saw was drawn by one program. On photographs its answers mean nothing, though its features still serve
  as an example of features.
- Questions must be short and look like the world's own (`sav_jax/world/facts.py`, with or without a capital); other
  English is unknown to it.
- One seed, one run; no spread is known.
"""

_PAIRS = {True: "; *two images* two images in one prompt", False: ""}
_SEVERAL = {
    True: "In the last stage some prompts have two images.",
    False: "No prompt ever had more than one image: several in one prompt are new to it.",
}


def _stage_row(stage: Mapping[str, Any]) -> str:
    prompts = ", ".join(f"{name} {share:.2f}" for name, share in stage["buckets"]) or "images alone"
    return (
        f"| {stage['name']} | {stage['steps']} | {stage['batch_size']} "
        f"| {stage['first']} to {stage['last']} of the peak | {prompts} |"
    )


def model_card(evaluation: Mapping[str, Any]) -> str:
    """Markdown of the card. ``evaluation`` is what ``Trainer.export`` writes to ``evaluation.json``."""
    questions, guesses, counts = (evaluation[key] for key in ("questions", "guess", "counts"))
    recipe = evaluation["recipe"]
    family = recipe["family"]
    several = any(dict(stage["buckets"]).get("two", 0) > 0 for stage in recipe["stages"])
    return _CARD.format(
        **{key: recipe[key] for key in ("family", "turns", "muon_rate", "adam_rate", "dtype")},
        layout=_LAYOUTS[family].format(parameters=evaluation["parameters"] / 1e6),
        class_=_CLASSES[family],
        stages="\n".join(_stage_row(stage) for stage in recipe["stages"]),
        several=_SEVERAL[several],
        pairs=_PAIRS[several],
        options="".join(f" {word}" for word in evaluation["options"]),
        account=f"{evaluation['account']}\n\n" if evaluation["account"] else "",
        scenes=evaluation["scenes_per_kind"],
        all=questions["all"],
        questions="\n".join(
            f"| {name} | {value:.3f} | {guesses[name]:.3f} | {counts[name]} |"
            for name, value in questions.items()
            if name in guesses
        ),
        labels="\n".join(f"| {name} | {value:.3f} |" for name, value in evaluation["labels"].items()),
    )


def draw_curve(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Loss, and accuracy on held-out scenes, against steps, as an SVG.

    Args:
        rows: of ``log.jsonl``.
        file: to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "sav_jax"}):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
        for stage in dict.fromkeys(row["stage"] for row in rows):
            losses = [(row["step"], row["loss"]) for row in rows if row["stage"] == stage and "loss" in row]
            left.plot(*zip(*losses, strict=True), label=stage)
        answered = [row for row in rows if "all" in row.get("held_out", {})]
        for name in ("all", "is it (glyph)", "is related (pair)", "which (pair)", "count (group)", "exists (group)"):
            points = [(row["step"], row["held_out"][name]) for row in answered if name in row["held_out"]]
            if points:
                right.plot(*zip(*points, strict=True), label=name)
        left.set(xlabel="step", ylabel="training loss", yscale="log")
        right.set(xlabel="step", ylabel="accuracy, held-out scenes", ylim=(0, 1))
        for axes in (left, right):
            if axes.lines:
                axes.legend(fontsize=7)
        figure.savefig(file, metadata={"Date": None})
        pyplot.close(figure)


def write_card(evaluation: Mapping[str, Any], output: Path) -> None:
    """Card and curve into the checkpoint directory."""
    (output / "README.md").write_text(model_card(evaluation))
    draw_curve(evaluation["curve"], output / CURVE)
