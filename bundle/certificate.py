"""The bound that proves a largest logit: how far the product of a row of the copy may be from the exact one.

With a weighting d > 0, the Cauchy-Schwarz inequality says ``|(w - copy) x| <= |(w - copy) / d| * |d * x|``. Activations
of a few dimensions are often far larger than the others. A weighting that is small there makes the bound several
times tighter than ``|w - copy| * |x|``.

A kernel also rounds. Its products of a row and x, from the copy and from the table together, are wrong by at most
``ROUNDING * |copy / d| * |d * x|``, and `copy_errors` adds this part. It covers sums of 8192 products in float32 in any
order. A kernel that rounds x itself must enlarge the bound where its own error is larger; see ``native.cpp``.
"""

from __future__ import annotations

import numpy as np

from shadowllm.bundle.quantisation import LOW_BIT_COPY, Matrix, dequantise

ROUNDING = 2.0**-10
ROWS = 1024  # rows that are processed at a time, because temporaries are float64


def copy_errors(table: Matrix, copy: np.ndarray, scales: np.ndarray, weighting: np.ndarray | None = None) -> np.ndarray:
    """The input ``errors`` of the op, float32 ``(V,)``.

    Args:
        table: ``(V, D)``, in the type in which it is stored.
        copy: uint8 ``(V, blocks, bytes)``.
        scales: float32 ``(V, blocks)``.
        weighting: float32 ``(D,)``, positive; None is the same as ones.
    """
    errors = np.empty(len(table), dtype=np.float32)
    weights = np.ones(table.shape[1]) if weighting is None else weighting.astype(np.float64)
    for start in range(0, len(table), ROWS):
        part = slice(start, start + ROWS)
        integers = copy[part].reshape(-1, copy[0].size)
        rows = dequantise(integers, scales[part], table.shape[1], LOW_BIT_COPY) / weights
        distance = np.linalg.norm(table[part].astype(np.float32) / weights - rows, axis=1)
        bound = distance + ROUNDING * np.linalg.norm(rows, axis=1)
        errors[part] = np.nextafter(bound.astype(np.float32), np.float32(np.inf))
    return errors


def best_weighting(inputs: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """The weighting ``(D,)`` that makes the bound smallest on average.

    Args:
        inputs: mean squares of x over some tokens, ``(D,)``.
        errors: mean squares of the table minus its copy over the rows, ``(D,)``.
    """
    floor = 1e-6 * np.maximum(inputs.mean(), 1e-30), 1e-6 * np.maximum(errors.mean(), 1e-30)
    ratio = np.maximum(errors, floor[1]) / np.maximum(inputs, floor[0])
    # Only ratios of weights matter, so a mean of 1 keeps products with them in range.
    weights = (ratio / np.exp(np.log(ratio).mean())) ** 0.25
    return weights.astype(np.float32)
