"""The norm that a native op computes before its block, as inputs of the op and in NumPy."""

from __future__ import annotations

import numpy as np

EPSILON = 1e-5


def norm_inputs(hidden: int, layernorm: bool) -> dict[str, np.ndarray | None]:
    rng = np.random.default_rng(9)
    weight, bias = rng.uniform(0.5, 2, (2, hidden)).astype(np.float32)
    return {"norm_weight": weight, "norm_bias": bias if layernorm else None}


def normed(inputs: dict[str, np.ndarray | None]) -> np.ndarray:
    """The normed hidden states, computed in float64."""
    x, weight, bias = inputs["x"].astype(np.float64), inputs["norm_weight"], inputs["norm_bias"]
    if bias is not None:
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * weight
    return (y if bias is None else y + bias).astype(np.float32)


def without_norm(inputs: dict[str, np.ndarray | None]) -> dict[str, np.ndarray | None]:
    """The inputs of the op that gets the normed hidden states."""
    return inputs | {"x": normed(inputs), "norm_weight": None, "norm_bias": None}
