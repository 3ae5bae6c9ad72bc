"""Awkward scores: ties, neighbouring floats and the like."""

from __future__ import annotations

import numpy as np


def scores_of(kind: str, rows: int, n: int) -> np.ndarray:
    rng = np.random.default_rng(n)
    if kind == "normal":
        return rng.standard_normal((rows, n)).astype(np.float32)
    if kind == "ties":
        return rng.integers(-2, 3, (rows, n)).astype(np.float32) * np.float32(-0.0 if n % 2 else 1)
    if kind == "close":  # neighbouring floats: differ in the last digit of the radix only
        return (1 + rng.integers(0, 9, (rows, n)) * np.finfo(np.float32).eps).astype(np.float32)
    special = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-45, -1e-45, 3e38], dtype=np.float32)
    return rng.choice(special, (rows, n))
