"""Products with rows of packed integers: of a low-bit copy, or of nested integers, whose copy a residual completes.

A copy has integers of 4 bits, and a float32 scale per block of a row. It is read in its stored form, as int32 words
of eight integers. A residual has 4 or 2 bits, and the scales of the copy divided by 16 or 4. It is read as words
of the same eight integers: int32 words for 4 bits, int16 words for 2 bits. So the type of a word tells the bits, and
both words of eight integers are at the same place.
"""

from __future__ import annotations

import triton
import triton.language as tl

from shadowllm.plugins.triton.schedule import DOT, GEMV, Shape, Tier
from shadowllm.plugins.triton.tiles import dot

# Integers in a word; the first is in the lowest bits.
IN_WORD = tl.constexpr(8)


def is_residual(shape: Shape) -> bool:
    """Whether a matrix of this shape, as kernels get it, is the residual of a low-bit copy and has its words."""
    return len(shape) == 3


def word_constants(copy: Shape | None, tier: Tier, rows: int) -> dict[str, int]:
    """Constants of `copy_products` for a block with this many rows of a copy; without a copy they are not used.

    For one token, each of 128 threads loads one word and keeps its 8 integers, so the loop has no barriers (seen in the
    machine code). More tokens take a block of a row per step.

    Args:
        copy: ``(rows, blocks, int32 words)``.
    """
    _, blocks, words = copy or (0, 0, 0)
    most = min(128 // rows, triton.next_power_of_2(max(1, blocks * words)))
    return {"BLOCKS": blocks, "BLOCK_WORDS": words, "BLOCK_W": most if tier.block == GEMV else words}


def token_block(tier: Tier, itemsize: int) -> int:
    """Tokens in a tile of `copy_products`. In float32, a larger tile with unpacked integers would spill registers."""
    return min(tier.block, DOT) if itemsize == 4 else tier.block


@triton.jit
def load_words(copy, residual, place, mask):
    """Words of the copy, and those of the residual; without a residual, the first ones twice."""
    words = tl.load(copy + place, mask=mask, other=0)
    if residual is None:
        return words, words
    else:
        return words, tl.load(residual + place, mask=mask, other=0)


@triton.jit
def integers(words, low, places, BITS: tl.constexpr):
    """The integers at places of words, as float32: those of the copy, plus the residual's if it has ``BITS``.

    A residual counts as a fraction, so that the scales of the copy are those of the sum. Sums are exact in all types.
    """
    found = signed(words, places, 4)
    if BITS != 0:
        found += signed(low, places, BITS) * (1.0 / (1 << BITS))
    return found


@triton.jit
def signed(words, places, BITS: tl.constexpr):
    """The integers of ``BITS`` bits at places of words, in their own range around zero, as float32."""
    MIDDLE: tl.constexpr = 1 << (BITS - 1)
    # Engines pass unsigned words; 0 - 8 must not become 2 ** 32 - 8.
    return (((words >> (BITS * places)) & (2 * MIDDLE - 1)).to(tl.int32) - MIDDLE).to(tl.float32)


@triton.jit
def unpacked(copy, residual, place, mask):
    """The integers of the words at ``place (N, W)``, float32 ``(N, W, 8)``; see `integers`."""
    BITS: tl.constexpr = 0 if residual is None else residual.dtype.element_ty.primitive_bitwidth // 8
    words, low = load_words(copy, residual, place, mask)
    return integers(words[:, :, None], low[:, :, None], tl.arange(0, IN_WORD)[None, None, :], BITS)


@triton.jit
def rest_is_added(rest, active, UNITS: tl.constexpr):
    """Whether units are computed from the copy: the caller asks for them, and not all are computed from full rows."""
    return (tl.load(rest) != 0) & (tl.load(active) < UNITS)


@triton.jit
def copy_products(
    x,
    copy,
    scales,
    residual,
    rows,
    live,
    first,
    tokens,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Products ``(M, N)`` of rows of the copy with ``BLOCK_M`` tokens of ``x (tokens, WIDTH)``, from ``first`` on.

    With a residual, they are those of nested integers. For one token, each step takes ``BLOCK_W`` words of a row. For
    more tokens it takes a block, and scales the product.
    """
    if BLOCK_M == 1:
        acc = tl.zeros((BLOCK_N, BLOCK_W), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    WORDS: tl.constexpr = BLOCKS * BLOCK_WORDS
    UNROLL: tl.constexpr = 4 if BLOCK_M == 1 else 1
    for start in tl.range(0, WORDS, BLOCK_W, loop_unroll_factor=UNROLL):
        words = start + tl.arange(0, BLOCK_W)
        mask = live[:, None] & (words < WORDS)[None, :]
        at = rows[:, None] * WORDS + words[None, :]
        if BLOCK_M == 1:
            part = word_products(x, copy, residual, at, words, mask, WIDTH, BLOCK_N, BLOCK_W)
            block = rows[:, None] * BLOCKS + (words // BLOCK_WORDS)[None, :]
            acc += part * tl.load(scales + block, mask=mask, other=0.0)
        else:
            rows_m = first + tl.arange(0, BLOCK_M)
            cols = start * IN_WORD + tl.arange(0, BLOCK_W * IN_WORD)
            inside = (rows_m < tokens)[:, None] & (cols < WIDTH)[None, :]
            tile = tl.load(x + rows_m.to(tl.int64)[:, None] * WIDTH + cols[None, :], mask=inside, other=0.0)
            matrix = tl.reshape(unpacked(copy, residual, at, mask), (BLOCK_N, BLOCK_W * IN_WORD))
            part = dot(tile, tl.trans(matrix.to(tile.dtype)), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
            block = start // BLOCK_WORDS
            acc += part * tl.load(scales + rows * BLOCKS + block, mask=live, other=0.0)[None, :]
    if BLOCK_M == 1:
        return tl.sum(acc, 1)[None, :]
    else:
        return acc


@triton.jit
def word_products(
    x, copy, residual, at, words, mask, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr
):
    """Products ``(N, W)`` of one token with the words of rows, which are ``at`` their places in memory.

    x is repeated for every row, as in `tiles.token_tile`; the copies come from the cache. A thread has all integers of
    a word, and takes 16 bytes of x at a time. If it took other parts, threads would exchange data in the loop.
    """
    BITS: tl.constexpr = 0 if residual is None else residual.dtype.element_ty.primitive_bitwidth // 8
    PART: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
    high, low = load_words(copy, residual, at, mask)
    total = tl.zeros((BLOCK_N, BLOCK_W), tl.float32)
    for first in tl.static_range(0, 8, PART):
        places = first + tl.arange(0, PART)[None, None, :]
        place = tl.zeros((BLOCK_N,), tl.int32)[:, None, None] + words[None, :, None] * IN_WORD + places
        found = tl.load(x + place, mask=place < WIDTH, other=0.0).to(tl.float32)
        total += tl.sum(found * integers(high[:, :, None], low[:, :, None], places, BITS), 2)
    return total


@triton.jit
def row_tile(
    copy, scales, residual, rows, live, words,
    BLOCKS: tl.constexpr, BLOCK_WORDS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """The values at words ``(W,)`` of live rows ``(N,)``, float32 ``(N, W * 8)``; zero past the end of a row."""
    WORDS: tl.constexpr = BLOCKS * BLOCK_WORDS
    mask = live[:, None] & (words < WORDS)[None, :]
    found = unpacked(copy, residual, rows[:, None] * WORDS + words[None, :], mask)
    block = rows[:, None] * BLOCKS + (words // BLOCK_WORDS)[None, :]
    factors = tl.load(scales + block, mask=mask, other=0.0)
    return tl.reshape(found * factors[:, :, None], (BLOCK_N, BLOCK_W * IN_WORD))


@triton.jit
def zero_sums(BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr):
    """Initial sums for `add_rows`: one ``(N, W)`` for each of the eight integers of a word, all in one layout.

    So threads exchange nothing in the loop, and each loads 16 bytes at a time (seen in the machine code).
    """
    a = tl.zeros((BLOCK_N, BLOCK_W), tl.float32)
    return a, a, a, a, a, a, a, a


@triton.jit
def add_rows(
    sums, h, copy, scales, residual, rows, live, words, BLOCKS: tl.constexpr, BLOCK_WORDS: tl.constexpr
):  # fmt: skip
    """Add live rows ``(N,)``, each times its number in ``h (N,)``, to the sums. It is `row_tile` for one token."""
    BITS: tl.constexpr = 0 if residual is None else residual.dtype.element_ty.primitive_bitwidth // 8
    WORDS: tl.constexpr = BLOCKS * BLOCK_WORDS
    a0, a1, a2, a3, a4, a5, a6, a7 = sums
    mask = live[:, None] & (words < WORDS)[None, :]
    high, low = load_words(copy, residual, rows[:, None] * WORDS + words[None, :], mask)
    block = rows[:, None] * BLOCKS + (words // BLOCK_WORDS)[None, :]
    h = h[:, None] * tl.load(scales + block, mask=mask, other=0.0)
    a0 += h * integers(high, low, 0, BITS)
    a1 += h * integers(high, low, 1, BITS)
    a2 += h * integers(high, low, 2, BITS)
    a3 += h * integers(high, low, 3, BITS)
    a4 += h * integers(high, low, 4, BITS)
    a5 += h * integers(high, low, 5, BITS)
    a6 += h * integers(high, low, 6, BITS)
    a7 += h * integers(high, low, 7, BITS)
    return a0, a1, a2, a3, a4, a5, a6, a7


@triton.jit
def row_sum(sums, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr):
    """The sum of the rows ``(W * 8,)``, from the sums of `add_rows`."""
    a0, a1, a2, a3, a4, a5, a6, a7 = sums
    # The order of the joins is that of the bits of a place in a word.
    even = tl.join(tl.join(a0, a4), tl.join(a2, a6))
    odd = tl.join(tl.join(a1, a5), tl.join(a3, a7))
    return tl.sum(tl.reshape(tl.join(even, odd), (BLOCK_N, BLOCK_W * IN_WORD)), 0)
