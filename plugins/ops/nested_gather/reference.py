"""The NumPy reference of ``NestedGather``; see `plugins.reference`."""

from __future__ import annotations

import numpy as np

from shadowllm.plugins.reference import active, full_rows


def nested_gather(ids: np.ndarray, w: np.ndarray, copy: np.ndarray, scales: np.ndarray, *, width: int) -> np.ndarray:
    """``NestedGather``: ids int32 ``(R,)``, a residual w and its copy ``(N, blocks, bytes)`` -> float32 ``(R, width)``.

    Raises:
        IndexError: a number is out of range.
    """
    rows = active(ids, len(ids), len(copy))
    return full_rows(w[rows], None, copy[rows], scales[rows], width)
