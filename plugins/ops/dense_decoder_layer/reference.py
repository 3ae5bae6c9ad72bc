"""The NumPy reference of ``DenseDecoderLayer``."""

from __future__ import annotations

import numpy as np

from shadowllm.plugins.ops.decoder_layer.reference import add_attention, of_part, rms_norm
from shadowllm.plugins.ops.dense_mlp.reference import dense_mlp


def dense_decoder_layer(
    x: np.ndarray,
    norm: np.ndarray,
    post_norm: np.ndarray,
    *,
    n_heads: int,
    activation: str,
    gated: int,
    window: int = 0,
    threshold: float = 0.0,
    epsilon: float = 1e-5,
    **inputs: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``DenseDecoderLayer``: x ``(T, D)`` and the inputs of its parts by name -> y ``(T, D)``, key, value."""
    hidden, key, value = add_attention(x, norm, inputs, n_heads, window, epsilon)
    mlp = {"down_x": None} | of_part("mlp", inputs)
    y = dense_mlp(rms_norm(hidden, post_norm, epsilon), **mlp, activation=activation, threshold=threshold, gated=gated)
    return hidden + y, key, value
