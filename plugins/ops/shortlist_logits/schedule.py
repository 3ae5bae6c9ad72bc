"""How ``ShortlistLogits`` is launched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import triton

from shadowllm.plugins.kernel_program import Size
from shadowllm.plugins.ops.select_topk.schedule import MAX_BLOCK
from shadowllm.plugins.ops.shortlist_logits import kernel
from shadowllm.plugins.schema import Attributes
from shadowllm.plugins.triton.low_bit import is_residual, token_block, word_constants
from shadowllm.plugins.triton.schedule import DOT, GEMV, Call, Operand, Schedule, Shape, Tier, Workspace, tiers
from shadowllm.plugins.triton.tiles import block_along, tile_warps

# Rows of the table in a block that recomputes some of them.
GROUP = 8
# Blocks whose numbers are added up at a time.
PARTS = 1024


def schedules(
    shapes: Mapping[str, Shape], attributes: Attributes, *, itemsize: int, max_batch: int, max_seqlen: int
) -> list[Schedule]:
    """See `triton.schedule.Planner`; the rows of x are the batch."""
    return [plan_shortlist_logits(shapes, itemsize, tier) for tier in tiers(max_batch, 1)]


def plan_shortlist_logits(shapes: Mapping[str, Shape], itemsize: int, tier: Tier) -> Schedule:
    """How to launch ``ShortlistLogits`` in a tier.

    Args:
        shapes: shapes of the present inputs, by name; the copy's last dimension counts int32 words.
        itemsize: bytes per element of x and the table.
    """
    rows, width = shapes["table"][0], shapes["x"][-1]
    parts = -(-rows // GROUP)
    workspace = Workspace()
    scratch: dict[str, Operand] = {
        "limits": workspace.take(2 * tier.tokens, "int32", 4),
        "listed": workspace.take(tier.tokens * parts, "int32", 4),
        "largest": workspace.take(tier.tokens * parts, "float32", 4),
        "bounds": workspace.take(2 * tier.tokens, "float32", 4),
    }
    present: dict[str, Operand] = {name: name for name in (*shapes, "logits", "recomputed")}
    known = present | scratch | {"tokens": tier.size}
    each = (tier.size, Size(), Size())  # a block per row of x
    some = (Size(parts), tier.size, Size())
    block = min(MAX_BLOCK, max(16, triton.next_power_of_2(rows)))
    tile = {"ROWS": rows, "WIDTH": width, "BLOCK_N": GROUP, "BLOCK_K": block_along(width, GEMV, itemsize)}
    tile |= word_constants(shapes["copy"], Tier(1, 1, GEMV), GROUP)
    sums = {"PARTS": parts, "BLOCK": min(PARTS, triton.next_power_of_2(parts))}
    columns = {"WIDTH": width, "BLOCK_D": triton.next_power_of_2(width)}
    calls = (
        _table_call(rows, width, shapes, itemsize, tier, known),
        _copy_call(rows, width, shapes["copy"], itemsize, tier, known),
        _call(kernel.choose_shortlist, each, known, {"ROWS": rows, "BLOCK": block}, warps=max(1, block // 512)),
        _call(kernel.shortlist_logits, some, known, tile),
        _call(kernel.bound_row, each, known, sums | columns),
        _call(kernel.doubtful_logits, some, known, tile),
        _call(kernel.count_rows, each, known, sums | {"ROWS": rows}),
    )
    return Schedule(tier.max_batch, tier.max_seqlen, workspace.bytes, calls)


def _call(
    function: triton.JITFunction,
    grid: tuple[Size, Size, Size],
    known: Mapping[str, Operand],
    constants: Mapping[str, int],
    warps: int = 4,
) -> Call:
    operands = {name: known[name] for name in function.arg_names if name in known}
    return Call(function, grid, operands, constants, warps=warps, stages=3)


def _table_call(
    rows: int, width: int, shapes: Mapping[str, Shape], itemsize: int, tier: Tier, known: Mapping[str, Operand]
) -> Call:
    block_n = GROUP if tier.block == GEMV else 64
    block_m = token_block(tier, itemsize) if is_residual(shapes["table"]) else tier.block
    constants = {
        "ROWS": rows,
        "WIDTH": width,
        **word_constants(shapes["copy"], tier, block_n),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_along(width, tier.block, itemsize),
    }
    grid = (Size(rows, divisor=block_n), replace(tier.size, divisor=block_m), Size())
    return _call(kernel.table_logits, grid, known, constants, tile_warps(tier.block, itemsize))


def _copy_call(rows: int, width: int, copy: Shape, itemsize: int, tier: Tier, known: Mapping[str, Operand]) -> Call:
    # As in `score_neurons.schedule`: small tiles of tokens.
    block_m, block_n = (GEMV, 4) if tier.block == GEMV else (DOT, 32)
    constants = {
        "ROWS": rows,
        "WIDTH": width,
        **word_constants(copy, tier, block_n),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
    }
    grid = (Size(rows, divisor=block_n), replace(tier.size, divisor=block_m), Size())
    return _call(kernel.copy_logits, grid, known, constants, tile_warps(tier.block, itemsize))
