"""Inputs of ``LinearW8A8``."""

from __future__ import annotations

import ml_dtypes
import numpy as np

Size = tuple[int, int, int, int]  # T, K, N, block


def linear_inputs(size: Size, bias: bool = True, seed: int = 0) -> dict[str, np.ndarray | None]:
    tokens, width, rows, block = size
    rng = np.random.default_rng(seed)
    blocks = -(-width // block)
    return {
        "x": rng.standard_normal((tokens, width)).astype(np.float32),
        "w": rng.integers(0, 256, (rows, blocks, block), dtype=np.uint8),
        "scales": rng.uniform(1e-3, 1e-2, (rows, blocks)).astype(ml_dtypes.bfloat16).astype(np.float32),
        "bias": rng.standard_normal(rows).astype(np.float32) if bias else None,
    }
