"""The NumPy reference of ``SparseAttention``; see `plugins.reference`."""

from __future__ import annotations

import math

import numpy as np

from shadowllm.bundle.quantisation import dense_rows
from shadowllm.plugins.reference import active


def sparse_attention(
    x: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    lengths: np.ndarray,
    indices: np.ndarray,
    count: int,
    w_q: np.ndarray,
    b_q: np.ndarray | None,
    w_o: np.ndarray,
    b_o: np.ndarray | None,
    cos: np.ndarray | None = None,
    sin: np.ndarray | None = None,
    s_q: np.ndarray | None = None,
    s_o: np.ndarray | None = None,
    *,
    n_heads: int,
) -> np.ndarray:
    """``SparseAttention``: x ``(B, S, D)``, cache ``(B, n_kv, C, d)`` -> ``(B, S, D)``."""
    batch, seqlen, width = x.shape
    w_q, w_o = dense_rows(w_q, s_q, width), dense_rows(w_o, s_o, width)
    n_kv, capacity, head_dim = key.shape[1:]
    wide = x.astype(np.float32)
    y = np.zeros((batch, seqlen, w_o.shape[1]), dtype=np.float32)
    visible = np.arange(capacity) <= (lengths[:, None] - seqlen + np.arange(seqlen))[..., None]
    for head in active(indices, count, n_heads):
        rows = slice(head * head_dim, (head + 1) * head_dim)
        query = wide @ w_q[rows].T
        if b_q is not None:
            query = query + b_q[rows].astype(np.float32)
        if cos is not None and sin is not None:
            query = rotate(query, cos.astype(np.float32), sin.astype(np.float32))
        keys, values = (cache[:, head // (n_heads // n_kv)].astype(np.float32) for cache in (key, value))
        scores = np.where(visible, query @ keys.transpose(0, 2, 1) / math.sqrt(head_dim), -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        y += (weights / weights.sum(axis=-1, keepdims=True)) @ values @ w_o[rows]
    return (y if b_o is None else y + b_o.astype(np.float32)).astype(x.dtype)


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Half-split rotary embedding of ``(..., d)`` by ``(..., d / 2)`` tables."""
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
