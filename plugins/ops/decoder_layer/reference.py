"""The NumPy reference of ``DecoderLayer``."""

from __future__ import annotations

from typing import Any

import numpy as np

from shadowllm.plugins.ops.cached_attention.reference import cached_attention
from shadowllm.plugins.ops.decoder_layer.schema import STAGES
from shadowllm.plugins.ops.linear_w8a8.reference import linear_w8a8
from shadowllm.plugins.ops.sparse_mlp.reference import sparse_mlp


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
    qkv, attention, out, mlp = (_of_part(prefix, inputs) for prefix, _ in STAGES)
    projected = linear_w8a8(rms_norm(x, norm, epsilon), **qkv)
    attended, key, value = cached_attention(projected, **attention, n_heads=n_heads, window=window)
    hidden = x + linear_w8a8(attended, **out)
    sequences = len(mlp["count"]) if mlp["count"].ndim else 1
    normed = rms_norm(hidden, post_norm, epsilon).reshape(sequences, -1, x.shape[1])
    y, chosen = sparse_mlp(normed, **mlp, activation=activation, threshold=threshold)
    return hidden + y.reshape(x.shape), key, value, chosen


def rms_norm(x: np.ndarray, weights: np.ndarray, epsilon: float) -> np.ndarray:
    """Each row divided by the root of its mean square plus epsilon, times the weights."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(epsilon)) * weights


def _of_part(prefix: str, inputs: dict[str, np.ndarray | None]) -> dict[str, Any]:
    return {name.removeprefix(f"{prefix}_"): value for name, value in inputs.items() if name.startswith(f"{prefix}_")}
