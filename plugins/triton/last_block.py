"""Lets the block of a launch that finishes last complete the work of all, which saves a launch.

Blocks that finish are counted in the workspace. A result does not depend on which block is the last, because the counts
decide only who does the rest of the work.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from shadowllm.plugins.triton.schedule import GEMV, Operand, Scratch, Tier, Workspace


@dataclass(frozen=True)
class Arrivals:
    """Counters of blocks that finished. An earlier launch of the op sets them to zero, see `clear`.

    Attributes:
        memory: first the number of column tiles that are complete, then for each of them the number of its blocks.
        count: counters in the memory, a power of two.
    """

    memory: Scratch
    count: int

    @classmethod
    def of(cls, workspace: Workspace, tier: Tier, tiles: int) -> Arrivals | None:
        """The counters of a call with this number of column tiles; None in tiers of more than one token."""
        if tier.block != GEMV:
            return None
        count = triton.next_power_of_2(1 + tiles)
        return cls(workspace.take(count, "int32", 4), count)


def clearing(arrivals: Arrivals | None) -> tuple[dict[str, Operand], dict[str, int]]:
    """The operand and the constant with which a kernel calls `clear`."""
    if arrivals is None:
        return {}, {"COUNTERS": 0}
    return {"arrived": arrivals.memory}, {"COUNTERS": arrivals.count}


@triton.jit
def clear(arrived, COUNTERS: tl.constexpr):
    """Set the counters to zero, in one block of an earlier launch."""
    if arrived is not None:  # noqa: SIM102 -- known at compile time, and the next one is not
        if tl.program_id(0) == 0:
            tl.store(arrived + tl.arange(0, COUNTERS), tl.zeros((COUNTERS,), tl.int32))


@triton.jit
def is_last(arrived, blocks):
    """Count this block, and return whether it is the last of ``blocks``. Then it sees what the others have stored.

    All threads of a block have stored before one of them counts it. The atomic addition, of one thread, orders these
    stores before the loads of the last block (release and acquire in the PTX memory model; a barrier is cumulative).
    """
    tl.debug_barrier()
    return tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == blocks - 1
