"""Lets the blocks of a launch wait for each other, which saves launches.

Blocks are counted in the workspace, in the order in which they come. A result does not depend on this order: it decides
only which block does a part of the work, or when.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import triton
import triton.language as tl

from shadowllm.plugins.triton.schedule import Operand, Scratch, Workspace


@dataclass(frozen=True)
class Counters:
    """Numbers of blocks. An earlier launch of the op sets them to zero, see `clear`.

    Attributes:
        memory: int32.
        count: how many, a power of two.
    """

    memory: Scratch
    count: int

    @classmethod
    def take(cls, workspace: Workspace, least: int) -> Self:
        """Allocate at least so many counters."""
        count = triton.next_power_of_2(least)
        return cls(workspace.take(count, "int32", 4), count)


def clearing(counters: Counters | None) -> tuple[dict[str, Operand], dict[str, int]]:
    """The operand and the constant with which a kernel calls `clear`."""
    if counters is None:
        return {}, {"COUNTERS": 0}
    return {"counters": counters.memory}, {"COUNTERS": counters.count}


@triton.jit
def clear(counters, COUNTERS: tl.constexpr):
    """Set counters to zero, in one block of an earlier launch."""
    if counters is not None:  # noqa: SIM102 -- known at compile time, and the next one is not
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(counters + tl.arange(0, COUNTERS), tl.zeros((COUNTERS,), tl.int32))


@triton.jit
def is_last(counter, blocks):
    """Count this block, and return whether it is the last of ``blocks``. Then it sees what the others have stored.

    All threads of a block have stored before one of them counts it. The atomic addition, of one thread, orders these
    stores before the loads of the last block (release and acquire in the PTX memory model; a barrier is cumulative).
    """
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == blocks - 1


@triton.jit
def is_first(counter):
    """Count this block, and return whether it is the first. It then works for all, and calls `announce`."""
    return tl.atomic_add(counter, 1, sem="relaxed", scope="gpu") == 0


@triton.jit
def announce(counter):
    """Let the blocks go on that `wait`."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def wait(counter):
    """Wait until a block has called `announce`, and see what it has stored.

    That block is running, because `is_first` chose it when it came. So it finishes, also if others wait in its place.
    """
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") == 0:
        pass
