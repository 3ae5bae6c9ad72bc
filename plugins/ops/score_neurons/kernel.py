"""``ScoreNeurons``: multiplies a packed 4-bit copy of gate and up, and keeps only one score per neuron."""

from __future__ import annotations

import triton
import triton.language as tl

from shadowllm.plugins.triton.tiles import activate, dot

# The copy is read as int32 words of 8 integers; the first is in the lowest bits.
IN_WORD = tl.constexpr(8)


@triton.jit
def unpacked(words):
    """The integers of ``words (N, W)``, in -8 .. 7, as float32 ``(N, W, 8)``."""
    shifts = 4 * tl.arange(0, IN_WORD)
    return (((words[:, :, None] >> shifts[None, None, :]) & 15) - 8).to(tl.float32)


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


@triton.jit
def score_neurons(
    x,
    copy,
    scales,
    b_gate,
    b_up,
    down_norms,
    count,
    scores,
    tokens,
    NEURONS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """``scores (1, NEURONS)``: the mean over tokens of ``|product| * down_norms``, one tile of neurons per block.

    A block processes the token tiles one after the other, so that the order of a sum is fixed. If all neurons are kept,
    as in a prompt, no weights are read, because any scores select all of them.
    """
    neurons = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = neurons < NEURONS
    total = tl.zeros((BLOCK_N,), tl.float32)
    if tl.load(count) < NEURONS:
        rows = tl.where(live, neurons, 0).to(tl.int64)
        for first in range(0, tokens, BLOCK_M):
            up_rows = rows + NEURONS if GATED else rows
            h = copy_products(
                x, copy, scales, up_rows, live, first, tokens, WIDTH, BLOCKS, BLOCK_WORDS, BLOCK_M, BLOCK_N, BLOCK_W
            )
            if b_up is not None:
                h += tl.load(b_up + rows, mask=live, other=0.0)[None, :].to(tl.float32)
            if GATED:
                gate = copy_products(
                    x, copy, scales, rows, live, first, tokens, WIDTH, BLOCKS, BLOCK_WORDS, BLOCK_M, BLOCK_N, BLOCK_W
                )
                if b_gate is not None:
                    gate += tl.load(b_gate + rows, mask=live, other=0.0)[None, :].to(tl.float32)
                h *= activate(gate, ACTIVATION)
            else:
                h = activate(h, ACTIVATION)
            inside = (first + tl.arange(0, BLOCK_M) < tokens)[:, None]
            total += tl.sum(tl.where(inside, tl.abs(h), 0.0), 0)
        total *= tl.load(down_norms + rows, mask=live, other=0.0) / tokens
    tl.store(scores + neurons, total, mask=live)
