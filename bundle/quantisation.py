"""Integer weights: rows of 8- or 4-bit integers, with one scale per block of consecutive elements.

The layout is that of ONNX Runtime's ``MatMulNBits``, so that its dense layers and our sparse rows
read the same format. Integers are unsigned, with the middle at ``2 ** (bits - 1)``. A byte holds two
4-bit integers, the first in its lower half. Each block of a row has one float32 scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Attribute of ``MatMulNBits``: its inputs are rounded to 8 bits. ONNX Runtime has fast kernels for this.
ACCURACY_LEVEL = 4
CHUNK = 1 << 22  # elements quantised at a time, because temporaries are several times as large


@dataclass(frozen=True)
class Quantisation:
    """How weights are stored.

    Attributes:
        bits: 8 or 4 in files; only `rounded` accepts other numbers.
        block: consecutive elements of a row that share a scale.
    """

    bits: int
    block: int = 32

    @property
    def itemsize(self) -> float:
        """Bytes per element, including the share of a scale."""
        return self.bits / 8 + 4 / self.block

    def blocks(self, width: int) -> int:
        """Return the scales per row; the last block may be padded."""
        return -(-width // self.block)

    def bytes(self, width: int) -> int:
        """Return the bytes of a row's integers."""
        return self.blocks(width) * self.block * self.bits // 8


WEIGHT_DTYPES = {"int8": Quantisation(8), "int4": Quantisation(4)}
# Format of the low-bit copy of gate and up, with which a quantised shadow scores neurons. With one scale per 64
# elements, the copy is under a fifth of a 16-bit MLP.
LOW_BIT_COPY = Quantisation(bits=4, block=64)


def quantise(matrix: np.ndarray, q: Quantisation) -> tuple[np.ndarray, np.ndarray]:
    """Round float32 ``(rows, width)`` to uint8 ``(rows, bytes)`` and float32 scales ``(rows, blocks)``.

    The element of a block that is farthest from zero becomes the lower end of the range, which has one
    more step below the middle than above it (as in GGUF's Q4_0).
    """
    rows, width = matrix.shape
    data = np.empty((rows, q.bytes(width)), dtype=np.uint8)
    scales = np.empty((rows, q.blocks(width)), dtype=np.float32)
    step = max(1, CHUNK // max(1, width))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        data[part], scales[part] = _quantise(matrix[part], q)
    return data, scales


def _quantise(matrix: np.ndarray, q: Quantisation) -> tuple[np.ndarray, np.ndarray]:
    integers, scales = _integers(matrix, q)
    found = integers.astype(np.uint8).reshape(len(matrix), -1)
    return (found if q.bits == 8 else found[:, ::2] | found[:, 1::2] << 4), scales


def _integers(matrix: np.ndarray, q: Quantisation) -> tuple[np.ndarray, np.ndarray]:
    """Return integers ``(rows, blocks, block)``, as floats, and scales ``(rows, blocks)``."""
    rows, width = matrix.shape
    middle = 1 << (q.bits - 1)
    padded = np.zeros((rows, q.blocks(width) * q.block), dtype=np.float32)
    padded[:, :width] = matrix
    blocks = padded.reshape(rows, -1, q.block)
    farthest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2)[..., None], axis=2)
    scales = (farthest / np.float32(-middle)).astype(np.float32)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    return np.clip(np.rint(blocks * inverse) + middle, 0, 2 * middle - 1), scales[..., 0]


def rounded(matrix: np.ndarray, q: Quantisation) -> np.ndarray:
    """Round float32 ``(rows, width)`` to integers of any number of bits and back, without packing."""
    integers, scales = _integers(matrix, q)
    values = (integers - np.float32(1 << (q.bits - 1))) * scales[..., None]
    return values.reshape(len(matrix), -1)[:, : matrix.shape[1]]


def dequantise(data: np.ndarray, scales: np.ndarray, width: int, q: Quantisation) -> np.ndarray:
    """Invert `quantise` up to rounding; return float32 ``(rows, width)``."""
    if q.bits == 4:
        data = np.stack((data & 15, data >> 4), axis=-1).reshape(len(data), -1)
    values = data.astype(np.float32) - np.float32(1 << (q.bits - 1))
    return (values.reshape(*scales.shape, -1) * scales[..., None]).reshape(len(data), -1)[:, :width]


def dense_rows(weight: np.ndarray, scales: np.ndarray | None, width: int) -> np.ndarray:
    """Return an op's weight, stored as floats or integers, as float32 ``(rows, width)``."""
    if scales is None:
        return weight.astype(np.float32)
    bits = 8 * weight.shape[1] // width
    return dequantise(weight, scales, width, Quantisation(bits, width // scales.shape[1]))
