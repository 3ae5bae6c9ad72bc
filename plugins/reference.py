"""Shared code for the NumPy references of the custom ops; the reference of each op is in its folder of `ops`.

The references are plain and slow, and every other backend is compared with them. They compute in float32 for every
input type. An output of type T has the type of ``x``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np

from shadowllm.bundle.quantisation import Quantisation, dense_rows, dequantise, dequantise_nested, nested_format
from shadowllm.models.activations import GELU_CUBIC, GELU_SQRT, QUICK_GELU_SLOPE

ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "drelu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf, otypes=[np.float32])(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x * 0.5 * (1 + np.tanh(GELU_SQRT * (x + GELU_CUBIC * x**3))),
    "quick_gelu": lambda x: x / (1 + np.exp(-QUICK_GELU_SLOPE * x)),
}


def each_selection(*rowwise: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let the reference of one selection take one for each sequence: it is then called for each sequence alone.

    There is one for each if ``count`` has a dimension ``(B,)``. Then every output has the first dimension B.

    Args:
        rowwise: inputs of which each sequence has its own part; besides ``x``, ``indices``, ``count`` and ``rest``.
    """
    apart = {"x", *rowwise}  # a part keeps the first dimension, of one sequence

    def decorate(op: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(op)

        @wraps(op)
        def run(*args: Any, **attributes: Any) -> Any:
            given = signature.bind(*args, **attributes).arguments
            if np.ndim(given.get("count", 0)) == 0:
                return op(**given)

            def part(name: str, value: Any, row: int) -> Any:
                if value is None or name not in apart | {"indices", "count", "rest"}:
                    return value
                return value[row : row + 1] if name in apart else value if np.ndim(value) == 0 else value[row]

            found = [
                op(**{name: part(name, value, row) for name, value in given.items()}) for row in range(len(given["x"]))
            ]
            if not isinstance(found[0], tuple):
                return np.concatenate(found)
            states, chosen = zip(*found, strict=True)
            return np.concatenate(states), np.stack(chosen)

        return run

    return decorate


def activate(activation: str, threshold: float, x: np.ndarray) -> np.ndarray:
    """The activation function of an MLP. ``threshold`` is that of FATReLU."""
    if activation == "fatrelu":
        return np.where(x <= np.float32(threshold), np.zeros_like(x), x)
    return ACTIVATIONS[activation](x)


def mlp_product(activation: str, threshold: float, first: np.ndarray, up: np.ndarray | None = None) -> np.ndarray:
    """The products that the rows of down are multiplied by, from the outputs of gate and up, or of up alone."""
    active = activate(activation, threshold, first)
    if up is None:
        return active
    return active * (np.maximum(up, 0) if activation == "drelu" else up)


def active(indices: np.ndarray, count: int, bound: int) -> np.ndarray:
    """The first ``count`` of ``indices``.

    Raises:
        IndexError: the count or an index is out of range.
    """
    if not 0 <= count <= len(indices):
        raise IndexError(f"count {count} is outside 0..{len(indices)}")
    found = indices[:count].astype(np.int64)
    if found.size and (found.min() < 0 or found.max() >= bound):
        bad = found[(found < 0) | (found >= bound)][0]
        raise IndexError(f"index {bad} is outside 0..{bound - 1}")
    return found


def copy_rows(copy: np.ndarray | None, scales: np.ndarray | None, width: int) -> np.ndarray:
    """A low-bit copy ``(rows, blocks, bytes)`` with its scales ``(rows, blocks)``, as float32 ``(rows, width)``.

    Raises:
        ValueError: the op needs the copy, and it is absent.
    """
    if copy is None or scales is None:
        raise ValueError("the low-bit copy is absent")
    q = Quantisation(bits=4, block=2 * copy.shape[2])
    return dequantise(copy.reshape(len(copy), -1), scales, width, q)


def full_rows(
    weight: np.ndarray,
    scales: np.ndarray | None,
    copy: np.ndarray | None,
    copy_scales: np.ndarray | None,
    width: int,
) -> np.ndarray:
    """A weight matrix as float32 ``(rows, width)``: of floats, of integers, or of residuals, which the copy completes.

    Raises:
        ValueError: the weight is a residual, and its copy is absent.
    """
    if weight.dtype != np.uint8 or scales is not None:
        return dense_rows(weight, scales, width)
    if copy is None or copy_scales is None:
        raise ValueError("integers without scales are a residual, but the low-bit copy is absent")
    q = nested_format(copy, weight)
    return dequantise_nested(copy.reshape(len(copy), -1), copy_scales, weight, width, q)


def largest(scores: np.ndarray, count: int) -> np.ndarray:
    """The ascending indices of the ``count`` largest scores ``(n,)``. Ties go to the lower index."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def padded(indices: np.ndarray, width: int) -> np.ndarray:
    """Indices as int32 ``(width,)``, -1 past their number."""
    found = np.full(width, -1, dtype=np.int32)
    found[: len(indices)] = indices
    return found
