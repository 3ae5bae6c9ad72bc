"""The NumPy reference of ``DecoderLayer``."""

from __future__ import annotations

from typing import Any

import numpy as np

from shadowllm.plugins.ops.cached_attention.reference import cached_attention
from shadowllm.plugins.ops.nested_linear.reference import nested_linear
from shadowllm.plugins.ops.sparse_mlp.reference import sparse_mlp

Inputs = dict[str, np.ndarray | None]


def decoder_layer(
    x: np.ndarray,
    norm: np.ndarray,
    post_norm: np.ndarray,
    *,
    n_heads: int,
    activation: str,
    window: int = 0,
    threshold: float = 0.0,
    epsilon: float = 1e-5,
    **inputs: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """``DecoderLayer``: x ``(T, D)`` and the inputs of its parts by name -> y ``(T, D)``, key, value, chosen."""
    hidden, key, value = add_attention(x, norm, inputs, n_heads, window, epsilon)
    mlp = of_part("mlp", inputs)
    sequences = len(mlp["count"]) if mlp["count"].ndim else 1
    normed = rms_norm(hidden, post_norm, epsilon).reshape(sequences, -1, x.shape[1])
    y, chosen = sparse_mlp(normed, **mlp, activation=activation, threshold=threshold)
    return hidden + y.reshape(x.shape), key, value, chosen


def add_attention(
    x: np.ndarray, norm: np.ndarray, inputs: Inputs, n_heads: int, window: int, epsilon: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The part of a layer before its MLP -> hidden states ``(T, D)``, key, value."""
    projected = nested_linear(rms_norm(x, norm, epsilon), **of_part("qkv", inputs))
    attended, key, value = cached_attention(projected, **of_part("attention", inputs), n_heads=n_heads, window=window)
    return x + nested_linear(attended, **of_part("out", inputs)), key, value


def rms_norm(x: np.ndarray, weights: np.ndarray, epsilon: float) -> np.ndarray:
    """Each row divided by the root of its mean square plus epsilon, times the weights."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(epsilon)) * weights


def of_part(prefix: str, inputs: Inputs) -> dict[str, Any]:
    """The inputs of a part, without the prefix of their names."""
    return {name.removeprefix(f"{prefix}_"): value for name, value in inputs.items() if name.startswith(f"{prefix}_")}
