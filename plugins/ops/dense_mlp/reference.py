"""The NumPy reference of ``DenseMLP``."""

from __future__ import annotations

import numpy as np

from shadowllm.plugins.ops.nested_linear.reference import nested_linear
from shadowllm.plugins.reference import mlp_product


def dense_mlp(
    x: np.ndarray,
    up_w: np.ndarray,
    up_copy: np.ndarray,
    up_scales: np.ndarray,
    up_bias: np.ndarray | None,
    down_x: None,
    down_w: np.ndarray,
    down_copy: np.ndarray,
    down_scales: np.ndarray,
    down_bias: np.ndarray | None,
    *,
    activation: str,
    threshold: float = 0.0,
    gated: int,
) -> np.ndarray:
    """``DenseMLP``: x ``(T, D)``, weights as those of ``NestedLinear`` -> y ``(T, D)``. ``down_x`` is not used."""
    parts = np.split(nested_linear(x, up_w, up_copy, up_scales, up_bias), 1 + gated, axis=1)
    return nested_linear(mlp_product(activation, threshold, *parts), down_w, down_copy, down_scales, down_bias)
