"""Integer weights: rows of integers, with one scale per block of consecutive elements.

The layout is that of ONNX Runtime's ``MatMulNBits``, so that its dense layers and our sparse rows
read the same format. Integers are unsigned, with the middle at ``2 ** (bits - 1)``. A byte holds one 8-bit, two
4-bit or four 2-bit integers, the first in its lowest bits. Each block of a row has one float32 scale. It is a bfloat16
number, so that a kernel can keep it in 16 bits.

Integers may be *nested*. Then an integer ``q`` is stored in two parts, ``q = 2^r * copy + residual``, with
``copy = floor((q + 2^(r-1)) / 2^r)`` and a residual of r bits. The first part, with ``2^r`` times the scale of q,
is the low-bit copy of the matrix, in the same format as any other low-bit copy. The residual has the scales of the
copy divided by ``2^r``, so none are stored for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import ml_dtypes
import numpy as np

from shadowllm.errors import UserError

# Attribute of ``MatMulNBits``: its inputs are rounded to 8 bits. ONNX Runtime has fast kernels for this.
ACCURACY_LEVEL = 4
MOST_STORED = 8  # bits of integers in files; more are only for analysis, and their steps are finer than a scale's
CHUNK = 1 << 20  # elements quantised at a time, because temporaries are several times as large


class Matrix(Protocol):
    """A matrix ``(rows, width)`` that gives slices of its rows as arrays, for example an array."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Quantisation:
    """How weights are stored.

    Attributes:
        bits: 8, 4 or 2 in files, or the sum over both parts of nested integers; only `rounded` accepts other numbers.
        block: consecutive elements of a row that share a scale.
        residual_bits: bits of the residual of nested integers, 4 or 2; 0 if the integers are stored in one part.
        scale_bytes: bytes of a scale in the memory of the native ops. Files have float32.
    """

    bits: int
    block: int = 32
    residual_bits: int = 0
    scale_bytes: int = 2

    @property
    def copy(self) -> Quantisation:
        """The format of the first part of nested integers."""
        return Quantisation(self.bits - self.residual_bits, self.block)

    @property
    def residual(self) -> Quantisation:
        """The format of the second part of nested integers."""
        return Quantisation(self.residual_bits, self.block)

    @property
    def residual_step(self) -> float:
        """The scale of the residual divided by that of the copy: a power of two, so products with it are exact."""
        return 2.0**-self.residual_bits

    @property
    def lowest(self) -> int:
        """The least signed integer."""
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """The largest signed integer. That of nested integers has a residual in its own range."""
        return -self.lowest - 1 - (1 << self.residual_bits >> 1)

    @property
    def itemsize(self) -> float:
        """Bytes per element, including the share of a scale."""
        return self.bits / 8 + self.scale_bytes / self.block

    @property
    def joined_itemsize(self) -> float:
        """Bytes per element of nested integers that are joined to 8 bits, including the share of a float32 scale."""
        return 1 + 4 / self.block

    @property
    def itemsize_beside_copy(self) -> float:
        """Bytes per element of a full row beside its low-bit copy, which is read too: a residual, if there is one."""
        return self.residual_bits / 8 if self.residual_bits else self.itemsize

    def blocks(self, width: int) -> int:
        """Return the scales per row; the last block may be padded."""
        return -(-width // self.block)

    def bytes(self, width: int) -> int:
        """Return the bytes of a row's integers."""
        return self.blocks(width) * self.block * self.bits // 8


# Format of the low-bit copy. With one scale per 64 elements, the copy of gate and up is under a fifth of a 16-bit MLP.
LOW_BIT_COPY = Quantisation(bits=4, block=64)
WEIGHT_DTYPES = {"int8": Quantisation(8, scale_bytes=4), "int4": Quantisation(4, scale_bytes=4)}
# Of bundles with a low-bit copy of all matrices. All types have the same copy. Two parts of 3 bits for int6 would need
# kernels of their own, and a copy of 3 bits is far worse than one of 4.
NESTED = {"int8": Quantisation(8, 64, residual_bits=4), "int6": Quantisation(6, 64, residual_bits=2)}
# Sessions of ONNX Runtime round float matrices to it in a step of mixed precision.
ROUNDED = NESTED["int8"]


def quantise(matrix: Matrix, q: Quantisation) -> tuple[np.ndarray, np.ndarray]:
    """Round float32 ``(rows, width)`` to uint8 ``(rows, bytes)`` and float32 scales ``(rows, blocks)``.

    The element of a block that is farthest from zero becomes the lower end of the range, which has one
    more step below the middle than above it (as in GGUF's Q4_0).
    """
    data = np.empty((len(matrix), q.bytes(matrix.shape[1])), dtype=np.uint8)
    scales = np.empty((len(matrix), q.blocks(matrix.shape[1])), dtype=np.float32)
    for part in slices(matrix):
        integers, scales[part] = _integers(matrix[part], q)
        data[part] = _packed(integers, q.bits)
    return data, scales


def quantise_nested(matrix: Matrix, q: Quantisation) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Round float32 ``(rows, width)`` to nested integers.

    Returns:
        The copy uint8 ``(rows, bytes)``, its scales float32 ``(rows, blocks)``, the residual uint8 ``(rows, bytes)``.
    """
    rows, width = matrix.shape
    copy = np.empty((rows, q.copy.bytes(width)), dtype=np.uint8)
    residual = np.empty((rows, q.residual.bytes(width)), dtype=np.uint8)
    scales = np.empty((rows, q.blocks(width)), dtype=np.float32)
    for part in slices(matrix):
        integers, steps = _integers(matrix[part], q)
        high = _high(integers, q)
        copy[part], scales[part] = _packed(high, q.copy.bits), steps / np.float32(q.residual_step)
        residual[part] = _packed(integers - high / np.float32(q.residual_step), q.residual_bits)
    return copy, scales, residual


def residual_of(matrix: Matrix, copy: np.ndarray, scales: np.ndarray, q: Quantisation) -> np.ndarray:
    """The residual that completes a low-bit copy of float32 ``(rows, width)`` to nested integers.

    The copies of older bundles were not made for nested integers, and end early above zero. There some are cut off.

    Args:
        copy, scales: as `quantise` returns them.
        q: format of the nested integers.

    Returns:
        uint8 ``(rows, bytes)``.
    """
    rows, width = matrix.shape
    residual = np.empty((rows, q.residual.bytes(width)), dtype=np.uint8)
    steps = scales * np.float32(q.residual_step)
    inverse = _inverse(steps)
    for part in slices(matrix, share=8):  # so few that they stay in the processor's cache
        high = unpacked(copy[part], q.copy.bits).astype(np.float32) + np.float32(q.copy.lowest)
        blocks = np.zeros_like(high)
        blocks[:, :width] = matrix[part]
        blocks = blocks.reshape(*steps[part].shape, -1)
        blocks *= inverse[part, :, None]
        blocks -= high.reshape(blocks.shape) / np.float32(q.residual_step)
        integers = np.clip(np.rint(blocks, out=blocks), q.residual.lowest, q.residual.highest, out=blocks)
        residual[part] = _packed(integers, q.residual_bits)
    return residual


def slices(matrix: Matrix, share: int = 1) -> list[slice]:
    """Return slices of a matrix's rows, each of about `CHUNK` / ``share`` elements."""
    step = max(1, CHUNK // share // max(1, matrix.shape[1]))
    return [slice(start, start + step) for start in range(0, len(matrix), step)]


def _integers(matrix: np.ndarray, q: Quantisation) -> tuple[np.ndarray, np.ndarray]:
    """Return signed integers ``(rows, blocks, block)``, as floats, and scales ``(rows, blocks)``."""
    rows, width = matrix.shape
    padded = np.zeros((rows, q.blocks(width) * q.block), dtype=np.float32)
    padded[:, :width] = matrix
    blocks = padded.reshape(rows, -1, q.block)
    place = np.abs(blocks).argmax(axis=2)[..., None]
    scales = (np.take_along_axis(blocks, place, axis=2) / np.float32(q.lowest)).astype(np.float32)
    if q.residual_bits:
        # The range of nested integers ends early above zero. A block with larger elements there has a larger scale.
        above = (blocks * _inverse(scales)).max(axis=2, keepdims=True) / np.float32(q.highest)
        scales *= np.maximum(1, above)
    if q.bits <= MOST_STORED:
        scales = scales.astype(ml_dtypes.bfloat16).astype(np.float32)
    integers = np.clip(np.rint(blocks * _inverse(scales)), q.lowest, q.highest)
    if not q.residual_bits:
        return integers, scales[..., 0]
    # The farthest element stays the farthest, so that rounding again changes nothing.
    farthest = np.minimum(np.take_along_axis(integers, place, axis=2), -q.highest - 1)
    np.put_along_axis(integers, place, np.where(scales != 0, farthest, 0), axis=2)
    return integers, scales[..., 0]


def _inverse(scales: np.ndarray) -> np.ndarray:
    """``1 / scales``, and 0 where they are 0."""
    return np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)


def _high(integers: np.ndarray, q: Quantisation) -> np.ndarray:
    """The first part of nested integers: the nearest multiple of ``2^r``, divided by it; ties go up."""
    return np.floor(integers * np.float32(q.residual_step) + np.float32(0.5))


def _packed(integers: np.ndarray, bits: int) -> np.ndarray:
    """Signed integers ``(rows, blocks, block)`` as bytes ``(rows, bytes)``."""
    found = (integers + (1 << (bits - 1))).astype(np.uint8).reshape(len(integers), -1)
    each = 8 // bits
    data = found[:, ::each]
    for place in range(1, each):
        data = data | found[:, place::each] << np.uint8(bits * place)
    return data


def rounded(matrix: np.ndarray, q: Quantisation) -> np.ndarray:
    """Round float32 ``(rows, width)`` to integers of any number of bits and back, without packing."""
    return _by_parts(matrix, lambda rows: _scaled(*_integers(rows, q), matrix.shape[1]))


def rounded_copy(matrix: np.ndarray, q: Quantisation | None) -> np.ndarray:
    """The values of the low-bit copy of float32 ``(rows, width)``, without packing.

    Args:
        q: format of the matrix. The copy is the first part of its integers if they are nested, else of `ROUNDED`,
            so that a session can complete it.
    """
    nested = _nested(q)

    def copied(rows: np.ndarray) -> np.ndarray:
        integers, scales = _integers(rows, nested)
        return _scaled(_high(integers, nested), scales / np.float32(nested.residual_step), matrix.shape[1])

    return _by_parts(matrix, copied)


def _nested(q: Quantisation | None) -> Quantisation:
    """The nested integers whose first part is the low-bit copy of a matrix of this format."""
    return q if q and q.residual_bits else ROUNDED


def _by_parts(matrix: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Apply a function to slices of the rows of a matrix; the result is float32 and has its shape."""
    found = np.empty(matrix.shape, dtype=np.float32)
    for part in slices(matrix):
        found[part] = change(matrix[part])
    return found


def quantised_copy(matrix: Matrix, q: Quantisation | None) -> tuple[np.ndarray, np.ndarray]:
    """The low-bit copy of float32 ``(rows, width)``: uint8 ``(rows, bytes)``, float32 scales ``(rows, blocks)``.

    Args:
        q: as in `rounded_copy`.
    """
    return quantise_nested(matrix, _nested(q))[:2]


def _scaled(integers: np.ndarray, scales: np.ndarray, width: int) -> np.ndarray:
    return (integers * scales[..., None]).reshape(len(integers), -1)[:, :width]


def unpacked(data: np.ndarray, bits: int) -> np.ndarray:
    """The unsigned integers of bytes ``(rows, bytes)``, uint8 ``(rows, elements)``."""
    places = [data >> (bits * place) & ((1 << bits) - 1) for place in range(8 // bits)]
    return np.stack(places, axis=-1).reshape(len(data), -1) if bits < 8 else data


def dequantise(data: np.ndarray, scales: np.ndarray, width: int, q: Quantisation) -> np.ndarray:
    """Invert `quantise` up to rounding; return float32 ``(rows, width)``."""
    values = unpacked(data, q.bits).astype(np.float32) - np.float32(1 << (q.bits - 1))
    return _scaled(values.reshape(*scales.shape, -1), scales, width)


def dequantise_nested(
    copy: np.ndarray, scales: np.ndarray, residual: np.ndarray, width: int, q: Quantisation
) -> np.ndarray:
    """Invert `quantise_nested` up to rounding; return float32 ``(rows, width)``."""
    fine = scales * np.float32(q.residual_step)
    return dequantise(copy, scales, width, q.copy) + dequantise(residual, fine, width, q.residual)


def joined(copy: np.ndarray, residual: np.ndarray, q: Quantisation) -> np.ndarray:
    """Nested integers ``(rows, bytes)`` in one part: uint8 ``(rows, elements)`` with the middle at 128."""
    whole = unpacked(copy, q.copy.bits) << np.uint8(q.residual_bits) | unpacked(residual, q.residual_bits)
    middle = (1 << (q.bits - 1)) + (1 << (q.residual_bits - 1))  # that of the copy, and that of the residual
    whole += np.uint8((128 - middle) % 256)
    return whole


def nested_format(copy: np.ndarray, residual: np.ndarray) -> Quantisation:
    """The format of nested integers, from their parts ``(rows, blocks, bytes)`` and ``(rows, bytes)``."""
    _, blocks, bytes_each = copy.shape
    block = 2 * bytes_each
    residual_bits = 8 * residual.shape[1] // (blocks * block)
    return Quantisation(4 + residual_bits, block, residual_bits)


def bundle_format(weight_dtype: str | None, rest: str) -> Quantisation | None:
    """Return how a bundle stores integer weights; None if its weights are floats.

    Args:
        weight_dtype: "int8", "int6", "int4" or None.
        rest: "shadow" if the bundle has a low-bit copy of all matrices. Integers are then nested.

    Raises:
        UserError: no bundle has such weights.
    """
    if weight_dtype is None:
        return None
    known, other = (NESTED, WEIGHT_DTYPES) if rest == "shadow" else (WEIGHT_DTYPES, NESTED)
    if weight_dtype in known:
        return known[weight_dtype]
    if weight_dtype not in other:
        raise UserError(
            f"dtype {weight_dtype!r} is not supported", f"use one of {', '.join({**NESTED, **WEIGHT_DTYPES})}"
        )
    if rest == "shadow":
        raise UserError(
            "a low-bit copy of int4 weights would have as many bits as they have", "use --rest drop, or int6"
        )
    raise UserError(
        "int6 weights contain a low-bit copy, which this bundle does not use",
        "use --weight-dtype int8, or --rest shadow (not with the selector relu)",
    )


def dense_rows(weight: np.ndarray, scales: np.ndarray | None, width: int) -> np.ndarray:
    """Return an op's weight, stored as floats or integers, as float32 ``(rows, width)``."""
    if scales is None:
        return weight.astype(np.float32)
    bits = 8 * weight.shape[1] // width
    return dequantise(weight, scales, width, Quantisation(bits, width // scales.shape[1]))
