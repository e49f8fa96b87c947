"""CLIP (arXiv 2103.00020) and SigLIP (arXiv 2303.15343): the encoders that a multimodal model is held against.

An example's image vector is the mean of the unit vectors of its images, scaled to length 1; an example without images
is an error.

- Zero-shot: the class whose text (the task's ``class_prompt``) is most similar, of those that the query offers. Scores
  are the model's own logits.
- Few-shot: the class whose mean is nearest by cosine. Where the questions of the split are not all the same, an
  example's vector is its image vector with the unit vector of its question behind it, as in the interleaved baseline of
  arXiv 2412.00142, so that both weigh alike.

Axes: S support examples, Q queries, C classes, W width of the embeddings, D = W or 2 W.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from sav_jax.classifier import SparseAttentionVectors
from sav_jax.errors import UserError
from sav_jax.eval.embeddings import Embeddings
from sav_jax.eval.features import Features
from sav_jax.eval.methods.asking import likeliest
from sav_jax.eval.methods.base import Method, Outcome, named
from sav_jax.eval.methods.sav import vote_scores
from sav_jax.eval.tasks.base import Item
from sav_jax.examples import IMAGE_MARK


def _zero_shot(family: str, features: Features) -> Outcome:
    """Similarity of image and class text."""
    embeddings, split = _embeddings(family, features), features.split
    with features.reader.timed():
        texts = embeddings.texts([features.task.class_prompt.format(label=label) for label in split.labels])
        images = _image_vectors(embeddings, split.queries, f"{family}-zero-shot")
    return likeliest(features, embeddings.encoder.logits(images, texts))


def _few_shot(family: str, features: Features) -> Outcome:
    """Nearest class mean."""
    embeddings, split = _embeddings(family, features), features.split
    with features.reader.timed():
        vectors = example_vectors(embeddings, (*split.support, *split.queries), f"{family}-few-shot")
    heads = vectors[:, None, None]  # one layer with one head
    support, queries = heads[: len(split.support)], heads[len(split.support) :]
    labels = [item.label for item in split.support]
    nearest = SparseAttentionVectors.fit(support, labels, 1, class_names=split.labels)
    scores = vote_scores(nearest, queries)
    return Outcome(named(split, scores.argmax(axis=1)), scores, vote_scores(nearest, support, features.targets))


def example_vectors(embeddings: Embeddings, items: Sequence[Item], method: str) -> np.ndarray:
    """What is compared in few-shot classification, float32 [S + Q, D]; see the head of this file.

    Args:
      embeddings: of a dual encoder.
      items: all examples of a split: whether their questions differ decides whether those count.
      method: named in errors.
    """
    images = _image_vectors(embeddings, items, method)
    questions = [" ".join(item.example.question.replace(IMAGE_MARK, " ").split()) for item in items]
    if len(set(questions)) == 1:
        return images
    return np.concatenate([images, embeddings.texts(questions)], axis=1)


def _image_vectors(embeddings: Embeddings, items: Sequence[Item], method: str) -> np.ndarray:
    """Mean direction of each example's images, float32 [R, W]."""
    for item in items:
        if not item.example.images or item.example.videos:
            source = item.example.source or f"example {item.example.id}"
            found = "a video, and looks at images alone" if item.example.videos else "none"
            raise UserError(f"{source}: method {method} needs an image, and there is {found}")
    means = np.stack([vectors.mean(axis=0) for vectors in embeddings.images([item.example for item in items])])
    norms = np.linalg.norm(means, axis=1, keepdims=True)
    return means / np.where(norms > 0, norms, 1)


def no_checkpoint(family: str) -> str:
    """What is wrong where a dual encoder is asked for and none is named."""
    return f"methods {family}-zero-shot and {family}-few-shot need a checkpoint: --{family} PATH"


def _embeddings(family: str, features: Features) -> Embeddings:
    path = getattr(features.settings, family)
    if path is None:
        raise UserError(no_checkpoint(family))
    embeddings = features.reader.embeddings(path)
    found = embeddings.encoder.hf_config["model_type"]
    if found != family:
        raise UserError(f"--{family} {path}: the checkpoint is a {found} (model_type in its config.json)")
    return embeddings


def _methods(family: str, name: str) -> tuple[Method, ...]:
    def method(kind: str, description: str, run: Callable[[str, Features], Outcome], uses_support: bool) -> Method:
        text = f"{name} (--{family} PATH): {description}"
        return Method(f"{family}-{kind}", text, partial(run, family), uses_support, optional=f"needs --{family} PATH")

    return (
        method("zero-shot", "the class whose text is most like the image", _zero_shot, False),
        method("few-shot", "nearest class mean of image (and question) embeddings", _few_shot, True),
    )


FAMILIES = {"clip": "CLIP", "siglip": "SigLIP"}
"""Option and prefix of the methods' names -> name."""

METHODS = tuple(method for family, name in FAMILIES.items() for method in _methods(family, name))
