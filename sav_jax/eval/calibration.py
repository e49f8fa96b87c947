"""From scores to probabilities: one temperature, fitted on support examples that were left out.

Axes: S support examples, Q queries, C classes.
"""

from __future__ import annotations

import numpy as np

_LOWEST, _HIGHEST = 1e-3, 1e3


def fit_temperature(scores: np.ndarray, targets: np.ndarray) -> float:
    """The temperature T under which softmax(scores / T) makes the right classes likeliest (Guo et al. 2017).

    With the few examples of a support a method may get all of them right, and no T would be small enough. So the loss
    is taken as if one further example had been of every class alike, as Platt (1999) does for two classes.

    Args:
      scores: float [S, C], each support example's scores without its own help.
      targets: int [S], its class. Examples alone in their class are left out: without them there is no such class.

    Returns:
      T, between 0.001 and 1000; 1 if no example is left.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import logsumexp

    kept = (np.bincount(targets, minlength=scores.shape[1])[targets] > 1) & np.isfinite(scores).all(axis=1)
    if not kept.any():
        return 1.0
    scores, targets = scores[kept].astype(np.float64), targets[kept]
    gaps = scores - scores[np.arange(len(targets)), targets][:, None]
    spread = gaps.mean() / (len(targets) + 1)  # what the further example, spread over all, costs per unit of 1 / T

    def loss(log_temperature: float) -> float:
        sharpness = np.exp(-log_temperature)
        return float(logsumexp(gaps * sharpness, axis=1).mean() - sharpness * spread)

    # The loss is convex in 1 / T, so it has one minimum along log T, too.
    found = minimize_scalar(loss, bounds=(np.log(_LOWEST), np.log(_HIGHEST)), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def probabilities(scores: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(scores / T), float64 [Q, C]."""
    from scipy.special import softmax

    return softmax(scores.astype(np.float64) / temperature, axis=1)
