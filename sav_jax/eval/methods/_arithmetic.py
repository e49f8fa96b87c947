"""Arithmetic that several methods on head features share.

The features stay where they are, in float32; what is copied is a block of rows or one layer. Products of long vectors
are float32 with sums in float64, and whatever is small (one head, the selected heads, a Gram matrix) is float64.

Axes: R rows, S support examples, C classes, L layers, N heads per layer, M = L * N heads, K selected heads, H head
width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import numpy as np

from sav_jax.eval.features import Heads

_ROWS = 2048  # of a similarity matrix at a time
_BLOCK = 2**22  # elements that a block of rows may grow to


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Keep BLAS to one thread: products as small as one head's are several times slower in two (measured). Also a
    decorator.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, "blas"):
        yield


def unit(vectors: np.ndarray) -> np.ndarray:
    """Scale vectors [..., H] to length 1; vectors of zeros stay."""
    norm = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(norm > 0, norm, 1)


def block_rows(elements: int) -> int:
    """How many rows to take at a time if each grows to so many elements: a power of two, at most 128."""
    return 1 << (max(1, min(128, _BLOCK // max(1, elements))).bit_length() - 1)


def similarities(rows: Heads, columns: Heads) -> Iterator[tuple[slice, np.ndarray]]:
    """Mean over all heads of the cosine between two examples: the inner product of ``x``, the concatenation of an
    example's heads, each scaled to length 1, divided by ``sqrt(M)``, so that ``|x| = 1``.

    Args:
      rows: R examples.
      columns: S examples.

    Yields:
      The place of some rows among the R, and float64 [r, S].
    """
    for start in range(0, len(rows), _ROWS):
        part = slice(start, min(start + _ROWS, len(rows)))
        some = Heads(rows.array, rows.rows[part])
        layers, per_layer = rows.shape[1:3]
        total = np.zeros((len(some), len(columns)))
        for layer in range(layers):
            left, right = (unit(heads.layers(layer, layer + 1)).reshape(len(heads), -1) for heads in (some, columns))
            total += left @ right.T
        yield part, total / (layers * per_layer)


def similarity(rows: Heads) -> np.ndarray:
    """The same of some examples to each other in one piece, float64 [R, R], exactly symmetric: only one half of it is
    computed.
    """
    whole = np.empty((len(rows), len(rows)))
    for start in range(0, len(rows), _ROWS):
        stop = min(start + _ROWS, len(rows))
        some, before = (Heads(rows.array, rows.rows[part]) for part in (slice(start, stop), slice(stop)))
        ((_, block),) = similarities(some, before)
        block[:, start:] = (block[:, start:] + block[:, start:].T) / 2
        whole[start:stop, :stop], whole[:start, start:stop] = block, block[:, :start].T
    return whole


def log_mean_probability(logits: Iterable[np.ndarray]) -> np.ndarray:
    """Logarithm of the mean over heads of each head's softmax: K times [R, C] -> [R, C]."""
    from scipy.special import log_softmax

    total, number = np.float64(-np.inf), 0
    for of_head in logits:
        total, number = np.logaddexp(total, log_softmax(of_head, axis=1)), number + 1
    return total - np.log(number)


def best_heads(scores: np.ndarray, num_heads: int) -> np.ndarray:
    """The heads with the highest scores, best first, of equals the first: [M] -> int [K]."""
    return np.argsort(-scores, kind="stable")[:num_heads]


def selected(heads: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Selected heads, each scaled to length 1: [R, L, N, H], int [K] -> float64 [R, K, H]."""
    layer, head = np.divmod(chosen, heads.shape[2])
    return unit(heads[:, layer, head].astype(np.float64))
