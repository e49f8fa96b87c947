"""Methods that ask the model: what it writes, and which answer it finds likeliest.

Axes: Q queries, C classes.
"""

from __future__ import annotations

import numpy as np

from sav_jax.eval.features import Features
from sav_jax.eval.methods.base import Method, Outcome, named
from sav_jax.eval.parsing import parse_answer


def _zero_shot(features: Features) -> Outcome:
    """What the model writes, greedily decoded, read tolerantly (the SAVs release compares strings instead)."""
    return written(features, features.texts)


def _zero_shot_likelihood(features: Features) -> Outcome:
    """The answer, of those that the question offers, that the model finds likeliest."""
    return likeliest(features, features.option_scores)


def written(features: Features, texts: tuple[str, ...]) -> Outcome:
    """The label that each of Q texts, written about the queries, answers with; in a generative task the answer itself.

    What every method that writes (``Method.generates``) ends with.
    """
    task, split = features.task, features.split
    predictions = []
    for item, text in zip(split.queries, texts, strict=True):
        if task.parse is not None:
            answer = task.parse(text, item)
        elif task.generative:
            answer = text.strip()
        else:
            answer = parse_answer(text, {label: task.answer(label) for label in item.offered or split.labels})
        predictions.append(answer or "")
    return Outcome(tuple(predictions), texts=texts)


def likeliest(features: Features, scores: np.ndarray) -> Outcome:
    """The best of the classes that a query offers, by scores [Q, C]."""
    scores = scores.astype(np.float64)
    return Outcome(named(features.split, offered(features, scores).argmax(axis=1)), scores)


def offered(features: Features, scores: np.ndarray) -> np.ndarray:
    """Scores [Q, C] with minus infinity at classes that a query does not offer."""
    labels = features.split.labels
    allowed = np.array(
        [[not item.offered or label in item.offered for label in labels] for item in features.split.queries]
    )
    return np.where(allowed, scores, -np.inf)


METHODS = (
    Method("zero-shot", "ask the model and read its answer", _zero_shot, uses_support=False, generates=True),
    Method(
        "zero-shot-likelihood",
        "ask the model: the class whose answer it finds likeliest",
        _zero_shot_likelihood,
        uses_support=False,
    ),
)
