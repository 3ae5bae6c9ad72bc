"""The NumPy reference of ``NestedLinear``; see `plugins.reference`."""

from __future__ import annotations

import numpy as np

from shadowllm.plugins.reference import full_rows


def nested_linear(
    x: np.ndarray, w: np.ndarray, copy: np.ndarray, scales: np.ndarray, bias: np.ndarray | None = None
) -> np.ndarray:
    """``NestedLinear``: x ``(R, D)``, a residual w and its copy ``(N, blocks, bytes)`` -> ``(R, N)`` of x's type."""
    y = x.astype(np.float32) @ full_rows(w, None, copy, scales, x.shape[1]).T
    return (y if bias is None else y + bias.astype(np.float32)).astype(x.dtype)
