"""The NumPy reference of ``CachedAttention``."""

from __future__ import annotations

import numpy as np

from shadowllm.plugins.ops.sparse_attention.reference import attend, rotate, seen


def cached_attention(
    projected: np.ndarray,
    past_key: np.ndarray,
    past_value: np.ndarray,
    last: np.ndarray,
    cos: np.ndarray | None = None,
    sin: np.ndarray | None = None,
    *,
    n_heads: int,
    window: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``CachedAttention``: projected ``(B*S, (H+2*n_kv)*d)``, cache ``(B, n_kv, C, d)`` -> ``(B*S, H*d)``, cache."""
    batch, kv_heads, capacity, head_dim = past_key.shape
    seqlen = len(projected) // batch
    heads = projected.reshape(batch, seqlen, n_heads + 2 * kv_heads, head_dim).transpose(0, 2, 1, 3)
    query, new_key, new_value = np.split(heads, [n_heads, n_heads + kv_heads], axis=1)
    positions = last[:, None] - seqlen + 1 + np.arange(seqlen)
    if cos is not None and sin is not None:
        tables = cos[positions][:, None], sin[positions][:, None]
        query, new_key = rotate(query, *tables), rotate(new_key, *tables)
    key, value = past_key.copy(), past_value.copy()
    for row in range(batch):
        key[row, :, positions[row]] = new_key[row].transpose(1, 0, 2)
        value[row, :, positions[row]] = new_value[row].transpose(1, 0, 2)
    visible = seen(capacity, positions, window)
    group = n_heads // kv_heads
    y = [attend(query[:, head], key[:, head // group], value[:, head // group], visible) for head in range(n_heads)]
    return np.concatenate(y, axis=-1).reshape(len(projected), n_heads * head_dim), key, value
