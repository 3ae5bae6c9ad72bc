"""``ShortlistLogits``: logits from a packed 4-bit copy of the output table, some of them replaced by exact ones.

The launches follow one another; which of them have work is read on the device:

    table_logits       all rows of the table, if the shortlist is the whole table; then nothing else is read
    copy_logits        all rows of the copy
    choose_shortlist   the smallest logit of the shortlist
    shortlist_logits   exact logits of the shortlist, and their largest in each block
    bound_row          the largest of all, and the factor of the errors
    doubtful_logits    exact logits of the rows that may reach it, if the result is certified
    count_rows         the number of exact logits

Scratch memory by row of x: ``limits (R, 2)`` has the smallest key of the shortlist, and the last row whose key is equal
to it. ``listed (R, blocks)`` has a bit for each row of a block that is in the shortlist. ``bounds (R, 2)`` has the
largest logit and the factor.
"""

from __future__ import annotations

import triton
import triton.language as tl

from shadowllm.plugins.ops.nested_linear.kernel import multiply_rows
from shadowllm.plugins.ops.select_topk.kernel import largest_keys, ordered_keys
from shadowllm.plugins.triton.low_bit import copy_products
from shadowllm.plugins.triton.tiles import project


@triton.jit
def table_logits(
    x,
    table,
    copy,
    scales,
    shortlist,
    logits,
    tokens,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Write all ``logits (tokens, ROWS)`` from the table, if the shortlist has all of its rows."""
    if tl.load(shortlist) < ROWS:
        return
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < ROWS
    first = tl.program_id(1) * BLOCK_M
    products = table_products(
        x, table, copy, scales, rows, live, first, tokens, WIDTH, BLOCKS, BLOCK_WORDS,
        BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_W,
    )  # fmt: skip
    rows_m = first + tl.arange(0, BLOCK_M)
    place = rows_m.to(tl.int64)[:, None] * ROWS + rows[None, :]
    tl.store(logits + place, products, mask=(rows_m < tokens)[:, None] & live[None, :])


@triton.jit
def table_products(
    x,
    table,
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
    BLOCK_K: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Products ``(M, N)`` of ``BLOCK_M`` tokens of x, from ``first`` on, with rows of the table.

    A table of integers is the residual of the copy.
    """
    if table.dtype.element_ty.is_int():
        wide = tl.where(live, rows, 0).to(tl.int64)
        return copy_products(
            x, copy, scales, table, wide, live, first, tokens, WIDTH, BLOCKS, BLOCK_WORDS, BLOCK_M, BLOCK_N, BLOCK_W
        )
    else:
        return project(x, table, None, rows, live, tokens, WIDTH, BLOCK_M, BLOCK_N, BLOCK_K)


@triton.jit
def copy_logits(
    x,
    copy,
    scales,
    shortlist,
    logits,
    tokens,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Write all ``logits (tokens, ROWS)`` from the copy, unless the shortlist has all rows."""
    if tl.load(shortlist) >= ROWS:
        return
    multiply_rows(
        x, None, copy, scales, None, logits, tokens, ROWS, WIDTH, BLOCKS, BLOCK_WORDS, BLOCK_M, BLOCK_N, BLOCK_W
    )


@triton.jit
def choose_shortlist(logits, shortlist, certify, limits, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Write the limits of the shortlist of a row of ``logits (R, ROWS)``, one row per block."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.maximum(tl.load(shortlist), (tl.load(certify) != 0).to(tl.int32))
    if count >= ROWS:
        return
    logits += row * ROWS
    key = tl.full((), 0xFFFFFFFF, tl.uint32)  # no logit has this key
    last = tl.full((), -1, tl.int32)
    if count > 0:
        key, need = largest_keys(logits, count, ROWS, BLOCK)
        ties = tl.zeros((), tl.int32)
        for start in range(0, ROWS, BLOCK):
            places = start + tl.arange(0, BLOCK)
            equal = ((ordered_keys(logits, places, ROWS) == key) & (places < ROWS)).to(tl.int32)
            earlier = ties + tl.cumsum(equal, 0) - equal
            last = tl.maximum(last, tl.max(tl.where((equal != 0) & (earlier < need), places, -1), 0))
            ties += tl.sum(equal, 0)
    tl.store(limits + 2 * row, key.to(tl.int32, bitcast=True))
    tl.store(limits + 2 * row + 1, last)


@triton.jit
def recompute(
    x,
    table,
    copy,
    scales,
    logits,
    row,
    rows,
    live,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Write the exact logits of the live rows for one row of x, and return the largest."""
    exact = table_products(
        x + row * WIDTH, table, copy, scales, rows, live, 0, 1, WIDTH, BLOCKS, BLOCK_WORDS,
        1, BLOCK_N, BLOCK_K, BLOCK_W,
    )  # fmt: skip
    exact = tl.reshape(exact, (BLOCK_N,))
    tl.store(logits + row * ROWS + rows, exact, mask=live)
    return tl.max(tl.where(live & (exact == exact), exact, float("-inf")), 0)


@triton.jit
def shortlist_logits(
    x,
    table,
    copy,
    scales,
    shortlist,
    certify,
    limits,
    logits,
    listed,
    largest,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Replace the logits of the shortlist by exact ones, one tile of rows and one row of x per block.

    Write ``listed (R, blocks)`` and ``largest (R, blocks)``, the largest exact logit of a block.
    """
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if tl.maximum(tl.load(shortlist), (tl.load(certify) != 0).to(tl.int32)) >= ROWS:
        return
    lanes = tl.arange(0, BLOCK_N)
    rows = block * BLOCK_N + lanes
    key = ordered_keys(logits + row * ROWS, rows, ROWS)
    limit = tl.load(limits + 2 * row).to(tl.uint32, bitcast=True)
    live = (rows < ROWS) & ((key > limit) | ((key == limit) & (rows <= tl.load(limits + 2 * row + 1))))
    bits = tl.sum(tl.where(live, 1 << lanes, 0), 0)
    most = tl.full((), float("-inf"), tl.float32)
    if bits != 0:
        most = recompute(
            x, table, copy, scales, logits, row, rows, live, ROWS, WIDTH, BLOCKS, BLOCK_WORDS,
            BLOCK_N, BLOCK_K, BLOCK_W,
        )  # fmt: skip
    place = row * tl.num_programs(0) + block
    tl.store(listed + place, bits)
    tl.store(largest + place, most)


@triton.jit
def bound_row(
    x, weighting, largest, bounds, PARTS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Write the bounds of a row of x: the largest of ``largest (R, PARTS)`` and ``|weighting * x|``."""
    row = tl.program_id(0).to(tl.int64)
    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, PARTS, BLOCK):
        places = start + tl.arange(0, BLOCK)
        found = tl.load(largest + row * PARTS + places, mask=places < PARTS, other=float("-inf"))
        most = tl.maximum(most, found)
    cols = tl.arange(0, BLOCK_D)
    values = tl.load(x + row * WIDTH + cols, mask=cols < WIDTH, other=0.0).to(tl.float32)
    if weighting is not None:
        values *= tl.load(weighting + cols, mask=cols < WIDTH, other=0.0)
    # Squares could be outside the range of float32. A NaN stays one, and no row is below a bound of NaN.
    size = tl.max(tl.abs(values), 0)
    scaled = values / tl.where(size > 0, size, 1.0)
    tl.store(bounds + 2 * row, tl.max(most, 0))
    tl.store(bounds + 2 * row + 1, size * tl.sqrt(tl.sum(scaled * scaled, 0)))


@triton.jit
def doubtful_logits(
    x,
    table,
    copy,
    scales,
    errors,
    shortlist,
    certify,
    bounds,
    logits,
    listed,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Replace the logits that may reach the largest exact one, if certified; ``listed`` becomes the number of rows."""
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    wanted = tl.load(certify) != 0
    if tl.maximum(tl.load(shortlist), wanted.to(tl.int32)) >= ROWS:
        return
    place = row * tl.num_programs(0) + block
    lanes = tl.arange(0, BLOCK_N)
    rows = block * BLOCK_N + lanes
    old = (tl.load(listed + place) >> lanes) & 1
    low = tl.load(logits + row * ROWS + rows, mask=rows < ROWS, other=0.0)
    error = tl.load(errors + rows, mask=rows < ROWS, other=0.0)
    # Not "at least", because a NaN is not below.
    below = low + error * tl.load(bounds + 2 * row + 1) < tl.load(bounds + 2 * row)
    more = tl.where(below, 0, 1 - old) * wanted.to(tl.int32)
    live = (rows < ROWS) & (more != 0)
    if tl.sum(live.to(tl.int32), 0) > 0:
        recompute(
            x, table, copy, scales, logits, row, rows, live, ROWS, WIDTH, BLOCKS, BLOCK_WORDS,
            BLOCK_N, BLOCK_K, BLOCK_W,
        )  # fmt: skip
    tl.store(listed + place, tl.sum(old + live.to(tl.int32), 0))


@triton.jit
def count_rows(shortlist, certify, listed, recomputed, ROWS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Write ``recomputed (R,)``, the sums of ``listed (R, PARTS)``, or all rows if the shortlist has them."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.maximum(tl.load(shortlist), (tl.load(certify) != 0).to(tl.int32))
    total = tl.zeros((BLOCK,), tl.int32)
    if count < ROWS:
        for start in range(0, PARTS, BLOCK):
            places = start + tl.arange(0, BLOCK)
            total += tl.load(listed + row * PARTS + places, mask=places < PARTS, other=0)
    tl.store(recomputed + row, tl.where(count < ROWS, tl.sum(total, 0), ROWS))
