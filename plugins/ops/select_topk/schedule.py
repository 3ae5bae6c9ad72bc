"""How ``SelectTopK`` is launched."""

from __future__ import annotations

from collections.abc import Mapping

import triton

from shadowllm.plugins.kernel_program import Size
from shadowllm.plugins.ops.select_topk.kernel import select_topk
from shadowllm.plugins.schema import Attributes
from shadowllm.plugins.triton.schedule import GEMV, Call, Schedule, Shape, Tier

# Scores that a block loads at a time; longer rows take several steps.
MAX_BLOCK = 8192


def schedules(
    shapes: Mapping[str, Shape], attributes: Attributes, *, itemsize: int, max_batch: int, max_seqlen: int
) -> list[Schedule]:
    """See `triton.schedule.Planner`; the limits are not used, because the rows, which are the batch, are known."""
    return [plan_select_topk(shapes, Tier(shapes["scores"][0], 1, GEMV), int(attributes["cap"]))]


def plan_select_topk(shapes: Mapping[str, Shape], tier: Tier, cap: int) -> Schedule:
    """How to launch ``SelectTopK``; its rows are the batch.

    Args:
        shapes: shapes of the inputs, by name.
    """
    width = shapes["scores"][1]
    block = min(MAX_BLOCK, max(16, triton.next_power_of_2(width)))
    call = Call(
        select_topk,
        (Size(batch=True), Size(), Size()),
        {"scores": "scores", "counts": "counts", "indices": "indices"},
        {"N": width, "CAP": cap, "BLOCK": block},
        warps=max(1, block // 512),
    )
    return Schedule(tier.max_batch, tier.max_seqlen, 0, (call,))
