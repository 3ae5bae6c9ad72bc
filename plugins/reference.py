"""NumPy references of the custom ops: plain, slow, and what every other backend is held against.

Computed in float32 whatever the input type, and returned in the type of ``x``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from shadowllm.bundle.quantisation import Quantisation, dense_rows, dequantise

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


def select_topk(scores: np.ndarray, counts: np.ndarray, cap: int) -> np.ndarray:
    """``SelectTopK``: scores float32 ``(R, N)``, counts int32 ``(R,)`` -> int32 ``(R, cap)``."""
    out = np.full((len(scores), cap), -1, dtype=np.int32)
    for row, count in enumerate(counts):
        order = np.argsort(-scores[row], kind="stable")  # stable: ties keep the lower index first
        out[row, :count] = np.sort(order[:count])
    return out


def score_neurons(
    x: np.ndarray,
    copy: np.ndarray,
    scales: np.ndarray,
    b_gate: np.ndarray | None,
    b_up: np.ndarray | None,
    lengths: np.ndarray,
    *,
    activation: str,
) -> np.ndarray:
    """``ScoreNeurons``: x ``(B, S, D)``, a copy ``(rows, blocks, bytes)`` of 4 bits -> float32 ``(1, F)``."""
    wide, act = x.reshape(-1, x.shape[2]).astype(np.float32), ACTIVATIONS[activation]
    q = Quantisation(bits=4, block=2 * copy.shape[2])
    y = wide @ dequantise(copy.reshape(len(copy), -1), scales, wide.shape[1], q).T
    biases = [bias.astype(np.float32) for bias in (b_gate, b_up) if bias is not None]
    first, *rest = np.split(y + np.concatenate(biases) if biases else y, len(copy) // len(lengths), axis=1)
    product = act(first) * rest[0] if rest else act(first)
    return (np.abs(product).mean(axis=0) * lengths)[None].astype(np.float32)


def sparse_mlp(
    x: np.ndarray,
    indices: np.ndarray,
    count: int,
    w_gate: np.ndarray | None,
    b_gate: np.ndarray | None,
    w_up: np.ndarray,
    b_up: np.ndarray | None,
    w_down: np.ndarray,
    b_down: np.ndarray | None,
    s_gate: np.ndarray | None = None,
    s_up: np.ndarray | None = None,
    s_down: np.ndarray | None = None,
    *,
    activation: str,
) -> np.ndarray:
    """``SparseMLP``: x ``(B, S, D)``, weights ``(F, D)`` or integers with scales -> ``(B, S, D)``."""
    rows, act, wide = active(indices, count, len(w_up)), ACTIVATIONS[activation], x.astype(np.float32)

    def project(weight: np.ndarray, scales: np.ndarray | None, bias: np.ndarray | None) -> np.ndarray:
        y = wide @ dense_rows(weight, scales, x.shape[2])[rows].T
        return y if bias is None else y + bias[rows].astype(np.float32)

    up = project(w_up, s_up, b_up)
    hidden = act(up) if w_gate is None else act(project(w_gate, s_gate, b_gate)) * up
    y = hidden @ dense_rows(w_down, s_down, x.shape[2])[rows]
    return (y if b_down is None else y + b_down.astype(np.float32)).astype(x.dtype)


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
