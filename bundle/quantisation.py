"""Integer weights: rows of 8 or 4 bits with a scale per block of consecutive elements.

The layout of ONNX Runtime's ``MatMulNBits``, so that its dense layers and our sparse rows read the
same bytes: unsigned integers around a middle of ``2 ** (bits - 1)``, at 4 bits two to a byte with
the first in the lower half, and one float32 scale per block of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Of ``MatMulNBits``: its inputs rounded to 8 bits, which is what ONNX Runtime has fast kernels for.
ACCURACY_LEVEL = 4
CHUNK = 1 << 22  # elements quantised at a time: the temporaries are several times as large


@dataclass(frozen=True)
class Quantisation:
    """How weights are stored.

    Attributes:
        bits: 8 or 4 in files; fewer in `rounded` alone.
        block: consecutive elements of a row that share a scale.
    """

    bits: int
    block: int = 32

    @property
    def itemsize(self) -> float:
        """Bytes per element, its share of a scale included."""
        return self.bits / 8 + 4 / self.block

    def blocks(self, width: int) -> int:
        """Scales of a row; the last block may be padded."""
        return -(-width // self.block)

    def bytes(self, width: int) -> int:
        """Bytes of a row's integers."""
        return self.blocks(width) * self.block * self.bits // 8


WEIGHT_DTYPES = {"int8": Quantisation(8), "int4": Quantisation(4)}
# Of the copy of gate and up by which a quantised shadow scores neurons: with a scale for every 64 elements of a row it
# is under a fifth of a 16-bit MLP.
LOW_BIT_COPY = Quantisation(bits=4, block=64)


def quantise(matrix: np.ndarray, q: Quantisation) -> tuple[np.ndarray, np.ndarray]:
    """Round float32 ``(rows, width)`` to uint8 ``(rows, bytes)`` and float32 scales ``(rows, blocks)``.

    The element of a block that is farthest from zero lands on the end of the range, which reaches one
    step further below the middle than above it (as in GGUF's Q4_0).
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
    """Integers ``(rows, blocks, block)``, as floats, and scales ``(rows, blocks)``."""
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
    """Float32 ``(rows, width)`` as integers of any number of bits have it; nothing is packed."""
    integers, scales = _integers(matrix, q)
    values = (integers - np.float32(1 << (q.bits - 1))) * scales[..., None]
    return values.reshape(len(matrix), -1)[:, : matrix.shape[1]]


def dequantise(data: np.ndarray, scales: np.ndarray, width: int, q: Quantisation) -> np.ndarray:
    """Inverse of `quantise` up to rounding: float32 ``(rows, width)``."""
    if q.bits == 4:
        data = np.stack((data & 15, data >> 4), axis=-1).reshape(len(data), -1)
    values = data.astype(np.float32) - np.float32(1 << (q.bits - 1))
    return (values.reshape(*scales.shape, -1) * scales[..., None]).reshape(len(data), -1)[:, :width]


def dense_rows(weight: np.ndarray, scales: np.ndarray | None, width: int) -> np.ndarray:
    """A weight of an op as float32 ``(rows, width)``, whether it is of floats or of integers."""
    if scales is None:
        return weight.astype(np.float32)
    bits = 8 * weight.shape[1] // width
    return dequantise(weight, scales, width, Quantisation(bits, width // scales.shape[1]))
