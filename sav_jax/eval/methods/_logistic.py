"""Multinomial logistic regression with an L2 penalty, on examples that are given on their own principal axes.

It has scikit-learn's objective, the sum of the log losses plus ``|W|^2 / (2 C)`` with a free intercept, and so its
solution. The solver is its own because of the size: scikit-learn's copies the examples up to three times and fits one
model at a time. Here nothing of the examples' size is made, and all folds of a cross-validation share the passes over
them.

Newton's method with conjugate gradients. On principal axes ``z^T z`` is diagonal, so that the Hessian with every
example's class covariance ``diag(p) - p p^T`` replaced by their mean has a closed inverse: the preconditioner.

Axes: S examples, D principal axes, F fits, C classes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_PRECISION = 1e-7  # that no logit of an example of length 1 moves any more
_RESIDUAL = 1e-2  # of a Newton step's linear system: each step then leaves about a hundredth of the error
_MOST_STEPS, _MOST_PRODUCTS = 100, 1000  # never reached but by features that are no numbers


def fit_logistic(
    z: np.ndarray, squares: np.ndarray, wanted: np.ndarray, used: np.ndarray, strength: float, start: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Fit several models, each on some of the examples.

    Args:
      z: float64 [S, D], columns orthogonal and of mean 0.
      squares: float64 [D], the square of each column's length.
      wanted: float64 [S, C], 1 for an example's class, else 0.
      used: float64 [S, F], 1 for the examples that a model is fitted on, else 0.
      strength: scikit-learn's C, the inverse of the penalty.
      start: float64 [D + 1, F, C], where to begin: such as the solution for another strength, or zeros.

    Returns:
      The weights with the intercepts behind them, [D + 1, F, C], and the logits of all examples [S, F, C].
    """
    classes = wanted.shape[1]
    # scikit-learn's model of two classes has one vector of weights, the difference of these two: half the penalty.
    penalty = np.append(np.full(z.shape[1], (2 if classes == 2 else 1) / strength), 0.0)[:, None, None]
    sizes = np.append(squares, len(z))[:, None, None]

    def forward(weights: np.ndarray) -> np.ndarray:
        return (z @ weights[:-1].reshape(z.shape[1], -1)).reshape(len(z), *weights.shape[1:]) + weights[-1]

    def backward(rows: np.ndarray) -> np.ndarray:
        flat = rows.reshape(len(z), -1)
        return np.concatenate([z.T @ flat, flat.sum(axis=0)[None]]).reshape(-1, *rows.shape[1:])

    def objective(weights: np.ndarray, logits: np.ndarray) -> np.ndarray:
        peak = logits.max(axis=2)
        losses = peak + np.log(np.exp(logits - peak[:, :, None]).sum(axis=2)) - (logits * wanted[:, None]).sum(axis=2)
        return (used * losses).sum(axis=0) + (penalty * weights**2).sum(axis=(0, 2)) / 2

    weights, logits = start, forward(start)
    value = objective(weights, logits)
    for _ in range(_MOST_STEPS):
        p = np.exp(logits - logits.max(axis=2, keepdims=True))
        p /= p.sum(axis=2, keepdims=True)
        gradient = backward(used[:, :, None] * (p - wanted[:, None])) + penalty * weights
        precondition = _preconditioner(p, used, sizes, penalty)

        def curve(direction: np.ndarray, p: np.ndarray = p) -> np.ndarray:
            moved = p * forward(direction)
            moved -= p * moved.sum(axis=2, keepdims=True)
            return backward(used[:, :, None] * moved) + penalty * direction

        step = _solve(curve, precondition, -gradient)
        moved, slope = forward(step), (gradient * step).sum(axis=(0, 2))
        # Armijo's rule, with room for the rounding of a value that hardly changes any more.
        length = np.ones(len(value))
        for _ in range(50):
            tried = objective(weights + length[:, None] * step, logits + length[:, None] * moved)
            steep = tried > value + 1e-4 * length * slope + 1e-12 * np.abs(value)
            if not steep.any():
                break
            length[steep] /= 2
        step *= length[:, None]
        weights, logits, value = weights + step, logits + length[:, None] * moved, tried
        if (np.linalg.norm(step[:-1], axis=0) + np.abs(step[-1])).max() <= _PRECISION:
            break
    return weights, logits


def _preconditioner(
    p: np.ndarray, used: np.ndarray, sizes: np.ndarray, penalty: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """The inverse of the Hessian if all examples had the mean class covariance: a function of [D + 1, F, C].

    Moving all classes alike changes no probability: along that eigenvector the inverse is that of the penalty, and 0
    for the intercepts, which have none.
    """
    shares = used[:, :, None] * p / len(p)
    covariance = shares.sum(axis=0)[:, :, None] * np.eye(p.shape[2]) - np.einsum("sfc,sfd->fcd", shares, p)
    values, axes = np.linalg.eigh(covariance)
    values[:, 0] = 0.0  # exactly
    curvature = sizes * np.maximum(values, 0.0) + penalty
    inverse = np.divide(1, curvature, out=np.zeros_like(curvature), where=curvature > 0)
    return lambda of: np.einsum("dfc,fkc->dfk", np.einsum("dfk,fkc->dfc", of, axes) * inverse, axes)


def _solve(
    curve: Callable[[np.ndarray], np.ndarray], precondition: Callable[[np.ndarray], np.ndarray], right: np.ndarray
) -> np.ndarray:
    """Preconditioned conjugate gradients, each fit by itself: ``curve(x) = right``, up to ``_RESIDUAL``."""
    x, residual = np.zeros_like(right), right.copy()
    direction = precondition(residual)
    size = (residual * direction).sum(axis=(0, 2))
    enough = _RESIDUAL**2 * size
    for _ in range(_MOST_PRODUCTS):
        if not (active := size > enough).any():
            break
        product = curve(direction)
        bend = (direction * product).sum(axis=(0, 2))
        length = np.divide(size, bend, out=np.zeros_like(size), where=active & (bend > 0))
        x += length[:, None] * direction
        residual -= length[:, None] * product
        conditioned = precondition(residual)
        now = (residual * conditioned).sum(axis=(0, 2))
        direction *= np.divide(now, size, out=np.zeros_like(size), where=active)[:, None]
        direction += conditioned
        size = np.where(active, now, size)
    return x
