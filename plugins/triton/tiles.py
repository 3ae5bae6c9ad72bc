"""What the kernels share: products of tokens with gathered rows, for one token and for many.

A tile of one token is a matrix-vector product: it keeps one partial sum per loaded weight and adds up
at the end, so that the loop has no traffic between threads. More tokens go through ``tl.dot``.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# Triton's interpreter takes the bits of bfloat16 for integers in tl.dot: there it multiplies in float32.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# Bytes, along what is summed over, that a loop around ``tl.dot`` takes at a time.
LINE = 128


@triton.jit
def dot(a, b, acc):
    """``acc + a b``, sums in float32; float32 inputs are not rounded to TF32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def token_tile(x, tokens, cols, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Columns of this block's tokens ``x (tokens, WIDTH)`` for `add_along`: ``(M, K)``.

    One token is repeated to ``(N, K)``: the copies come from the cache, and every thread has what its weights
    are multiplied with, where a ``(1, K)`` tile would have to be passed around in every turn of a loop.
    """
    if BLOCK_M == 1:
        place = tl.zeros((BLOCK_N,), tl.int32)[:, None] + cols[None, :]
        return tl.load(x + place, mask=place < WIDTH, other=0.0)
    else:
        rows = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
        mask = (rows < tokens) & (cols < WIDTH)[None, :]
        return tl.load(x + rows.to(tl.int64) * WIDTH + cols[None, :], mask=mask, other=0.0)


@triton.jit
def zeros_along(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Sums for `add_along`."""
    if BLOCK_M == 1:
        return tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    else:
        return tl.zeros((BLOCK_M, BLOCK_N), tl.float32)


@triton.jit
def add_along(acc, x, w, BLOCK_M: tl.constexpr):
    """Add the products of a `token_tile` with rows ``w (N, K)``."""
    if BLOCK_M == 1:
        return acc + x.to(tl.float32) * w.to(tl.float32)
    else:
        return dot(x, tl.trans(w), acc)


@triton.jit
def sum_along(acc, BLOCK_M: tl.constexpr):
    """The products ``(M, N)``."""
    if BLOCK_M == 1:
        return tl.sum(acc, 1)[None, :]
    else:
        return acc


@triton.jit
def active_rows(indices, count, slots, GROUP: tl.constexpr, UNITS: tl.constexpr):
    """Rows of a weight that stand at slots of a selection of units of ``GROUP`` rows each.

    Returns:
        Rows int64 and whether they are active. A slot past the count, or an index outside the weight,
        is not active, its row 0: nothing outside a buffer is read.
    """
    units = tl.load(indices + slots // GROUP, mask=slots < count * GROUP, other=-1)
    live = (units >= 0) & (units < UNITS)
    return tl.where(live, units, 0).to(tl.int64) * GROUP + slots % GROUP, live


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The MLP's activation of float32 values."""
    if ACTIVATION == "relu":
        return tl.where(x < 0, 0.0, x)  # keeps a NaN, which a maximum may drop
    elif ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    else:
        return x * 0.5 * (1 + tl.erf(x * 0.7071067811865476))


def block_along(width: int, tokens: int, itemsize: int) -> int:
    """Columns that a loop over a row of this width takes at a time, for a tile of so many tokens."""
    return min(256 if tokens == 1 else LINE // itemsize, max(16, triton.next_power_of_2(width)))


def tile_warps(tokens: int, itemsize: int) -> int:
    """Warps for a tile of so many tokens; float32 is multiplied without tensor cores, which takes more registers."""
    return 8 if tokens > 1 and itemsize == 4 else 4
