"""The kernel of ``NestedLinear``."""

from __future__ import annotations

import triton
import triton.language as tl

from shadowllm.plugins.triton.low_bit import copy_products


@triton.jit
def multiply_rows(
    x,
    w,
    copy,
    scales,
    bias,
    y,
    tokens,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Write ``y (tokens, ROWS)``: the products of ``x (tokens, WIDTH)`` with all rows, plus ``bias``.

    Without a residual ``w``, the rows are those of the copy.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < ROWS
    first = tl.program_id(1) * BLOCK_M
    wide = tl.where(live, rows, 0).to(tl.int64)
    products = copy_products(
        x, copy, scales, w, wide, live, first, tokens, WIDTH, BLOCKS, BLOCK_WORDS, BLOCK_M, BLOCK_N, BLOCK_W
    )
    if bias is not None:
        products += tl.load(bias + rows, mask=live, other=0.0)[None, :].to(tl.float32)
    rows_m = first + tl.arange(0, BLOCK_M)
    place = rows_m.to(tl.int64)[:, None] * ROWS + rows[None, :]
    tl.store(y + place, products.to(y.dtype.element_ty), mask=(rows_m < tokens)[:, None] & live[None, :])
