"""``SparseMLP``: gate and up of the active neurons in one pass, then their rows of ``w_down``."""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl

from shadowllm.plugins.program import Size
from shadowllm.plugins.triton.project_back import back_calls
from shadowllm.plugins.triton.schedule import GEMV, Call, Schedule, Shape, Tier, Workspace
from shadowllm.plugins.triton.tiles import (
    active_rows,
    add_along,
    block_along,
    sum_along,
    tile_warps,
    token_tile,
    zeros_along,
)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The MLP's activation of float32 values."""
    if ACTIVATION == "relu":
        return tl.where(x < 0, 0.0, x)  # keeps a NaN, which a maximum may drop
    elif ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    else:
        return x * 0.5 * (1 + tl.erf(x * 0.7071067811865476))


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
    tokens,
    CAP: tl.constexpr,
    NEURONS: tl.constexpr,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``hidden (tokens, CAP)``: what the active neurons make of ``x (tokens, WIDTH)``, slot by slot.

    Blocks past the count end at once: with half the neurons, half of the grid costs nothing.
    """
    first = tl.program_id(0) * BLOCK_N
    n = tl.minimum(tl.load(count), CAP)
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
    tl.store(
        hidden + rows_m[:, None].to(tl.int64) * CAP + slots[None, :],
        h.to(hidden.dtype.element_ty),
        mask=(rows_m < tokens)[:, None] & live[None, :],
    )


def plan_sparse_mlp(shapes: Mapping[str, Shape], itemsize: int, tier: Tier, activation: str) -> Schedule:
    """How to launch ``SparseMLP`` in a tier.

    Args:
        shapes: of the inputs that are there, by name.
        itemsize: bytes of an element of the weights.
    """
    neurons, width = shapes["w_up"]
    (cap,) = shapes["indices"]
    workspace = Workspace()
    hidden = workspace.take(tier.tokens * cap, "T", itemsize)
    # One token: few rows a block, so that there are enough blocks to load from everywhere at once.
    rows = 8 if tier.block == GEMV else 64
    inputs = [name for name in ("x", "indices", "count", "w_gate", "b_gate", "w_up", "b_up") if name in shapes]
    up = Call(
        mlp_hidden,
        (Size(cap, divisor=rows), tier.tiles, Size()),
        {name: name for name in inputs} | {"hidden": hidden, "tokens": tier.size},
        {
            "CAP": cap,
            "NEURONS": neurons,
            "WIDTH": width,
            "ACTIVATION": activation,
            "BLOCK_M": tier.block,
            "BLOCK_N": rows,
            "BLOCK_K": block_along(width, tier.block, itemsize),
        },
        warps=tile_warps(tier.block, itemsize),
        stages=3,
    )
    back = back_calls(
        workspace,
        tier,
        hidden,
        "w_down",
        "b_down" if "b_down" in shapes else None,
        cap=cap,
        units=neurons,
        itemsize=itemsize,
        group=1,
        width=width,
        skip_zeros=activation == "relu" and "w_gate" not in shapes,
    )
    return Schedule(tier.max_batch, tier.max_seqlen, workspace.bytes, (up, *back))
