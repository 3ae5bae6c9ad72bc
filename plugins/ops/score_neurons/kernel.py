"""``ScoreNeurons``: multiplies a packed 4-bit copy of gate and up, and keeps only one score per neuron.

``SparseMLP`` uses the same kernel, and keeps the product of each neuron too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from shadowllm.plugins.triton.block_sync import clear
from shadowllm.plugins.triton.low_bit import copy_products, rest_is_added
from shadowllm.plugins.triton.tiles import activate, times_up


@triton.jit
def score_neurons(
    x, gate, gate_scales, up, up_scales, b_gate, b_up, down_norms, count, rest, scores, products, counters, tokens,
    FIRST_UP: tl.constexpr, NEURONS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK_WORDS: tl.constexpr, ACTIVATION: tl.constexpr, THRESHOLD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, COUNTERS: tl.constexpr,
):  # fmt: skip
    """``scores (1, NEURONS)``: the mean over tokens of ``|product| * down_norms``, one tile of neurons per block.

    Row ``FIRST_UP`` of ``up`` is the first neuron's, because gate and up may be parts of one copy. If given,
    ``products (tokens, NEURONS)`` gets the product of each neuron, and ``scores`` may be absent.

    A block processes the token tiles one after the other, so that the order of a sum is fixed. If all neurons are kept,
    as in a prompt, no weights are read, because any scores select all of them.
    """
    clear(counters, COUNTERS)
    neurons = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = neurons < NEURONS
    total = tl.zeros((BLOCK_N,), tl.float32)
    wanted = rest_is_added(rest, count, NEURONS) if scores is None else tl.load(count) < NEURONS
    if wanted:
        rows = tl.where(live, neurons, 0).to(tl.int64)
        for first in range(0, tokens, BLOCK_M):
            up_rows = rows + FIRST_UP
            h = copy_products(
                x, up, up_scales, None, up_rows, live, first, tokens, WIDTH, BLOCKS, BLOCK_WORDS,
                BLOCK_M, BLOCK_N, BLOCK_W,
            )  # fmt: skip
            if b_up is not None:
                h += tl.load(b_up + rows, mask=live, other=0.0)[None, :].to(tl.float32)
            if gate is not None:
                g = copy_products(
                    x, gate, gate_scales, None, rows, live, first, tokens, WIDTH, BLOCKS, BLOCK_WORDS,
                    BLOCK_M, BLOCK_N, BLOCK_W,
                )  # fmt: skip
                if b_gate is not None:
                    g += tl.load(b_gate + rows, mask=live, other=0.0)[None, :].to(tl.float32)
                h = times_up(activate(g, ACTIVATION, THRESHOLD), h, ACTIVATION)
            else:
                h = activate(h, ACTIVATION, THRESHOLD)
            rows_m = first + tl.arange(0, BLOCK_M)
            inside = (rows_m < tokens)[:, None]
            if products is not None:
                place = rows_m.to(tl.int64)[:, None] * NEURONS + neurons[None, :]
                tl.store(products + place, h.to(products.dtype.element_ty), mask=inside & live[None, :])
            total += tl.sum(tl.where(inside, tl.abs(h), 0.0), 0)
        if scores is not None:
            total *= tl.load(down_norms + rows, mask=live, other=0.0) / tokens
    if scores is not None:
        tl.store(scores + neurons, total, mask=live)
