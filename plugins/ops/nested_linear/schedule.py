"""How ``NestedLinear`` is launched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from shadowllm.plugins.kernel_program import Size
from shadowllm.plugins.ops.nested_linear.kernel import multiply_rows
from shadowllm.plugins.schema import Attributes
from shadowllm.plugins.triton.low_bit import token_block, word_constants
from shadowllm.plugins.triton.schedule import GEMV, Call, Operand, Schedule, Shape, Tier, tiers
from shadowllm.plugins.triton.tiles import tile_warps


def schedules(
    shapes: Mapping[str, Shape], attributes: Attributes, *, itemsize: int, max_batch: int, max_seqlen: int
) -> list[Schedule]:
    """See `triton.schedule.Planner`; the rows of x are the batch."""
    return [plan_nested_linear(shapes, itemsize, tier) for tier in tiers(max_batch, 1)]


def plan_nested_linear(shapes: Mapping[str, Shape], itemsize: int, tier: Tier) -> Schedule:
    """How to launch ``NestedLinear`` in a tier.

    Args:
        shapes: shapes of the present inputs, by name; the copy's last dimension counts int32 words.
        itemsize: bytes per element of x.
    """
    rows = shapes["copy"][0]
    block_m, block_n = token_block(tier, itemsize), 4 if tier.block == GEMV else 32
    operands: dict[str, Operand] = {name: name for name in (*shapes, "y")}
    call = Call(
        multiply_rows,
        (Size(rows, divisor=block_n), replace(tier.size, divisor=block_m), Size()),
        operands | {"tokens": tier.size},
        {
            "ROWS": rows,
            "WIDTH": shapes["x"][-1],
            **word_constants(shapes["copy"], tier, block_n),
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
        },
        warps=tile_warps(tier.block, itemsize),
        stages=3,
    )
    return Schedule(tier.max_batch, tier.max_seqlen, 0, (call,))
