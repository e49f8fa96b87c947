"""Head Ensemble Classifiers (de Senneville et al., "Unlocking Few-Shot Capabilities in LVLMs via Prompt Conditioning
and Head Selection", ECCV 2026, arXiv 2603.24181), by the equations of the authors' released code.

Every head, scaled to length 1, gives a distribution over the classes; a head's score is the mean probability that it
gives the right classes of the support; the best K heads' probabilities are averaged.

- ``hec`` (HEC-V): Gaussians with the classes' means and one covariance per head, p = softmax(logits / 10).
- ``hec-text`` (HEC-T): isotropic Gaussians around the heads of a text about each class, p = softmax(logits).
- ``hec-both`` (HEC-VT): p_T + alpha p_V.

Axes: S support examples, R rows, C classes, L layers, N heads per layer, M = L * N heads, K selected heads, H head
width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sav_jax.eval.features import Features, Heads
from sav_jax.eval.methods._arithmetic import (
    best_heads,
    block_rows,
    log_mean_probability,
    one_blas_thread,
    selected,
    unit,
)
from sav_jax.eval.methods.base import Method, Outcome, named

REGULARISATION = 1.0
"""Of the covariance, as published: in units of its trace."""

VISION_TEMPERATURE, TEXT_TEMPERATURE = 10.0, 1.0
"""Divide the logits of one head, as published."""

ALPHAS = (0.1, 10.0)
"""The weights of HEC-V in HEC-VT that the authors choose from, per data set."""

DEFAULT_ALPHA = 1.0
"""The authors' weight where nothing can be tuned."""

_NO_SCATTER = 1e-12  # of the whole scatter: what rounding leaves of nothing


@dataclass(frozen=True)
class Discriminant:
    """The selected heads' discriminants, linear in a head's unit vector.

    Attributes:
      heads: int [K], best first.
      scores: float [M], of all heads: mean probability of the right class.
      weights: float64 [K, H, C].
      offsets: float64 [K, C].
      temperature: divides the logits.
    """

    heads: np.ndarray
    scores: np.ndarray
    weights: np.ndarray
    offsets: np.ndarray
    temperature: float

    def log_probabilities(self, heads: np.ndarray) -> np.ndarray:
        """[R, L, N, H] -> float64 [R, C]."""
        vectors = selected(heads, self.heads)
        return log_mean_probability(
            (vectors[:, k] @ self.weights[k] + self.offsets[k]) / self.temperature for k in range(len(self.heads))
        )


@one_blas_thread()
def fit_vision(support: Heads, targets: np.ndarray, num_classes: int, num_heads: int) -> Discriminant:
    """HEC-V: one head at a time, in float64.

    With the scatter ``S = sum_i (x_i - m_c)(x_i - m_c)^T`` around the class means ``m``, ``logit_c = -(x - m_c)^T P
    (x - m_c) / 2 + log prior_c`` where ``P = H (S + tr(S) / (n - 1) I)^-1`` (the release: ``H pinv((n - 1) cov + reg
    tr(cov) I)`` with ``reg = 1``). ``x^T P x`` is the same for all classes and left out.

    The support scores itself, as published. One difference: where no class has two different examples, S is 0 and the
    published P, a pseudo-inverse, is 0 too, so that no head can tell any class; P is then H I, as for HEC-T.

    Args:
      support: S examples.
      targets: int [S], their classes.
      num_classes: C.
      num_heads: K.
    """
    layers, per_layer, _ = support.shape[1:]
    log_prior = np.log(np.bincount(targets, minlength=num_classes) / len(targets))
    scores = np.empty(layers * per_layer)
    for layer in range(layers):
        vectors = support.layers(layer, layer + 1)[:, 0]
        for head in range(per_layer):
            x = unit(vectors[:, head].astype(np.float64))
            weights, offsets = _gaussians(x, targets, log_prior)
            probabilities = _softmax((x @ weights + offsets) / VISION_TEMPERATURE)
            scores[layer * per_layer + head] = probabilities[np.arange(len(x)), targets].mean()
    chosen = best_heads(scores, num_heads)
    parts = [_gaussians(x, targets, log_prior) for x in _columns(support, chosen)]
    weights, offsets = (np.stack(part) for part in zip(*parts, strict=True))
    return Discriminant(chosen, scores, weights, offsets, VISION_TEMPERATURE)


def _gaussians(x: np.ndarray, targets: np.ndarray, log_prior: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Discriminants of one head, [H, C] and [C], from unit vectors [S, H]."""
    width = x.shape[1]
    means = _class_means(x, targets, len(log_prior))
    scatter = _scatter(x, means, targets)
    trace = np.trace(scatter)
    weights = width * means.T
    if trace > 0:
        weights = np.linalg.solve(scatter + REGULARISATION * trace / (len(x) - 1) * np.eye(width), weights)
    return weights, log_prior - 0.5 * np.einsum("ch,hc->c", means, weights)


@one_blas_thread()
def leave_one_out(support: Heads, targets: np.ndarray, model: Discriminant) -> np.ndarray:
    """Log probabilities of each support example under HEC-V fitted without it, on the heads chosen with it.

    Without example i of class c (n_c examples, ``d = x_i - m_c``, ``g = n_c / (n_c - 1)``) the class's mean is
    ``m_c - d / (n_c - 1)`` and the scatter ``S - g d d^T``: on the eigenvectors of S the regularised scatter is
    diagonal but for that one rank, which the formula of Sherman and Morrison inverts. An example alone in its class
    leaves no class behind: minus infinity.

    Args:
      support, targets: what ``model`` was fitted on.
      model: the selected heads.

    Returns:
      float64 [S, C].
    """
    counts = np.bincount(targets, minlength=model.offsets.shape[1])
    return log_mean_probability(
        _left_out_logits(x, targets, counts) / model.temperature for x in _columns(support, model.heads)
    )


def _left_out_logits(x: np.ndarray, targets: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Of one head: unit vectors [S, H], classes [S], examples per class [C] -> [S, C]."""
    (size, width), rows = x.shape, np.arange(len(x))
    rest = np.tile(counts, (size, 1))
    rest[rows, targets] -= 1
    log_prior = np.log(rest, where=rest > 0, out=np.full(rest.shape, -np.inf)) - np.log(size - 1)
    n = counts[targets].astype(np.float64)
    g = np.where(n > 1, n / np.maximum(n - 1, 1), 1)

    means = _class_means(x, targets, len(counts))
    values, vectors = np.linalg.eigh(_scatter(x, means, targets))
    values = np.maximum(values, 0)
    x, means = x @ vectors, means @ vectors
    d = x - means[targets]
    trace = values.sum() - g * (d**2).sum(axis=1)
    nothing = trace <= _NO_SCATTER * values.sum()
    ridge = np.where(nothing, 1, REGULARISATION * trace / max(size - 2, 1))
    inverse = 1 / (np.where(nothing[:, None], 0, values) + ridge[:, None])
    square = (inverse * x**2).sum(axis=1)[:, None] - 2 * (inverse * x) @ means.T + inverse @ (means**2).T
    cross = (inverse * d * x).sum(axis=1)[:, None] - (inverse * d) @ means.T
    spread = (inverse * d**2).sum(axis=1)
    factor = np.where(nothing, 0, g / np.where(nothing, 1, 1 - g * spread))
    distances = square + factor[:, None] * cross**2
    distances[rows, targets] = g**2 * (spread + factor * spread**2)  # from its class's new mean it differs by g d
    return log_prior - 0.5 * width * distances


@one_blas_thread()
def fit_text(support: Heads, targets: np.ndarray, texts: np.ndarray, num_heads: int) -> Discriminant:
    """HEC-T: ``logit_c = -|x - t_c|^2 / 2`` with the unit vectors ``t`` of the classes' texts.

    The support only chooses the heads, as in the release where labelled examples are there (without them the release
    has fixed lists of heads for some models). ``|x|^2`` is the same for all classes and left out.

    Args:
      support: S examples.
      targets: int [S], their classes.
      texts: float32 [C, L, N, H].
      num_heads: K.
    """
    flat = unit(texts.reshape(len(texts), -1, texts.shape[-1]).astype(np.float64))
    weights = np.transpose(flat, (1, 2, 0))
    offsets = -0.5 * (flat**2).sum(axis=2).T
    total, narrow = np.zeros(len(weights)), weights.astype(np.float32)
    for part, heads in support.blocks(block_rows(offsets.size)):
        x = unit(heads.reshape(len(heads), *weights.shape[:2])).swapaxes(0, 1)
        logits = np.matmul(x, narrow) + offsets[:, None]
        probabilities = _softmax(logits / TEXT_TEMPERATURE)
        total += probabilities[:, np.arange(len(heads)), targets[part]].sum(axis=1)
    scores = total / len(support)
    chosen = best_heads(scores, num_heads)
    return Discriminant(chosen, scores, weights[chosen], offsets[chosen], TEXT_TEMPERATURE)


def class_texts(features: Features) -> list[str]:
    """One text per class: a sentence about the class stands for the image, and the question follows, as in the release
    (whose sentence is "You are given an image of a NAME"). Where the questions differ there is none to follow.
    """
    questions = {item.example.question for item in features.split.support}
    question = questions.pop().replace("<image>", "").strip() if len(questions) == 1 else ""
    sentences = [features.task.class_prompt.format(label=label) for label in features.split.labels]
    return [f"{sentence}\n{question}" if question else sentence for sentence in sentences]


def choose_alpha(text: np.ndarray, vision: np.ndarray, targets: np.ndarray) -> float:
    """The weight of HEC-V.

    The authors take 0.1 or 10, whichever is more accurate on one more few-shot task per data set. Here no further
    labelled examples are used: each support example is classified without itself (ties: the likelier right classes).

    Args:
      text, vision: log probabilities of the support, [S, C]; of HEC-V, left out.
      targets: int [S].
    """
    kept = np.isfinite(vision).all(axis=1)  # the others are alone in their class
    if not kept.any():
        return DEFAULT_ALPHA

    def quality(alpha: float) -> tuple[int, float]:
        scores = _mixture(text[kept], vision[kept], alpha)
        right = scores[np.arange(len(scores)), targets[kept]]
        return int((scores.argmax(axis=1) == targets[kept]).sum()), float(right.sum())

    return max(ALPHAS, key=quality)


def _mixture(text: np.ndarray, vision: np.ndarray, alpha: float) -> np.ndarray:
    """log((p_T + alpha p_V) / (1 + alpha))."""
    return np.logaddexp(text, vision + np.log(alpha)) - np.log1p(alpha)


def _columns(support: Heads, chosen: np.ndarray) -> list[np.ndarray]:
    """The selected heads' unit vectors, float64 [S, H] each."""
    layer, head = np.divmod(chosen, support.shape[2])
    return [
        unit(support.array[support.rows, one, other].astype(np.float64)) for one, other in zip(layer, head, strict=True)
    ]


def _class_means(x: np.ndarray, targets: np.ndarray, num_classes: int) -> np.ndarray:
    """[S, H] -> [C, H]."""
    return np.stack([x[targets == column].mean(axis=0) for column in range(num_classes)])


def _scatter(x: np.ndarray, means: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Within the classes: [S, H] -> [H, H]."""
    centred = x - means[targets]
    return centred.T @ centred


def _softmax(logits: np.ndarray) -> np.ndarray:
    from scipy.special import softmax

    return softmax(logits, axis=-1)


def _vision(features: Features) -> tuple[np.ndarray, np.ndarray, Discriminant]:
    """Log probabilities of queries and of left-out support examples."""
    support, queries = features.heads
    model = fit_vision(support, features.targets, len(features.split.labels), features.settings.num_heads)
    left_out = leave_one_out(support, features.targets, model)
    return _over(queries, model), left_out, model


def _text(features: Features) -> tuple[np.ndarray, np.ndarray, Discriminant]:
    """The same of HEC-T: the prototypes owe nothing to the support, so that nothing has to be left out of them."""
    support, queries = features.heads
    texts = features.text_heads(class_texts(features))
    model = fit_text(support, features.targets, texts, features.settings.num_heads)
    of_support = _over(support, model)
    return _over(queries, model), of_support, model


@one_blas_thread()
def _over(heads: Heads, model: Discriminant) -> np.ndarray:
    return np.concatenate([model.log_probabilities(block) for _, block in heads.blocks()])


def _hec(features: Features) -> Outcome:
    scores, left_out, model = _vision(features)
    return _outcome(features, scores, left_out, {"heads": _heads(features, model)})


def _hec_text(features: Features) -> Outcome:
    scores, of_support, model = _text(features)
    return _outcome(
        features, scores, of_support, {"heads": _heads(features, model), "class_text": class_texts(features)[0]}
    )


def _hec_both(features: Features) -> Outcome:
    vision, vision_left_out, _ = _vision(features)
    text, text_support, _ = _text(features)
    alpha = choose_alpha(text_support, vision_left_out, features.targets)
    scores, left_out = _mixture(text, vision, alpha), _mixture(text_support, vision_left_out, alpha)
    return _outcome(features, scores, left_out, {"alpha": alpha})


def _heads(features: Features, model: Discriminant) -> list[list[int]]:
    per_layer = features.heads[0].shape[2]
    return [[int(head) // per_layer, int(head) % per_layer] for head in model.heads]


def _outcome(features: Features, scores: np.ndarray, left_out: np.ndarray, facts: dict[str, object]) -> Outcome:
    return Outcome(named(features.split, scores.argmax(axis=1)), scores, left_out, facts=facts)


METHODS = (
    Method("hec", "head ensemble classifier HEC-V: Gaussian discriminants of the best heads (arXiv 2603.24181)", _hec),
    Method(
        "hec-text",
        "HEC-T: the best heads compare with a text about each class (arXiv 2603.24181)",
        _hec_text,
    ),
    Method("hec-both", "HEC-VT: the probabilities of hec-text and hec, added (arXiv 2603.24181)", _hec_both),
)
