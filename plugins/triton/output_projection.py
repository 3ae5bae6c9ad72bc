"""Projects back to the hidden size with the active rows of a weight; MLP and attention both use it.

If other units are computed from the low-bit copy of the weight, more blocks of the same launch add them: the *rest*.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from shadowllm.plugins.kernel_program import Size
from shadowllm.plugins.triton.block_end import BlockEnd, finish_token, parts_block, row_block, sum_call
from shadowllm.plugins.triton.block_sync import Counters
from shadowllm.plugins.triton.hidden_values import Spans, hidden_values
from shadowllm.plugins.triton.low_bit import IN_WORD, add_rows, rest_is_added, row_sum, row_tile, zero_sums
from shadowllm.plugins.triton.schedule import GEMV, PREFILL, Call, Operand, Scratch, Tier, Workspace
from shadowllm.plugins.triton.tiles import LINE, active_rows, dot, tile_warps

# Number of blocks that keeps every multiprocessor of a large GPU loading.
ENOUGH_BLOCKS = 512
MAX_SPLITS = 32
# Bytes of partial sums that the one block of `block_end.sum_and_norm` adds up for a token at a time.
MAX_PARTIAL_BYTES = 128 * 1024


@dataclass(frozen=True)
class Rest:
    """The low-bit copy of a weight, from which the units that are not active are computed.

    Attributes:
        copy, scales: names of the inputs that hold the copy of the weight.
        products: hidden values ``(tokens, units * group)`` of all units, of type T and zero for the active ones. None
            if those of the rest follow those of the active units, and the indices list both.
        blocks, words: blocks in a row of the copy, and int32 words in a block.
    """

    copy: str
    scales: str
    products: Scratch | None
    blocks: int
    words: int

    @property
    def operands(self) -> dict[str, Operand]:
        """Operands of `project_back`."""
        more = {} if self.products is None else {"products": self.products}
        return {"copy": self.copy, "scales": self.scales, "rest": "rest", **more}

    @property
    def constants(self) -> dict[str, int]:
        """Constants of `project_back`."""
        return {"BLOCKS": self.blocks, "BLOCK_WORDS": self.words}


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
    spans: Spans | None = None,
    end: BlockEnd | None = None,
    counters: Counters | None = None,
) -> tuple[Call, ...]:
    """The launch of `project_back`, and for more than one token that of the sum: they write "y".

    Args:
        hidden: ``(tokens, cap * group)`` of type T.
        weight, bias: names of inputs; None for no bias. Integers are the residual of the copy that the rest has.
        cap: length of the indices.
        units, group: the weight has ``units * group`` rows.
        itemsize: bytes per element of type T.
        skip_zeros: whether to skip weight rows whose hidden values are zero.
        indices, count: the active units; None for all.
        rest: the units that are computed from a low-bit copy.
        spans: if ``hidden`` has the results of several spans of the cache.
        end: if the sum also adds the hidden states and norms them.
        counters: from `counters_of`, set to zero by an earlier launch.
    """
    rows, cols = _tile(tier, itemsize)
    tiles = triton.cdiv(width, cols)
    most = min(_most_splits(tier, width, end is not None), triton.cdiv(ENOUGH_BLOCKS, tiles))
    splits = _splits(tier, cap * group, rows, most)
    rest_splits = _splits(tier, units * group, rows, most) if rest else 0
    partials = workspace.take((splits + rest_splits) * tier.tokens * width, "float32", 4)
    sizes = {"WIDTH": width, "UNITS": units, "SPLITS": splits, "REST_SPLITS": rest_splits}
    sizes |= {"BLOCK_D": cols, "BLOCK_P": parts_block(splits, rest_splits)}
    operands = {
        "hidden": hidden,
        "indices": indices,
        "count": count,
        "lengths": "lengths" if spans else None,
        **(rest.operands if rest else {}),
        "weight": weight,
        "partials": partials,
        "tokens": tier.size,
    }
    constants = (spans or Spans()).constants | (rest.constants if rest else {"BLOCKS": 0, "BLOCK_WORDS": 0})
    constants |= {"CAP": cap, "GROUP": group, "SKIP_ZEROS": int(skip_zeros and tier.block == GEMV)}
    constants |= {"BLOCK_M": tier.block, "BLOCK_N": rows}
    result: dict[str, Operand] = {"y": "y", **({"bias": bias} if bias else {})}
    if counters is not None:
        operands |= {**result, **(end.operands if end else {}), "finished": counters.memory}
    multiply = Call(
        project_back,
        (Size(tiles), Size(splits + rest_splits), tier.tiles),
        {name: operand for name, operand in operands.items() if operand is not None},
        {**sizes, **constants, "BLOCK_ROW": row_block(width), "EPS": end.eps if end else 0.0},
        warps=tile_warps(tier.block, itemsize),
        stages=3,
    )
    if counters is not None:
        return (multiply,)
    summed: dict[str, Operand] = {"partials": partials, **result, "tokens": tier.size}
    if rest is not None and count is not None:
        summed |= {"rest": "rest", "active": count}
    return multiply, sum_call(end, tier, summed, sizes)


def counters_of(workspace: Workspace, tier: Tier, width: int, itemsize: int) -> Counters | None:
    """The counters of `back_calls` for one token, which an earlier launch must set to zero; None for more tokens."""
    _, cols = _tile(tier, itemsize)
    return Counters.take(workspace, 1 + triton.cdiv(width, cols)) if tier.block == GEMV else None


def _most_splits(tier: Tier, width: int, ended: bool) -> int:
    one_block = ended and tier.block != GEMV  # it adds up all sums of a token
    return max(1, min(MAX_SPLITS, MAX_PARTIAL_BYTES // (4 * width))) if one_block else MAX_SPLITS


def _splits(tier: Tier, rows: int, together: int, most: int) -> int:
    """The number of parts in which rows are summed, if a block loads some of them together."""
    return 1 if tier.block == PREFILL else min(most, triton.cdiv(rows, together))


def _tile(tier: Tier, itemsize: int) -> tuple[int, int]:
    """Rows and columns of the weight, or of its copy, that a block of `project_back` loads at a time."""
    return (32, 128) if tier.block == GEMV else (LINE // itemsize, 64)


@triton.jit
def project_back(
    hidden, products, indices, count, lengths, weight, copy, scales, rest, partials,
    bias, y, skip, norm_weight, norm_bias, output_norm_weight, normed, finished, tokens,
    CAP: tl.constexpr, UNITS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    SPLITS: tl.constexpr, REST_SPLITS: tl.constexpr, SKIP_ZEROS: tl.constexpr, EPS: tl.constexpr,
    SPANS: tl.constexpr, SPAN: tl.constexpr, CAPACITY: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_ROW: tl.constexpr,
):  # fmt: skip
    """Multiply ``hidden (tokens, CAP * GROUP)`` by the active rows of ``weight (UNITS * GROUP, WIDTH)``.

    Block (column tile, split, token tile) writes the sum over its share of the active rows into
    ``partials (SPLITS + REST_SPLITS, tokens, WIDTH)``. They are added in a fixed order, so that results do not depend
    on scheduling: for one token by `finish_token`, for more by another launch. This is the down projection (a unit is a
    neuron, one row) and the output projection (a unit is a head, ``head_dim`` rows). With ``lengths``, a head's values
    are merged from its spans. A weight of integers is the residual that completes the low-bit copy.

    With ``rest``, the last ``REST_SPLITS`` splits multiply the other units by their rows of the copy: those of
    ``products (tokens, UNITS * GROUP)`` that are not zero, or without it the slots after the active ones. Nothing is
    read or written there if no rest is added.
    """
    TYPE: tl.constexpr = tl.float32 if weight.dtype.element_ty.is_int() else weight.dtype.element_ty
    split = tl.program_id(1)
    n = tl.zeros((), tl.int32) + CAP
    if count is not None:
        n = tl.minimum(tl.maximum(tl.load(count), 0), CAP)
    if split < SPLITS:
        write_share(
            hidden, indices, lengths, weight, copy, scales, partials, tokens, n, 0, split, SPLITS, SKIP_ZEROS, TYPE,
            CAP, UNITS, GROUP, WIDTH, SPANS, SPAN, CAPACITY, BLOCK_S, BLOCKS, BLOCK_WORDS, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    elif rest is not None:  # noqa: SIM102 -- known at compile time, and the next one is not
        if rest_is_added(rest, count, UNITS):
            write_share(
                hidden if products is None else products, indices if products is None else None, lengths, None, copy,
                scales, partials, tokens, UNITS, n if products is None else 0, split - SPLITS, REST_SPLITS,
                True, TYPE, UNITS, UNITS, GROUP, WIDTH, SPANS, SPAN, CAPACITY, BLOCK_S, BLOCKS, BLOCK_WORDS,
                BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
    if finished is not None:
        finish_token(
            partials, bias, y, rest, count, skip, norm_weight, norm_bias, output_norm_weight, normed, finished,
            WIDTH, SPLITS, REST_SPLITS, UNITS, EPS, BLOCK_D, BLOCK_P, BLOCK_ROW,
        )  # fmt: skip


@triton.jit
def write_share(
    hidden,
    indices,
    lengths,
    weight,
    copy,
    scales,
    partials,
    tokens,
    units,
    skipped,
    part,
    PARTS: tl.constexpr,
    SKIP_ZEROS: tl.constexpr,
    TYPE: tl.constexpr,
    CAP: tl.constexpr,
    UNITS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
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
    """Write this block's partial sums: those of a part of the rows of the first ``units``, without those ``skipped``.

    Without a weight, the rows are those of the copy.
    """
    FROM_COPY: tl.constexpr = True if weight is None else weight.dtype.element_ty.is_int()
    UNROLL: tl.constexpr = 2 if BLOCK_M == 1 and weight is None else 1
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    rows_m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    begin, end = skipped * GROUP, units * GROUP
    share = tl.cdiv(tl.cdiv(end - begin, PARTS), BLOCK_N) * BLOCK_N
    first = begin + part * share
    acc = zero_partials(FROM_COPY, BLOCK_M, BLOCK_N, BLOCK_D)
    for start in tl.range(first, tl.minimum(end, first + share), BLOCK_N, loop_unroll_factor=UNROLL):
        slots = start + tl.arange(0, BLOCK_N)
        rows, live = active_rows(indices, units, slots, GROUP, UNITS)
        h = hidden_values(
            hidden, lengths, rows_m, slots, live, tokens, CAP, GROUP, SPANS, SPAN, CAPACITY, BLOCK_S, BLOCK_M, TYPE
        )
        if SKIP_ZEROS and BLOCK_M == 1:  # such a neuron needs no weights: it is zero after a ReLU, or not of the rest
            live = live & (h != 0)
        acc = add_partials(
            acc, h, weight, copy, scales, rows, live, cols, FROM_COPY, WIDTH, BLOCKS, BLOCK_WORDS,
            BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    total = share_sum(acc, FROM_COPY, BLOCK_M, BLOCK_N, BLOCK_D)
    place = (tl.program_id(1) * tokens + rows_m)[:, None].to(tl.int64) * WIDTH + cols[None, :]
    tl.store(partials + place, total, mask=(rows_m < tokens)[:, None] & (cols < WIDTH)[None, :])


@triton.jit
def zero_partials(FROM_COPY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Initial sums for `add_partials`."""
    if BLOCK_M > 1:
        return tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    elif FROM_COPY:
        return zero_sums(BLOCK_N, BLOCK_D // IN_WORD)
    else:
        return tl.zeros((BLOCK_N, BLOCK_D), tl.float32)


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
    FROM_COPY: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add the products of hidden values ``(M, N)``, or ``(N,)`` of one token, with columns of live rows ``(N,)``."""
    if FROM_COPY:
        BLOCK_W: tl.constexpr = BLOCK_D // IN_WORD
        words = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
        if BLOCK_M == 1:
            return add_rows(acc, h.to(tl.float32), copy, scales, weight, rows, live, words, BLOCKS, BLOCK_WORDS)
        else:
            w = row_tile(copy, scales, weight, rows, live, words, BLOCKS, BLOCK_WORDS, BLOCK_N, BLOCK_W)
            return dot(h, w.to(h.dtype), acc)
    else:
        place = rows[:, None] * WIDTH + cols[None, :]
        w = tl.load(weight + place, mask=live[:, None] & (cols < WIDTH)[None, :], other=0.0)
        if BLOCK_M == 1:
            return acc + h[:, None].to(tl.float32) * w.to(tl.float32)
        else:
            return dot(h, w, acc)


@triton.jit
def share_sum(acc, FROM_COPY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """The final products ``(M, D)``, from the sums of `add_partials`."""
    if BLOCK_M > 1:
        return acc
    elif FROM_COPY:
        return row_sum(acc, BLOCK_N, BLOCK_D // IN_WORD)[None, :]
    else:
        return tl.sum(acc, 0)[None, :]
