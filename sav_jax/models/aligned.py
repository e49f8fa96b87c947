"""Host arrays that begin where XLA wants arrays to begin: its CPU devices use them in place, without a copy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

ALIGNMENT = 64  # bytes


def is_aligned(x: np.ndarray) -> bool:
    """Whether an array can be used in place."""
    return x.ctypes.data % ALIGNMENT == 0 and x.flags.c_contiguous


def aligned_empty(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """As ``np.empty``."""
    return _aligned(np.empty, shape, np.dtype(dtype))


def aligned_zeros(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """As ``np.zeros``."""
    return _aligned(np.zeros, shape, np.dtype(dtype))


def _aligned(make: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    room: np.ndarray = make(size + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + size].view(dtype).reshape(shape)
