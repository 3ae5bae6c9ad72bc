"""The NumPy reference of ``LinearW8A8``."""

from __future__ import annotations

import numpy as np

LARGEST = np.float32(127)


def linear_w8a8(x: np.ndarray, w: np.ndarray, scales: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """``LinearW8A8``: x ``(T, K)``, w uint8 ``(N, blocks, block)``, scales ``(N, blocks)`` -> ``(T, N)``.

    The products are added in the type of the scales.
    """
    rows, blocks, block = w.shape
    padded = np.zeros((len(x), blocks * block), np.float32)
    padded[:, : x.shape[1]] = x
    integers, steps = round_inputs(padded.reshape(len(x), blocks, block))
    inputs = (integers.astype(scales.dtype) * steps).reshape(len(x), -1)
    weights = (w.astype(scales.dtype) - 128) * scales[..., None]
    y = inputs @ weights.reshape(rows, -1).T
    return y if bias is None else y + bias


def round_inputs(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round float32 ``(..., block)`` to integers of -127..127 and float32 steps ``(..., 1)``, one for each block."""
    most = np.abs(x).max(axis=-1, keepdims=True)
    inverse = np.divide(LARGEST, most, out=np.zeros_like(most), where=most > 1e-30)
    return np.rint(x * inverse), most / LARGEST
