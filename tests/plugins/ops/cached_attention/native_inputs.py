"""Inputs of ``CachedAttention``."""

from __future__ import annotations

import numpy as np

Size = tuple[int, int, int, int, int, tuple[int, ...]]  # H, n_kv, d, capacity, S, last position of each sequence


def cached_inputs(size: Size, rope: bool = True, seed: int = 0) -> dict[str, np.ndarray | None]:
    heads, kv_heads, head_dim, capacity, seqlen, last = size
    rng = np.random.default_rng(seed)
    cache, angles = (len(last), kv_heads, capacity, head_dim), rng.uniform(0, 7, (capacity, head_dim // 2))
    return {
        "projected": rng.standard_normal((len(last) * seqlen, (heads + 2 * kv_heads) * head_dim)).astype(np.float32),
        "past_key": rng.standard_normal(cache).astype(np.float32),
        "past_value": rng.standard_normal(cache).astype(np.float32),
        "last": np.asarray(last, dtype=np.int32),
        "cos": np.cos(angles).astype(np.float32) if rope else None,
        "sin": np.sin(angles).astype(np.float32) if rope else None,
    }
