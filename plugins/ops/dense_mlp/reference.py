"""The NumPy reference of ``DenseMLP``."""

from __future__ import annotations

import numpy as np

from shadowllm.plugins.ops.linear_w8a8.reference import linear_w8a8
from shadowllm.plugins.reference import mlp_product


def dense_mlp(
    x: np.ndarray,
    up_w: np.ndarray,
    up_scales: np.ndarray,
    up_bias: np.ndarray | None,
    down_x: None,
    down_w: np.ndarray,
    down_scales: np.ndarray,
    down_bias: np.ndarray | None,
    *,
    activation: str,
    threshold: float = 0.0,
    gated: int,
) -> np.ndarray:
    """``DenseMLP``: x ``(T, D)``, weights as those of ``LinearW8A8`` -> y ``(T, D)``. ``down_x`` is not used."""
    parts = np.split(linear_w8a8(x, up_w, up_scales, up_bias), 1 + gated, axis=1)
    return linear_w8a8(mlp_product(activation, threshold, *parts), down_w, down_scales, down_bias)
