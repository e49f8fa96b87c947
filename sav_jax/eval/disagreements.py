"""The queries whose heads disagree most, with small pictures to look at."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import PIL.Image

from sav_jax.eval.features import Features
from sav_jax.eval.results import Run

_SIDE = 160  # pixels: the longer side of a small picture
_MOST = 12


def disagreements(run: Run, features: Features, key: str) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Rank the queries by the entropy of their heads' votes.

    Args:
      run: of a method with a classifier.
      features: of the same split.
      key: begins the pictures' names.

    Returns:
      What the report shows of each, most disputed first; and the pictures, path in the results folder -> PNG.
    """
    classifier, answers = run.outcome.classifier, run.answers
    assert classifier is not None
    assert answers is not None
    votes = np.concatenate([classifier.votes(heads) for _, heads in features.heads[1].blocks()])
    shares = votes / votes.sum(axis=1, keepdims=True)
    entropy = -(shares * np.log(np.where(shares > 0, shares, 1))).sum(axis=1)
    rows, pictures = [], {}
    for place in np.argsort(-entropy, kind="stable")[:_MOST]:
        example = answers.items[place].example
        names = []
        shown = [*example.load_images(), *(frames[len(frames) // 2] for frames in example.load_videos())]
        for number, image in enumerate(shown):
            names.append(f"images/{key}_{place}_{number}.png")
            pictures[names[-1]] = _small(image)
        order = np.argsort(-votes[place], kind="stable")
        rows.append(
            {
                "seed": run.seed,
                "doc_id": run.numbers[place],
                "doc_hash": run.names[place],
                "question": example.question,
                "target": example.label,
                "prediction": answers.predictions[place],
                "votes": {classifier.labels[i]: int(votes[place, i]) for i in order if votes[place, i]},
                "images": names,
            }
        )
    return rows, pictures


def _small(image: PIL.Image.Image) -> bytes:
    if max(image.size) > _SIDE:
        image.thumbnail((_SIDE, _SIDE))
    elif max(image.size) <= _SIDE // 2:  # a few pixels: show them as squares
        scale = _SIDE // max(image.size)
        image = image.resize((image.width * scale, image.height * scale), PIL.Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
