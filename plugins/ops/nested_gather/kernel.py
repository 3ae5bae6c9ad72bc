"""The kernel of ``NestedGather``."""

from __future__ import annotations

import triton
import triton.language as tl

from shadowllm.plugins.triton.low_bit import IN_WORD, row_tile


@triton.jit
def gather_rows(
    ids,
    w,
    copy,
    scales,
    y,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Write ``y (R, WIDTH)``: the values of the rows ``ids (R,)``; zeros for a row that does not exist.

    Block (i, tile of words) writes a part of row i.
    """
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(ids + place) + tl.zeros((1,), tl.int64)
    words = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    live = (row >= 0) & (row < ROWS)
    values = row_tile(copy, scales, w, row, live, words, BLOCKS, BLOCK_WORDS, 1, BLOCK_W)
    cols = tl.program_id(1) * (BLOCK_W * IN_WORD) + tl.arange(0, BLOCK_W * IN_WORD)
    tl.store(y + place * WIDTH + cols[None, :], values, mask=(cols < WIDTH)[None, :])
