"""``SparseMLP``: gate and up of the active neurons in one pass.

`plugins.triton.output_projection` multiplies the result by their rows of ``w_down``. With a low-bit copy, the kernel of
``ScoreNeurons`` computes the products of all neurons first, and that of ``SelectTopK`` may choose the active ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

from shadowllm.plugins.triton.tiles import activate, active_rows, add_along, sum_along, token_tile, zeros_along


@triton.jit
def mlp_hidden(
    x,
    indices,
    count,
    w_gate,
    b_gate,
    w_up,
    b_up,
    hidden,
    products,
    tokens,
    CAP: tl.constexpr,
    NEURONS: tl.constexpr,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write ``hidden (tokens, CAP)``: the outputs of the active neurons for ``x (tokens, WIDTH)``, by slot.

    If given, ``products (tokens, NEURONS)`` of a low-bit copy become zero for the active neurons, which replace them.
    Blocks past the count return at once, so half of the grid costs nothing if half of the neurons are active.
    """
    first = tl.program_id(0) * BLOCK_N
    n = tl.minimum(tl.maximum(tl.load(count), 0), CAP)
    if first >= n:
        return
    slots = first + tl.arange(0, BLOCK_N)
    rows, live = active_rows(indices, n, slots, 1, NEURONS)
    rows_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
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
    h = sum_along(up, BLOCK_M)
    if b_up is not None:
        h += tl.load(b_up + rows, mask=live, other=0.0)[None, :].to(tl.float32)
    if w_gate is not None:
        g = sum_along(gate, BLOCK_M)
        if b_gate is not None:
            g += tl.load(b_gate + rows, mask=live, other=0.0)[None, :].to(tl.float32)
        h *= activate(g, ACTIVATION)
    else:
        h = activate(h, ACTIVATION)
    inside_m = (rows_m < tokens)[:, None] & live[None, :]
    place = rows_m[:, None].to(tl.int64) * CAP + slots[None, :]
    tl.store(hidden + place, h.to(hidden.dtype.element_ty), mask=inside_m)
    if products is not None:
        place = rows_m[:, None].to(tl.int64) * NEURONS + rows[None, :]
        tl.store(products + place, tl.zeros_like(h).to(products.dtype.element_ty), mask=inside_m)
