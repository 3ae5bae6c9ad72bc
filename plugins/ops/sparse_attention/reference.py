"""The NumPy reference of ``SparseAttention``; see `plugins.reference`."""

from __future__ import annotations

import math

import numpy as np

from shadowllm.plugins.reference import active, copy_rows, each_selection, full_rows, largest, padded


@each_selection("key", "value", "lengths", "cos", "sin")
def sparse_attention(
    x: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    lengths: np.ndarray,
    indices: np.ndarray | None,
    count: int,
    w_q: np.ndarray,
    b_q: np.ndarray | None,
    w_o: np.ndarray,
    b_o: np.ndarray | None,
    cos: np.ndarray | None = None,
    sin: np.ndarray | None = None,
    s_q: np.ndarray | None = None,
    s_o: np.ndarray | None = None,
    rest: int | None = None,
    c_q: np.ndarray | None = None,
    c_o: np.ndarray | None = None,
    cs_q: np.ndarray | None = None,
    cs_o: np.ndarray | None = None,
    score_weight: np.ndarray | None = None,
    score_bias: np.ndarray | None = None,
    *,
    n_heads: int,
    window: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """``SparseAttention``: x ``(B, S, D)``, cache ``(B, n_kv, C, d)`` -> ``(B, S, D)``, chosen ``(H,)``.

    With a selection for each sequence (see `each_selection`), chosen is ``(B, H)``.
    """
    batch, seqlen, width = x.shape
    capacity, head_dim = key.shape[2:]
    wide, group = x.astype(np.float32), n_heads // key.shape[1]
    visible = seen(capacity, lengths[:, None] - seqlen + np.arange(seqlen), window)
    if indices is None:
        heads = _largest(wide, score_weight, score_bias, count, n_heads)
    else:
        heads = active(indices, count, n_heads)
    y = np.zeros((batch, seqlen, width), dtype=np.float32)

    def add(heads: list[int], q_rows: np.ndarray, o_rows: np.ndarray) -> None:
        nonlocal y
        for head in heads:
            rows = slice(head * head_dim, (head + 1) * head_dim)
            query = wide @ q_rows[rows].T + (0 if b_q is None else b_q[rows].astype(np.float32))
            if cos is not None and sin is not None:
                query = rotate(query, cos.astype(np.float32), sin.astype(np.float32))
            keys, values = (cache[:, head // group].astype(np.float32) for cache in (key, value))
            y += attend(query, keys, values, visible) @ o_rows[rows]

    full_q, full_o = full_rows(w_q, s_q, c_q, cs_q, width), full_rows(w_o, s_o, c_o, cs_o, width)
    add(heads.tolist(), full_q, full_o)
    if rest:
        others = sorted(set(range(n_heads)) - set(heads.tolist()))
        add(others, copy_rows(c_q, cs_q, width), copy_rows(c_o, cs_o, width))
    return (y if b_o is None else y + b_o.astype(np.float32)).astype(x.dtype), padded(heads, n_heads)


def _largest(x: np.ndarray, weight: np.ndarray | None, bias: np.ndarray | None, count: int, n_heads: int) -> np.ndarray:
    """The heads of the groups with the largest mean scores."""
    if weight is None or bias is None:
        raise ValueError("without indices, score_weight and score_bias are needed")
    if not 0 <= count <= n_heads:
        raise IndexError(f"count {count} is outside 0..{n_heads}")
    together = n_heads // len(weight)
    groups = largest((x.reshape(-1, x.shape[2]) @ weight.T + bias).mean(axis=0), count // together)
    return (groups[:, None] * together + np.arange(together)).reshape(-1)


def seen(capacity: int, positions: np.ndarray, window: int) -> np.ndarray:
    """The mask ``(..., capacity)`` of tokens at ``positions``, which see the last ``window`` ones; 0 means all."""
    slots, last = np.arange(capacity), positions[..., None]
    return (slots <= last) & ((window == 0) | (slots > last - window))


def attend(query: np.ndarray, keys: np.ndarray, values: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """The attention of one head's queries ``(B, S, d)`` over its cache ``(B, C, d)``."""
    scores = np.where(visible, query @ keys.transpose(0, 2, 1) / math.sqrt(query.shape[2]), -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return (weights / weights.sum(axis=-1, keepdims=True)) @ values


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Half-split rotary embedding of ``(..., d)`` by ``(..., d / 2)`` tables."""
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
