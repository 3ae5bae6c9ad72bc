"""The NumPy reference of ``SelectTopK``; see `plugins.reference`."""

from __future__ import annotations

import numpy as np


def select_topk(scores: np.ndarray, counts: np.ndarray, cap: int) -> np.ndarray:
    """``SelectTopK``: scores float32 ``(R, N)``, counts int32 ``(R,)`` -> int32 ``(R, cap)``."""
    out = np.full((len(scores), cap), -1, dtype=np.int32)
    for row, count in enumerate(counts):
        order = np.argsort(-scores[row], kind="stable")  # stable: ties keep the lower index first
        out[row, :count] = np.sort(order[:count])
    return out
