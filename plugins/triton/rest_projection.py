"""Projects the rest back to the hidden size: the units of a sparse op that are computed from the low-bit copy."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from shadowllm.plugins.kernel_program import Size
from shadowllm.plugins.triton.low_bit import IN_WORD, add_rows, rest_is_added, row_sum, row_tile, zero_sums
from shadowllm.plugins.triton.schedule import GEMV, PREFILL, Call, Operand, Scratch, Shape, Tier, Workspace
from shadowllm.plugins.triton.tiles import LINE, dot, tile_warps

# Number of blocks that keeps every multiprocessor of a large GPU loading.
BLOCKS = 512
MAX_SPLITS = 32


@dataclass(frozen=True)
class Rest:
    """The rest of a sparse op.

    Attributes:
        hidden: ``(tokens, units * group)`` of type T.
        order: int32 ``(units,)``: the units in the order of ``hidden``, first the active ones, whose hidden values are
            not read; None for ascending order, where the active ones have hidden values of zero.
        active: int32 number of active units.
        copy, scales: names of the inputs that hold the copy of the weight.
        blocks, words: blocks in a row of the copy, and int32 words in a block.
    """

    hidden: Scratch
    order: Operand | None
    active: Operand
    copy: str
    scales: str
    blocks: int
    words: int

    @property
    def operands(self) -> dict[str, Operand]:
        """The operands of a kernel that reads the copy."""
        return {"copy": self.copy, "scales": self.scales}

    @property
    def constants(self) -> dict[str, int]:
        """The constants of such a kernel."""
        return {"BLOCKS": self.blocks, "BLOCK_WORDS": self.words}


def rest_call(
    workspace: Workspace, tier: Tier, rest: Rest, *, units: int, group: int, itemsize: int, width: int, most: int
) -> tuple[Call, dict[str, Operand], dict[str, int]]:
    """The launch of `project_rest`, and the operands and constants by which `sum_partials` adds its result.

    Args:
        units, group: the copy has ``units * group`` rows.
        itemsize: bytes per element of type T.
        width: hidden size.
        most: most splits of the sum over the rows.
    """
    rows, words = word_tile(tier, (0, rest.blocks, rest.words), itemsize)
    tiles = triton.cdiv(rest.blocks * rest.words, words)
    splits = 1 if tier.block == PREFILL else min(most, triton.cdiv(BLOCKS, tiles), triton.cdiv(units * group, rows))
    partials = workspace.take(splits * tier.tokens * width, "float32", 4)
    read: dict[str, Operand] = {"active": rest.active, "rest": "rest"}
    order: dict[str, Operand] = {} if rest.order is None else {"order": rest.order}
    operands = {"hidden": rest.hidden, "partials": partials, "tokens": tier.size, **rest.operands, **read, **order}
    call = Call(
        project_rest,
        (Size(tiles), Size(splits), tier.tiles),
        operands,
        {
            "UNITS": units,
            "GROUP": group,
            "WIDTH": width,
            "SPLITS": splits,
            **rest.constants,
            "BLOCK_M": tier.block,
            "BLOCK_N": rows,
            "BLOCK_W": words,
        },
        warps=tile_warps(tier.block, itemsize),
        stages=3,
    )
    return call, read | {"rest_partials": partials}, {"UNITS": units, "REST_SPLITS": splits}


def word_tile(tier: Tier, copy: Shape, itemsize: int) -> tuple[int, int]:
    """Rows of a copy ``(rows, blocks, words)``, and words of each, that a block loads at a time."""
    _, blocks, words = copy
    if tier.block == GEMV:
        return 16, min(32, triton.next_power_of_2(blocks * words))
    return LINE // itemsize, words


@triton.jit
def project_rest(
    hidden,
    order,
    active,
    rest,
    copy,
    scales,
    partials,
    tokens,
    UNITS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Multiply ``hidden (tokens, UNITS * GROUP)`` by the rows of the copy that belong to the rest.

    Block (tile of words, split, token tile) writes the sum over its share of the rows into
    ``partials (SPLITS, tokens, WIDTH)``. With ``order``, the rows of the first ``active`` units are left out. Nothing
    is read or written if no rest is added.
    """
    if not rest_is_added(rest, active, UNITS):
        return
    split = tl.program_id(1)
    begin = tl.zeros((), tl.int32)
    if order is not None:
        begin += tl.load(active) * GROUP
    share = tl.cdiv(tl.cdiv(UNITS * GROUP - begin, SPLITS), BLOCK_N) * BLOCK_N
    first = begin + split * share
    stop = tl.minimum(UNITS * GROUP, first + share)
    if BLOCK_M == 1:
        project_one(
            hidden, order, copy, scales, partials + split.to(tl.int64) * WIDTH, first, stop,
            GROUP, WIDTH, BLOCKS, BLOCK_WORDS, BLOCK_N, BLOCK_W,
        )  # fmt: skip
        return
    words = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    rows_m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_W * IN_WORD), tl.float32)
    for start in range(first, stop, BLOCK_N):
        slots = start + tl.arange(0, BLOCK_N)
        live = slots < stop
        rows = rest_rows(order, slots, live, GROUP)
        place = rows_m[:, None].to(tl.int64) * (UNITS * GROUP) + slots[None, :]
        tile = tl.load(hidden + place, mask=(rows_m < tokens)[:, None] & live[None, :], other=0.0)
        matrix = row_tile(copy, scales, None, rows, live, words, BLOCKS, BLOCK_WORDS, BLOCK_N, BLOCK_W)
        acc = dot(tile, matrix.to(tile.dtype), acc)
    cols = tl.program_id(0) * (BLOCK_W * IN_WORD) + tl.arange(0, BLOCK_W * IN_WORD)
    place = (split * tokens + rows_m)[:, None].to(tl.int64) * WIDTH + cols[None, :]
    tl.store(partials + place, acc, mask=(rows_m < tokens)[:, None] & (cols < WIDTH)[None, :])


@triton.jit
def rest_rows(order, slots, live, GROUP: tl.constexpr):
    """Rows of the copy at the slots of ``order``, int64; without an order, the slots."""
    if order is None:
        return slots.to(tl.int64)
    else:
        return tl.load(order + slots // GROUP, mask=live, other=0).to(tl.int64) * GROUP + slots % GROUP


@triton.jit
def project_one(
    hidden,
    order,
    copy,
    scales,
    out,
    first,
    stop,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """`project_rest` for one token.

    Rows whose hidden value is zero are not read: an active neuron, or one that ReLU set to zero.
    """
    words = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    sums = zero_sums(BLOCK_N, BLOCK_W)
    for start in tl.range(first, stop, BLOCK_N, loop_unroll_factor=2):
        slots = start + tl.arange(0, BLOCK_N)
        live = slots < stop
        value = tl.load(hidden + slots, mask=live, other=0.0).to(tl.float32)
        rows = rest_rows(order, slots, live, GROUP)
        sums = add_rows(sums, value, copy, scales, None, rows, live & (value != 0), words, BLOCKS, BLOCK_WORDS)
    cols = tl.program_id(0) * (BLOCK_W * IN_WORD) + tl.arange(0, BLOCK_W * IN_WORD)
    tl.store(out + cols, row_sum(sums, BLOCK_N, BLOCK_W), mask=cols < WIDTH)
