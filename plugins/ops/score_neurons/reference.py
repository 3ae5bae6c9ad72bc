"""The NumPy reference of ``ScoreNeurons``; see `plugins.reference`."""

from __future__ import annotations

import numpy as np

from shadowllm.bundle.quantisation import Quantisation, dequantise
from shadowllm.plugins.reference import each_selection, mlp_product


@each_selection()
def score_neurons(
    x: np.ndarray,
    copy: np.ndarray,
    scales: np.ndarray,
    b_gate: np.ndarray | None,
    b_up: np.ndarray | None,
    down_norms: np.ndarray,
    count: int | np.ndarray = 0,
    *,
    activation: str,
    threshold: float = 0.0,
) -> np.ndarray:
    """``ScoreNeurons``: x ``(B, S, D)``, 4-bit copy ``(rows, blocks, bytes)`` -> float32 ``(1, F)``.

    With a selection for each sequence (see `each_selection`), ``(B, F)``. What ``count`` says does not matter here.
    """
    wide = x.reshape(-1, x.shape[2]).astype(np.float32)
    q = Quantisation(bits=4, block=2 * copy.shape[2])
    y = wide @ dequantise(copy.reshape(len(copy), -1), scales, wide.shape[1], q).T
    biases = [bias.astype(np.float32) for bias in (b_gate, b_up) if bias is not None]
    parts = np.split(y + np.concatenate(biases) if biases else y, len(copy) // len(down_norms), axis=1)
    product = mlp_product(activation, threshold, *parts)
    return (np.abs(product).mean(axis=0) * down_norms)[None].astype(np.float32)
