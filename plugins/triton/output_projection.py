"""Projects back to the hidden size with the active rows of a weight; MLP and attention both use it."""

from __future__ import annotations

import triton
import triton.language as tl

from shadowllm.plugins.kernel_program import Size
from shadowllm.plugins.triton.low_bit import rest_is_added
from shadowllm.plugins.triton.rest_projection import BLOCKS, MAX_SPLITS, Rest, rest_call
from shadowllm.plugins.triton.schedule import GEMV, PREFILL, Call, Operand, Scratch, Tier, Workspace
from shadowllm.plugins.triton.tiles import LINE, active_rows, dot, tile_warps


def back_calls(
    workspace: Workspace,
    tier: Tier,
    hidden: Scratch,
    weight: str,
    bias: str | None,
    *,
    cap: int,
    units: int,
    group: int,
    itemsize: int,
    width: int,
    skip_zeros: bool = False,
    indices: Operand | None = "indices",
    count: Operand | None = "count",
    rest: Rest | None = None,
) -> tuple[Call, ...]:
    """The launches of `project_back`, of `project_rest` if there is a rest, and of `sum_partials`: they write "y".

    Args:
        hidden: ``(tokens, cap * group)`` of type T.
        weight, bias: names of inputs; None for no bias.
        cap: length of the indices.
        units, group: the weight has ``units * group`` rows.
        itemsize: bytes per element of type T.
        skip_zeros: whether to skip weight rows whose hidden values are zero.
        indices, count: the active units; None for all.
        rest: the units that are computed from a low-bit copy.
    """
    rows, cols = (16, min(256, triton.next_power_of_2(width))) if tier.block == GEMV else (LINE // itemsize, 64)
    tiles = triton.cdiv(width, cols)
    splits = 1 if tier.block == PREFILL else min(MAX_SPLITS, triton.cdiv(BLOCKS, tiles), triton.cdiv(cap * group, rows))
    partials = workspace.take(splits * tier.tokens * width, "float32", 4)
    constants = {"WIDTH": width, "SPLITS": splits, "BLOCK_D": cols}
    multiply = Call(
        project_back,
        (Size(tiles), Size(splits), tier.tiles),
        {
            "hidden": hidden,
            **({} if indices is None else {"indices": indices}),
            **({} if count is None else {"count": count}),
            "weight": weight,
            "partials": partials,
            "tokens": tier.size,
        },
        constants
        | {
            "CAP": cap,
            "UNITS": units,
            "GROUP": group,
            "SKIP_ZEROS": int(skip_zeros and tier.block == GEMV),
            "BLOCK_M": tier.block,
            "BLOCK_N": rows,
        },
        warps=tile_warps(tier.block, itemsize),
        stages=3,
    )
    summed: dict[str, Operand] = {"partials": partials, "y": "y", "tokens": tier.size}
    if bias:
        summed["bias"] = bias
    more, sizes = list[Call](), {"UNITS": units, "REST_SPLITS": 0}
    if rest is not None:
        call, read, sizes = rest_call(workspace, tier, rest, units=units, group=group, itemsize=itemsize, width=width)
        more, summed = [call], summed | read
    # Tokens are along x, because the other two axes of a grid are limited to 65,535.
    total = Call(sum_partials, (tier.size, Size(tiles), Size()), summed, constants | sizes)
    return multiply, *more, total


@triton.jit
def project_back(
    hidden,
    indices,
    count,
    weight,
    partials,
    tokens,
    CAP: tl.constexpr,
    UNITS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    SKIP_ZEROS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Multiply ``hidden (tokens, CAP * GROUP)`` by the active rows of ``weight (UNITS * GROUP, WIDTH)``.

    Block (column tile, split, token tile) writes the sum over its share of the active rows into
    ``partials (SPLITS, tokens, WIDTH)``. `sum_partials` adds the shares in a fixed order, so that results do
    not depend on scheduling. This is the down projection (a unit is a neuron, one row) and the output
    projection (a unit is a head, ``head_dim`` rows).
    """
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(1)
    rows_m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.zeros((), tl.int32) + CAP
    if count is not None:
        n = tl.minimum(tl.maximum(tl.load(count), 0), CAP)
    share = tl.cdiv(tl.cdiv(n * GROUP, SPLITS), BLOCK_N) * BLOCK_N
    stop = tl.minimum(n * GROUP, (split + 1) * share)
    if BLOCK_M == 1:
        acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(split * share, stop, BLOCK_N):
        slots = start + tl.arange(0, BLOCK_N)
        rows, live = active_rows(indices, n, slots, GROUP, UNITS)
        h = tl.load(
            hidden + rows_m[:, None].to(tl.int64) * (CAP * GROUP) + slots[None, :],
            mask=(rows_m < tokens)[:, None] & live[None, :],
            other=0.0,
        )
        if SKIP_ZEROS:  # a neuron that ReLU set to zero needs no weights
            live = live & (tl.sum(h.to(tl.float32), 0) != 0)
        w = tl.load(
            weight + rows[:, None] * WIDTH + cols[None, :], mask=live[:, None] & (cols < WIDTH)[None, :], other=0.0
        )
        if BLOCK_M == 1:
            acc += tl.trans(h).to(tl.float32) * w.to(tl.float32)
        else:
            acc = dot(h, w, acc)
    if BLOCK_M == 1:
        total = tl.sum(acc, 0)[None, :]
    else:
        total = acc
    place = (split * tokens + rows_m)[:, None].to(tl.int64) * WIDTH + cols[None, :]
    tl.store(partials + place, total, mask=(rows_m < tokens)[:, None] & (cols < WIDTH)[None, :])


@triton.jit
def sum_partials(
    partials,
    bias,
    y,
    rest_partials,
    rest,
    active,
    tokens,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNITS: tl.constexpr,
    REST_SPLITS: tl.constexpr,
):
    """Write ``y (tokens, WIDTH)``: the shares of `project_back`, plus those of `project_rest`, plus the bias."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for split in range(SPLITS):
        total += tl.load(partials + (split * tokens + token) * WIDTH + cols, mask=cols < WIDTH, other=0.0)
    if rest is not None:  # noqa: SIM102 -- known at compile time, and the next one is not
        if rest_is_added(rest, active, UNITS):
            for split in range(REST_SPLITS):
                total += tl.load(rest_partials + (split * tokens + token) * WIDTH + cols, mask=cols < WIDTH, other=0.0)
    if bias is not None:
        total += tl.load(bias + cols, mask=cols < WIDTH, other=0.0).to(tl.float32)
    tl.store(y + token * WIDTH + cols, total.to(y.dtype.element_ty), mask=cols < WIDTH)
