"""Projects back to the hidden size with the active rows of a weight; MLP and attention both use it."""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl

from shadowllm.plugins.kernel_program import Size
from shadowllm.plugins.triton.block_end import BlockEnd, end_call, split_blocks, sum_partials
from shadowllm.plugins.triton.hidden_values import Spans, hidden_values
from shadowllm.plugins.triton.low_bit import IN_WORD, add_rows, row_sum, row_tile, zero_sums
from shadowllm.plugins.triton.rest_projection import BLOCKS, MAX_SPLITS, Rest, rest_call, word_tile
from shadowllm.plugins.triton.schedule import GEMV, PREFILL, Call, Operand, Scratch, Tier, Workspace
from shadowllm.plugins.triton.tiles import LINE, active_rows, dot, tile_warps

# Bytes of partial sums that the one block of `block_end.sum_and_norm` adds up for a token.
MAX_PARTIAL_BYTES = 128 * 1024


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
    nested: bool = False,
    spans: Spans | None = None,
    end: BlockEnd | None = None,
) -> tuple[Call, ...]:
    """The launches of `project_back`, of `project_rest` if there is a rest, and of the sum: they write "y".

    Args:
        hidden: ``(tokens, cap * group)`` of type T.
        weight, bias: names of inputs; None for no bias.
        cap: length of the indices.
        units, group: the weight has ``units * group`` rows.
        itemsize: bytes per element of type T.
        skip_zeros: whether to skip weight rows whose hidden values are zero.
        indices, count: the active units; None for all.
        rest: the units that are computed from a low-bit copy.
        nested: whether the weight is the residual of this copy. Then there are no spans.
        spans: if ``hidden`` has the results of several spans of the cache.
        end: if the sum also adds the hidden states and norms them.
    """
    copied = rest if nested else None
    rows, cols = _tile(tier, width, itemsize, end is not None, copied)
    tiles = triton.cdiv(width, cols)
    most = MAX_SPLITS if end is None else max(1, min(MAX_SPLITS, MAX_PARTIAL_BYTES // (4 * width)))
    splits = 1 if tier.block == PREFILL else min(most, triton.cdiv(BLOCKS, tiles), triton.cdiv(cap * group, rows))
    partials = workspace.take(splits * tier.tokens * width, "float32", 4)
    constants = {"WIDTH": width, "SPLITS": splits, "BLOCK_D": cols}
    given = {"indices": indices, "count": count, "lengths": "lengths" if spans else None}
    multiply = Call(
        project_back,
        (Size(tiles), Size(splits), tier.tiles),
        {
            "hidden": hidden,
            **{name: one for name, one in given.items() if one is not None},
            **(copied.operands if copied else {}),
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
            **(spans or Spans()).constants,
            **(copied.constants if copied else {"BLOCKS": 0, "BLOCK_WORDS": 0}),
            "BLOCK_M": tier.block,
            "BLOCK_N": rows,
        },
        warps=tile_warps(tier.block, itemsize),
        stages=3,
    )
    summed: dict[str, Operand] = {"partials": partials, "y": "y", "tokens": tier.size}
    more, sizes = list[Call](), {"UNITS": units, "REST_SPLITS": 0}
    if rest is not None:
        shape = {"units": units, "group": group, "itemsize": itemsize, "width": width}
        call, read, sizes = rest_call(workspace, tier, rest, **shape, most=most)
        more, summed = [call], summed | read
    return multiply, *more, _sum_call(end, tier, bias, summed, constants | sizes)


def _sum_call(
    end: BlockEnd | None, tier: Tier, bias: str | None, summed: Mapping[str, Operand], constants: Mapping[str, int]
) -> Call:
    summed = {**summed, **({"bias": bias} if bias else {})}
    if end is not None:
        return end_call(end, tier, summed, constants)
    # Tokens are along x, because the other two axes of a grid are limited to 65,535.
    grid = (tier.size, Size(constants["WIDTH"], divisor=constants["BLOCK_D"]), Size())
    return Call(
        sum_partials, grid, summed, {**constants, **split_blocks(constants["SPLITS"], constants["REST_SPLITS"])}
    )


def _tile(tier: Tier, width: int, itemsize: int, ended: bool, copied: Rest | None) -> tuple[int, int]:
    """Rows and columns of the weight that a block of `project_back` loads at a time.

    If one block adds up the sums of a token, it should get few of them. Then tiles have fewer columns, so that as many
    blocks have fewer splits. Both tiles for one token have 4096 numbers. Nested integers have the tiles of their copy.
    """
    if copied is not None:
        rows, words = word_tile(tier, (0, copied.blocks, copied.words), itemsize)
        return rows, words * IN_WORD.value
    if tier.block != GEMV:
        return LINE // itemsize, 64
    return (32, 128) if ended else (16, min(256, triton.next_power_of_2(width)))


@triton.jit
def project_back(
    hidden,
    indices,
    count,
    lengths,
    weight,
    copy,
    scales,
    partials,
    tokens,
    CAP: tl.constexpr,
    UNITS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    SKIP_ZEROS: tl.constexpr,
    SPANS: tl.constexpr,
    SPAN: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Multiply ``hidden (tokens, CAP * GROUP)`` by the active rows of ``weight (UNITS * GROUP, WIDTH)``.

    Block (column tile, split, token tile) writes the sum over its share of the active rows into
    ``partials (SPLITS, tokens, WIDTH)``. `sum_partials` adds them in a fixed order, so that results do
    not depend on scheduling. This is the down projection (a unit is a neuron, one row) and the output
    projection (a unit is a head, ``head_dim`` rows). With ``lengths``, a head's values are merged from its spans. With
    a low-bit copy and its scales, the weight is the residual that completes it.
    """
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(1)
    rows_m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.zeros((), tl.int32) + CAP
    if count is not None:
        n = tl.minimum(tl.maximum(tl.load(count), 0), CAP)
    share = tl.cdiv(tl.cdiv(n * GROUP, SPLITS), BLOCK_N) * BLOCK_N
    stop = tl.minimum(n * GROUP, (split + 1) * share)
    acc = zero_partials(copy, BLOCK_M, BLOCK_N, BLOCK_D)
    for start in range(split * share, stop, BLOCK_N):
        slots = start + tl.arange(0, BLOCK_N)
        rows, live = active_rows(indices, n, slots, GROUP, UNITS)
        h = hidden_values(
            hidden, lengths, rows_m, slots, live, tokens, CAP, GROUP, SPANS, SPAN, CAPACITY, BLOCK_S, BLOCK_M,
            weight.dtype.element_ty,
        )  # fmt: skip
        if SKIP_ZEROS:  # a neuron that ReLU set to zero needs no weights
            live = live & (h != 0)
        acc = add_partials(
            acc, h, weight, copy, scales, rows, live, cols, WIDTH, BLOCKS, BLOCK_WORDS, BLOCK_M, BLOCK_N, BLOCK_D
        )
    total = share_sum(acc, copy, BLOCK_M, BLOCK_N, BLOCK_D)
    place = (split * tokens + rows_m)[:, None].to(tl.int64) * WIDTH + cols[None, :]
    tl.store(partials + place, total, mask=(rows_m < tokens)[:, None] & (cols < WIDTH)[None, :])


@triton.jit
def zero_partials(copy, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Initial sums for `add_partials`."""
    if BLOCK_M > 1:
        return tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    elif copy is None:
        return tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    else:
        return zero_sums(BLOCK_N, BLOCK_D // IN_WORD)


@triton.jit
def add_partials(
    acc,
    h,
    weight,
    copy,
    scales,
    rows,
    live,
    cols,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add the products of hidden values ``(M, N)``, or ``(N,)`` of one token, with columns of live rows ``(N,)``."""
    if copy is None:
        place = rows[:, None] * WIDTH + cols[None, :]
        w = tl.load(weight + place, mask=live[:, None] & (cols < WIDTH)[None, :], other=0.0)
        if BLOCK_M == 1:
            return acc + h[:, None].to(tl.float32) * w.to(tl.float32)
        else:
            return dot(h, w, acc)
    else:
        BLOCK_W: tl.constexpr = BLOCK_D // IN_WORD
        words = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
        if BLOCK_M == 1:
            return add_rows(acc, h.to(tl.float32), copy, scales, weight, rows, live, words, BLOCKS, BLOCK_WORDS)
        else:
            w = row_tile(copy, scales, weight, rows, live, words, BLOCKS, BLOCK_WORDS, BLOCK_N, BLOCK_W)
            return dot(h, w.to(h.dtype), acc)


@triton.jit
def share_sum(acc, copy, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """The final products ``(M, D)``, from the sums of `add_partials`."""
    if BLOCK_M > 1:
        return acc
    elif copy is None:
        return tl.sum(acc, 0)[None, :]
    else:
        return row_sum(acc, BLOCK_N, BLOCK_D // IN_WORD)[None, :]
