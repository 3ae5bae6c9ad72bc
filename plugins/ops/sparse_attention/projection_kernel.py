"""Queries of the active heads and, in a step that is a whole block, the keys and values of its tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from shadowllm.plugins.triton.block_sync import clear
from shadowllm.plugins.triton.head_choice import place_head
from shadowllm.plugins.triton.low_bit import copy_products
from shadowllm.plugins.triton.tiles import add_along, sum_along, token_tile, zeros_along


@triton.jit
def active_head(indices, count, slot, HEADS: tl.constexpr, CAP: tl.constexpr):
    """The head at a slot; negative if the slot is past the count or the index is not a head."""
    head = tl.load(indices + slot, mask=slot < tl.minimum(tl.load(count), CAP), other=-1)
    return tl.where(head < HEADS, head, -1)


@triton.jit
def project_heads(
    x, indices, count, lengths, w_q, b_q, w_kv, b_kv, c_kv, cs_kv, cos, sin,
    c_q, cs_q, scores, rest, chosen, order, active, attended, query, key, value, counters, tokens,
    CAP: tl.constexpr, HEADS: tl.constexpr, LISTED: tl.constexpr, TOGETHER: tl.constexpr,
    HEAD_DIM: tl.constexpr, KV_HEADS: tl.constexpr, CAPACITY: tl.constexpr, WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK_WORDS: tl.constexpr, COUNTERS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Write ``query (tokens, CAP, HEAD_DIM)`` of the heads at ``indices``, rotated if ``cos`` is given.

    A block computes some elements of the first half of a head and their partners in the second half,
    because the rotation combines these pairs. A weight of integers is the residual of its copy.

    With a low-bit copy ``c_q``, and its scales ``cs_q``, the heads are in the order of `head_choice.place_head`, which
    writes ``chosen``, ``order``, ``active`` and ``attended``. The copy replaces ``w_q`` for heads that are not active.

    With ``w_kv``, more blocks compute the keys and values of the step's tokens, one per sequence, and write them into
    the cache at position ``lengths - 1``. Nothing is written past the capacity.
    """
    clear(counters, COUNTERS)
    HALF: tl.constexpr = (HEAD_DIM + 1) // 2
    PARTS: tl.constexpr = (HALF + BLOCK_N - 1) // BLOCK_N
    slot = tl.program_id(0) // PARTS
    place = tl.program_id(0) % PARTS * BLOCK_N + tl.arange(0, BLOCK_N)
    in_first, in_second = place < HALF, place + HALF < HEAD_DIM
    first = tl.program_id(1) * BLOCK_M
    rows_m = first + tl.arange(0, BLOCK_M)
    if slot < CAP:
        begins = (tl.program_id(0) % PARTS == 0) & (first == 0)
        head, slot, full, wanted = head_of_block(
            slot, indices, count, scores, rest, chosen, order, active, attended, begins, CAP, HEADS, LISTED, TOGETHER
        )
        if wanted:
            rows = head.to(tl.int64) * HEAD_DIM + place
            a, b = query_products(
                x, w_q, c_q, cs_q, full, rows, first, in_first, in_second, tokens,
                HALF, WIDTH, BLOCKS, BLOCK_WORDS, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_W,
            )  # fmt: skip
            a, b = add_bias(a, b, b_q, rows, in_first, in_second, HALF)
            a, b = rotated(a, b, cos, sin, rows_m, place, in_first, tokens, HALF)
            out = query + (rows_m.to(tl.int64) * CAP + slot) * HEAD_DIM
            store_halves(out, a, b, place, in_first, in_second, rows_m < tokens, HALF)
    elif w_kv is not None:
        write_key_value(
            x, w_kv, b_kv, c_kv, cs_kv, cos, sin, lengths, key, value, slot - CAP, place, first, in_first, in_second,
            tokens, HEAD_DIM, KV_HEADS, CAPACITY, HALF, WIDTH, BLOCKS, BLOCK_WORDS, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_W,
        )  # fmt: skip


@triton.jit
def head_of_block(
    number,
    indices,
    count,
    scores,
    rest,
    chosen,
    order,
    active,
    attended,
    begins,
    CAP: tl.constexpr,
    HEADS: tl.constexpr,
    LISTED: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """The head of a block with a number, its slot, whether its rows are full, and whether it is attended."""
    if order is None:
        head = active_head(indices, count, number, HEADS, CAP)
        return head, number, head >= 0, head >= 0
    else:
        slot, full, wanted = place_head(
            number, scores, indices, count, rest, chosen, order, active, attended, begins, LISTED, HEADS, TOGETHER
        )
        return number, slot, full, wanted


@triton.jit
def write_key_value(
    x,
    w_kv,
    b_kv,
    c_kv,
    cs_kv,
    cos,
    sin,
    lengths,
    key,
    value,
    head,
    place,
    first,
    in_first,
    in_second,
    tokens,
    HEAD_DIM: tl.constexpr,
    KV_HEADS: tl.constexpr,
    CAPACITY: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Write a part of one head of the step's keys into the cache, or of its values, whose heads follow."""
    rows = head.to(tl.int64) * HEAD_DIM + place
    rows_m = first + tl.arange(0, BLOCK_M)
    a, b = full_products(
        x, w_kv, c_kv, cs_kv, rows, first, in_first, in_second, tokens,
        HALF, WIDTH, BLOCKS, BLOCK_WORDS, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_W,
    )  # fmt: skip
    a, b = add_bias(a, b, b_kv, rows, in_first, in_second, HALF)
    position = tl.load(lengths + rows_m, mask=rows_m < tokens, other=0) - 1
    inside_m = (position >= 0) & (position < CAPACITY)
    out = (rows_m.to(tl.int64) * KV_HEADS + head % KV_HEADS) * CAPACITY + position
    if head < KV_HEADS:
        a, b = rotated(a, b, cos, sin, rows_m, place, in_first, tokens, HALF)
        store_halves(key + out * HEAD_DIM, a, b, place, in_first, in_second, inside_m, HALF)
    else:
        store_halves(value + out * HEAD_DIM, a, b, place, in_first, in_second, inside_m, HALF)


@triton.jit
def query_products(
    x,
    w_q,
    c_q,
    cs_q,
    full,
    rows,
    first,
    in_first,
    in_second,
    tokens,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """`full_products` with ``w_q``; with a copy, the same products with the copy if the head is not to be ``full``."""
    if c_q is None:
        a, b = full_products(
            x, w_q, None, None, rows, first, in_first, in_second, tokens,
            HALF, WIDTH, BLOCKS, BLOCK_WORDS, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_W,
        )  # fmt: skip
    else:
        if full:
            a, b = full_products(
                x, w_q, c_q, cs_q, rows, first, in_first, in_second, tokens,
                HALF, WIDTH, BLOCKS, BLOCK_WORDS, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_W,
            )  # fmt: skip
        else:
            a, b = half_products(
                x, c_q, cs_q, None, rows, first, in_first, in_second, tokens,
                HALF, WIDTH, BLOCKS, BLOCK_WORDS, BLOCK_M, BLOCK_N, BLOCK_W,
            )  # fmt: skip
    return a, b


@triton.jit
def add_bias(a, b, bias, rows, in_first, in_second, HALF: tl.constexpr):
    """Add the bias of the rows of a head's first half, and of the second half."""
    if bias is not None:
        a += tl.load(bias + rows, mask=in_first, other=0.0)[None, :].to(tl.float32)
        b += tl.load(bias + rows + HALF, mask=in_second, other=0.0)[None, :].to(tl.float32)
    return a, b


@triton.jit
def rotated(a, b, cos, sin, rows_m, place, in_first, tokens, HALF: tl.constexpr):
    """Rotate the pairs of both halves of a head; without ``cos``, return them as they are."""
    if cos is not None:
        angle = rows_m[:, None].to(tl.int64) * HALF + place[None, :]
        mask = (rows_m < tokens)[:, None] & in_first[None, :]
        c = tl.load(cos + angle, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(sin + angle, mask=mask, other=0.0).to(tl.float32)
        a, b = a * c - b * s, b * c + a * s
    return a, b


@triton.jit
def store_halves(out, a, b, place, in_first, in_second, inside_m, HALF: tl.constexpr):
    """Store both halves of a head, ``(M, N)`` each, at the addresses ``out (M,)``."""
    at = out[:, None] + place[None, :]
    tl.store(at, a.to(out.dtype.element_ty), mask=inside_m[:, None] & in_first[None, :])
    tl.store(at + HALF, b.to(out.dtype.element_ty), mask=inside_m[:, None] & in_second[None, :])


@triton.jit
def full_products(
    x,
    weight,
    copy,
    scales,
    rows,
    first,
    in_first,
    in_second,
    tokens,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Products ``(M, N)`` of this block's tokens with rows of a weight, and with the rows ``HALF`` further on."""
    if weight.dtype.element_ty.is_int():
        return half_products(
            x, copy, scales, weight, rows, first, in_first, in_second, tokens,
            HALF, WIDTH, BLOCKS, BLOCK_WORDS, BLOCK_M, BLOCK_N, BLOCK_W,
        )  # fmt: skip
    else:
        a = zeros_along(BLOCK_M, BLOCK_N, BLOCK_K)
        b = zeros_along(BLOCK_M, BLOCK_N, BLOCK_K)
        for start in range(0, WIDTH, BLOCK_K):
            cols = start + tl.arange(0, BLOCK_K)
            inside = (cols < WIDTH)[None, :]
            tile = token_tile(x, tokens, cols, WIDTH, BLOCK_M, BLOCK_N)
            place = weight + rows[:, None] * WIDTH + cols[None, :]
            a = add_along(a, tile, tl.load(place, mask=in_first[:, None] & inside, other=0.0), BLOCK_M)
            place += HALF * WIDTH
            b = add_along(b, tile, tl.load(place, mask=in_second[:, None] & inside, other=0.0), BLOCK_M)
        return sum_along(a, BLOCK_M), sum_along(b, BLOCK_M)


@triton.jit
def half_products(
    x,
    copy,
    scales,
    residual,
    rows,
    first,
    in_first,
    in_second,
    tokens,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """`full_products` with the rows of a copy, or of nested integers if there is a residual."""
    a = copy_products(
        x, copy, scales, residual, rows, in_first, first, tokens, WIDTH, BLOCKS, BLOCK_WORDS, BLOCK_M, BLOCK_N, BLOCK_W
    )
    low = rows + HALF
    b = copy_products(
        x, copy, scales, residual, low, in_second, first, tokens, WIDTH, BLOCKS, BLOCK_WORDS, BLOCK_M, BLOCK_N, BLOCK_W
    )
    return a, b
