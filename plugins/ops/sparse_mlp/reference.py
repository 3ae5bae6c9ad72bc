"""The NumPy reference of ``SparseMLP``; see `plugins.reference`."""

from __future__ import annotations

import numpy as np

from shadowllm.bundle.quantisation import dense_rows
from shadowllm.plugins.reference import ACTIVATIONS, active


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
