"""How ``NestedGather`` is launched."""

from __future__ import annotations

from collections.abc import Mapping

import triton

from shadowllm.plugins.kernel_program import Size
from shadowllm.plugins.ops.nested_gather.kernel import gather_rows
from shadowllm.plugins.schema import Attributes
from shadowllm.plugins.triton.schedule import Call, Schedule, Shape

# Words of a row that a block reads: one per thread.
MAX_BLOCK = 128


def schedules(
    shapes: Mapping[str, Shape], attributes: Attributes, *, itemsize: int, max_batch: int, max_seqlen: int
) -> list[Schedule]:
    """See `triton.schedule.Planner`; the numbers of the rows are the batch."""
    rows, blocks, words = shapes["copy"]
    block = min(MAX_BLOCK, triton.next_power_of_2(blocks * words))
    call = Call(
        gather_rows,
        (Size(batch=True), Size(blocks * words, divisor=block), Size()),
        {name: name for name in ("ids", "w", "copy", "scales", "y")},
        {
            "ROWS": rows,
            "WIDTH": int(attributes["width"]),
            "BLOCKS": blocks,
            "BLOCK_WORDS": words,
            "BLOCK_W": block,
        },
    )
    return [Schedule(max_batch, 1, 0, (call,))]
