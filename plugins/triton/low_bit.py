"""Products of tokens with the rows of a low-bit copy: 4-bit integers, and a float32 scale per block of a row.

The copy is read in its stored form, as int32 words of eight integers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from shadowllm.plugins.triton.tiles import dot

# The copy is read as int32 words of 8 integers; the first is in the lowest bits.
IN_WORD = tl.constexpr(8)


@triton.jit
def unpacked(words):
    """The integers of ``words (N, W)``, in -8 .. 7, as float32 ``(N, W, 8)``."""
    shifts = 4 * tl.arange(0, IN_WORD)
    # Engines pass unsigned words; 0 - 8 must not become 2 ** 32 - 8.
    return (((words[:, :, None] >> shifts[None, None, :]) & 15).to(tl.int32) - 8).to(tl.float32)


@triton.jit
def rest_is_added(rest, active, UNITS: tl.constexpr):
    """Whether units are computed from the copy: the caller asks for them, and not all are computed from full rows."""
    return (tl.load(rest) != 0) & (tl.load(active) < UNITS)


@triton.jit
def copy_products(
    x,
    copy,
    scales,
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

    For one token, each step takes ``BLOCK_W`` words of a row. For more tokens it takes a block, and scales the product.
    """
    if BLOCK_M == 1:
        acc = tl.zeros((BLOCK_N, BLOCK_W), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    WORDS: tl.constexpr = BLOCKS * BLOCK_WORDS
    UNROLL: tl.constexpr = 4 if BLOCK_M == 1 else 1
    for start in tl.range(0, WORDS, BLOCK_W, loop_unroll_factor=UNROLL):
        places = start + tl.arange(0, BLOCK_W)
        mask = live[:, None] & (places < WORDS)[None, :]
        integers = unpacked(tl.load(copy + rows[:, None] * WORDS + places[None, :], mask=mask, other=0))
        cols = places[:, None] * IN_WORD + tl.arange(0, IN_WORD)[None, :]
        if BLOCK_M == 1:
            # x is repeated for every row, as in `tiles.token_tile`; the copies come from the cache.
            place = tl.zeros((BLOCK_N,), tl.int32)[:, None, None] + cols[None, :, :]
            part = tl.sum(integers * tl.load(x + place, mask=place < WIDTH, other=0.0).to(tl.float32), 2)
            block = rows[:, None] * BLOCKS + (places // BLOCK_WORDS)[None, :]
            acc += part * tl.load(scales + block, mask=mask, other=0.0)
        else:
            rows_m = first + tl.arange(0, BLOCK_M)
            cols = tl.reshape(cols, (BLOCK_W * IN_WORD,))
            inside = (rows_m < tokens)[:, None] & (cols < WIDTH)[None, :]
            tile = tl.load(x + rows_m.to(tl.int64)[:, None] * WIDTH + cols[None, :], mask=inside, other=0.0)
            matrix = tl.reshape(integers, (BLOCK_N, BLOCK_W * IN_WORD)).to(tile.dtype)  # exact in any type
            part = dot(tile, tl.trans(matrix), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
            block = start // BLOCK_WORDS
            acc += part * tl.load(scales + rows * BLOCKS + block, mask=live, other=0.0)[None, :]
    if BLOCK_M == 1:
        return tl.sum(acc, 1)[None, :]
    else:
        return acc
