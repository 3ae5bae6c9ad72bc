"""``SparseMLP``: gate and up of the active neurons in one pass, or gate first.

`plugins.triton.output_projection` multiplies the result by their rows of ``w_down``. With a low-bit copy, the kernel of
``ScoreNeurons`` computes the products of all neurons first, and that of ``SelectTopK`` may choose the active ones.

Without indices and without a copy, `gate_first` reads the rows of up only of neurons whose gate is not zero. The output
projection skips the rows of down whose hidden values are zero, and `list_fired` lists the neurons.
"""

from __future__ import annotations

import triton
import triton.language as tl

from shadowllm.plugins.ops.select_topk.kernel import write_largest
from shadowllm.plugins.triton.block_sync import announce, clear, is_first, wait
from shadowllm.plugins.triton.low_bit import copy_products
from shadowllm.plugins.triton.tiles import (
    activate,
    active_rows,
    add_along,
    project,
    sum_along,
    times_up,
    token_tile,
    zeros_along,
)


@triton.jit
def mlp_hidden(
    x, indices, count, w_gate, b_gate, w_up, b_up, c_gate, cs_gate, c_up, cs_up, hidden, products, scores, choosing,
    counters, tokens, CAP: tl.constexpr, NEURONS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK_WORDS: tl.constexpr, COUNTERS: tl.constexpr,
    ACTIVATION: tl.constexpr, THRESHOLD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write ``hidden (tokens, CAP)``: the outputs of the active neurons for ``x (tokens, WIDTH)``, by slot.

    With ``c_up``, gate and up are residuals of low-bit copies. If given, ``products (tokens, NEURONS)`` of a low-bit
    copy become zero for the active neurons, which replace them. Blocks past the count return at once, so half of the
    grid costs nothing if half of the neurons are active.

    With ``scores (NEURONS,)``, the first block that comes chooses the neurons and writes their ``indices``. Blocks that
    have work wait for it. ``choosing`` counts the blocks that came, and tells when the choice is made.
    """
    clear(counters, COUNTERS)
    n = tl.minimum(tl.maximum(tl.load(count), 0), CAP)
    idle = tl.program_id(0) * BLOCK_N >= n
    if scores is not None:  # noqa: SIM102 -- known at compile time, and the next one is not
        # One block without work comes too, so that all indices are written if the count is 0.
        if (tl.program_id(0) == 0) | (not idle):
            if is_first(choosing):
                write_largest(scores, indices, n, NEURONS, CAP, BLOCK_C)
                announce(choosing + 1)
            wait(choosing + 1)
    if idle:
        return
    slots = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, live = active_rows(indices, n, slots, 1, NEURONS)
    first = tl.program_id(1) * BLOCK_M
    if c_up is None:
        g, h = gate_and_up(x, w_gate, w_up, rows, live, tokens, WIDTH, BLOCK_M, BLOCK_N, BLOCK_K)
    else:
        h = copy_products(
            x, c_up, cs_up, w_up, rows, live, first, tokens, WIDTH, BLOCKS, BLOCK_WORDS, BLOCK_M, BLOCK_N, BLOCK_W
        )
        if w_gate is not None:
            g = copy_products(
                x, c_gate, cs_gate, w_gate, rows, live, first, tokens, WIDTH, BLOCKS, BLOCK_WORDS,
                BLOCK_M, BLOCK_N, BLOCK_W,
            )  # fmt: skip
    if b_up is not None:
        h += tl.load(b_up + rows, mask=live, other=0.0)[None, :].to(tl.float32)
    if w_gate is not None:
        if b_gate is not None:
            g += tl.load(b_gate + rows, mask=live, other=0.0)[None, :].to(tl.float32)
        h = times_up(activate(g, ACTIVATION, THRESHOLD), h, ACTIVATION)
    else:
        h = activate(h, ACTIVATION, THRESHOLD)
    rows_m = first + tl.arange(0, BLOCK_M)
    inside_m = (rows_m < tokens)[:, None] & live[None, :]
    place = rows_m[:, None].to(tl.int64) * CAP + slots[None, :]
    tl.store(hidden + place, h.to(hidden.dtype.element_ty), mask=inside_m)
    if products is not None:
        place = rows_m[:, None].to(tl.int64) * NEURONS + rows[None, :]
        tl.store(products + place, tl.zeros_like(h).to(products.dtype.element_ty), mask=inside_m)


@triton.jit
def gate_and_up(
    x,
    w_gate,
    w_up,
    rows,
    live,
    tokens,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Products ``(M, N)`` of this block's tokens with rows of gate and of up, in one pass; zero without a gate."""
    up = zeros_along(BLOCK_M, BLOCK_N, BLOCK_K)
    gate = zeros_along(BLOCK_M, BLOCK_N, BLOCK_K)
    for start in range(0, WIDTH, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        inside = (cols < WIDTH)[None, :]
        tile = token_tile(x, tokens, cols, WIDTH, BLOCK_M, BLOCK_N)
        place = rows[:, None] * WIDTH + cols[None, :]
        up = add_along(up, tile, tl.load(w_up + place, mask=live[:, None] & inside, other=0.0), BLOCK_M)
        if w_gate is not None:
            gate = add_along(gate, tile, tl.load(w_gate + place, mask=live[:, None] & inside, other=0.0), BLOCK_M)
    return sum_along(gate, BLOCK_M), sum_along(up, BLOCK_M)


@triton.jit
def gate_first(
    x,
    w_first,
    b_first,
    w_up,
    b_up,
    hidden,
    fired,
    counters,
    tokens,
    NEURONS: tl.constexpr,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    THRESHOLD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COUNTERS: tl.constexpr,
):
    """Write ``hidden (tokens, NEURONS)``, and int32 ``fired (token tiles, NEURONS)``: 1 where a gate is not zero.

    ``w_first`` is gate, or up in an MLP without a gate; then ``w_up`` is None.
    """
    clear(counters, COUNTERS)
    neurons = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = neurons < NEURONS
    rows = tl.where(live, neurons, 0)
    rows_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (rows_m < tokens)[:, None] & live[None, :]
    h = project(x, w_first, b_first, rows, live, tokens, WIDTH, BLOCK_M, BLOCK_N, BLOCK_K)
    h = activate(h, ACTIVATION, THRESHOLD)
    any_token = tl.max((inside & (h != 0)).to(tl.int32), 0)
    tl.store(fired + tl.program_id(1) * NEURONS + neurons, any_token, mask=live)
    if w_up is not None:
        up = project(x, w_up, b_up, rows, any_token != 0, tokens, WIDTH, BLOCK_M, BLOCK_N, BLOCK_K)
        h = times_up(h, up, ACTIVATION)
    tl.store(
        hidden + rows_m[:, None].to(tl.int64) * NEURONS + neurons[None, :], h.to(hidden.dtype.element_ty), mask=inside
    )


@triton.jit
def list_fired(fired, chosen, tiles, NEURONS: tl.constexpr, BLOCK: tl.constexpr):
    """Write ``chosen (NEURONS,)``: the neurons that fired for any token, ascending and -1 past their number."""
    count = tl.zeros((), tl.int32)
    for first in range(0, NEURONS, BLOCK):
        neurons = first + tl.arange(0, BLOCK)
        any_tile = tl.zeros((BLOCK,), tl.int32)
        for tile in range(tiles):
            any_tile |= tl.load(fired + tile * NEURONS + neurons, mask=neurons < NEURONS, other=0)
        tl.store(chosen + count + tl.cumsum(any_tile, 0) - 1, neurons, mask=any_tile != 0)
        count += tl.sum(any_tile, 0)
    for first in range(0, NEURONS, BLOCK):
        slots = first + tl.arange(0, BLOCK)
        tl.store(chosen + slots, -1, mask=(slots >= count) & (slots < NEURONS))
