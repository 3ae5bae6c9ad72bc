"""Inputs of ``NestedLinear``, and its product with and without the rounding of the native op."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from shadowllm.bundle.quantisation import unpacked

Inputs = dict[str, np.ndarray | None]
Size = tuple[int, int, int, int]  # T, K, N, block


def linear_inputs(size: Size, bias: bool = True, seed: int = 0, residual_bits: int = 4) -> Inputs:
    tokens, width, rows, block = size
    rng = np.random.default_rng(seed)
    blocks = -(-width // block)
    integers = rng.integers(least(residual_bits), 1 << (4 + residual_bits), (rows, blocks * block))
    copy, w = parts_of(integers, residual_bits)
    return {
        "x": rng.standard_normal((tokens, width)).astype(np.float32),
        "w": w,
        "copy": copy.reshape(rows, blocks, block // 2),
        "scales": rng.uniform(1e-3, 1e-2, (rows, blocks)).astype(ml_dtypes.bfloat16).astype(np.float32),
        "bias": rng.standard_normal(rows).astype(np.float32) if bias else None,
    }


def least(residual_bits: int) -> int:
    """The lowest integer that `quantise_nested` writes, as both parts store it."""
    return 1 << (residual_bits - 1)


def parts_of(integers: np.ndarray, residual_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of the copy and of the residual, ``(N, bytes)``."""
    low = integers & ((1 << residual_bits) - 1)
    return _packed(integers >> residual_bits, 4), _packed(low, residual_bits)


def _packed(integers: np.ndarray, bits: int) -> np.ndarray:
    each = 8 // bits
    places = np.arange(each) * bits
    return (integers.reshape(len(integers), integers.shape[1] // each, each) << places).sum(axis=2).astype(np.uint8)


def whole_rows(inputs: Inputs, dtype: type = np.float64) -> np.ndarray:
    """The matrix with the padding of its last blocks, ``(N, blocks, block)``."""
    copy, w, scales = inputs["copy"], inputs["w"], inputs["scales"]
    rows, blocks, half = copy.shape
    high = unpacked(copy.reshape(rows, -1), 4).astype(dtype).reshape(rows, blocks, 2 * half) - 8
    bits = 4 * w.size // copy.size
    low = unpacked(w, bits).astype(dtype).reshape(high.shape) - (1 << (bits - 1))
    return (high + low / (1 << bits)) * scales.astype(dtype)[..., None]


def exactly(inputs: Inputs, dtype: type = np.float64) -> np.ndarray:
    """The product without rounding of x."""
    return _product(inputs, inputs["x"].astype(dtype), dtype)


def rounded(inputs: Inputs, dtype: type = np.float64) -> np.ndarray:
    """The product if x is rounded to 8 bits with a scale per block."""
    _, blocks, half = inputs["copy"].shape
    x = np.zeros((len(inputs["x"]), blocks * half * 2), np.float32)
    x[:, : inputs["x"].shape[1]] = inputs["x"]
    x = x.reshape(len(x), blocks, half * 2)
    most = np.abs(x).max(axis=-1, keepdims=True)
    inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 1e-30)
    integers, steps = np.rint(x * inverse), most / np.float32(127)
    return _product(inputs, (integers.astype(dtype) * steps).reshape(len(x), -1), dtype)


def _product(inputs: Inputs, x: np.ndarray, dtype: type) -> np.ndarray:
    y = x @ whole_rows(inputs, dtype).reshape(len(inputs["copy"]), -1)[:, : x.shape[1]].T
    return y if inputs["bias"] is None else y + inputs["bias"].astype(dtype)
