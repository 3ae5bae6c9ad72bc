"""What the NumPy references of the custom ops share; each op's own is in its folder of `ops`.

They are plain, slow, and what every other backend is held against: computed in float32 whatever the input
type, and returned in the type of ``x``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf, otypes=[np.float32])(x / math.sqrt(2))),
}


def active(indices: np.ndarray, count: int, bound: int) -> np.ndarray:
    """The first ``count`` of ``indices``.

    Raises:
        IndexError: the count or an index is out of range.
    """
    if not 0 <= count <= len(indices):
        raise IndexError(f"count {count} is outside 0..{len(indices)}")
    found = indices[:count].astype(np.int64)
    if found.size and (found.min() < 0 or found.max() >= bound):
        bad = found[(found < 0) | (found >= bound)][0]
        raise IndexError(f"index {bad} is outside 0..{bound - 1}")
    return found
