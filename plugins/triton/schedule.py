"""Describes the launches of an op's kernels, and runs them with PyTorch.

Nothing here reads a tensor's contents. Counts stay on the device, so one launch configuration, and one
CUDA graph, serve every budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from shadowllm.plugins.kernel_program import Size
from shadowllm.plugins.schema import Attributes

ALIGNMENT = 256
GEMV, DOT, PREFILL = 1, 16, 64  # tokens in a tile
# A product and the sum after it become one instruction. Later versions of Triton do not do this by default.
FLOATS_FUSED = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Scratch:
    """A part of the workspace: its first byte and the type of its elements ("float32", ... or "T")."""

    offset: int
    dtype: str


Shape = tuple[int, ...]
# The value of a kernel parameter: an input or output of the op by name, scratch memory, or an int32.
Operand = str | Scratch | Size


@dataclass(frozen=True)
class Call:
    """One launch of a kernel.

    Attributes:
        kernel: a ``triton.jit`` function.
        grid: blocks along x, y, z.
        operands: values by parameter; a parameter without a value is None in the kernel.
        constants: values of the ``constexpr`` parameters.
        warps: number of warps (of 32 threads) per block.
        stages: number of loads in flight in a loop around ``tl.dot``.
    """

    kernel: Any
    grid: tuple[Size, Size, Size]
    operands: Mapping[str, Operand]
    constants: Mapping[str, int | str | float]
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Schedule:
    """The calls that serve every batch and seqlen up to the given limits."""

    max_batch: int
    max_seqlen: int
    workspace_bytes: int
    calls: tuple[Call, ...]


class Planner(Protocol):
    """The type of the function ``schedules`` in an op's ``schedule.py``, which plans its launches."""

    def __call__(
        self,
        shapes: Mapping[str, Shape],
        attributes: Attributes,
        *,
        itemsize: int,
        max_batch: int,
        max_seqlen: int,
    ) -> list[Schedule]:
        """The schedules of an op, in ascending order of the calls they cover.

        Args:
            shapes: shapes of the present inputs, by the schema's names; batch and seqlen in them are not read.
            attributes: attributes of the node.
            itemsize: bytes per element of type T.
            max_batch: largest number of sequences in a call.
            max_seqlen: largest number of tokens of a sequence in a call.
        """

    def __hash__(self) -> int:
        """A planner must be hashable, because schedules are cached by planner."""


class Workspace:
    """Allocates the scratch memory of a schedule."""

    def __init__(self) -> None:
        self.bytes = 0

    def take(self, elements: int, dtype: str, itemsize: int) -> Scratch:
        """Allocate memory for a number of elements, aligned to 256 bytes."""
        found = Scratch(self.bytes, dtype)
        self.bytes += math.ceil(elements * itemsize / ALIGNMENT) * ALIGNMENT
        return found


@dataclass(frozen=True)
class Tier:
    """A range of calls with one tile size.

    Attributes:
        max_batch, max_seqlen: the largest call that it covers.
        block: tokens in a tile; `GEMV` multiplies row by row, larger tiles use ``tl.dot``.
    """

    max_batch: int
    max_seqlen: int
    block: int

    @property
    def tokens(self) -> int:
        """Largest number of tokens in a call."""
        return self.max_batch * self.max_seqlen

    @property
    def size(self) -> Size:
        """Number of tokens in a call."""
        return Size(batch=self.max_batch > 1, seqlen=self.max_seqlen > 1)

    @property
    def tiles(self) -> Size:
        """Number of token tiles in a call."""
        return replace(self.size, divisor=self.block)


def tiers(max_batch: int, max_seqlen: int) -> list[Tier]:
    """The ranges that cover every call: one token, a batch of single tokens, and prompts."""
    found = [Tier(1, 1, GEMV)]
    if max_batch > 1:
        found.append(Tier(max_batch, 1, DOT if max_batch <= DOT else PREFILL))
    if max_seqlen > 1:
        found.append(Tier(max_batch, max_seqlen, PREFILL))
    return found


def cover(schedules: Sequence[Schedule], batch: int, seqlen: int) -> Schedule:
    """The first schedule that serves a call."""
    return next(s for s in schedules if batch <= s.max_batch and seqlen <= s.max_seqlen)


def run(schedule: Schedule, tensors: Mapping[str, torch.Tensor | None], batch: int, seqlen: int) -> None:
    """Launch the calls of a schedule on the current stream.

    Args:
        tensors: inputs and outputs by name; contiguous, on one device.
    """
    some = next(tensor for tensor in tensors.values() if tensor is not None)
    workspace = torch.empty(schedule.workspace_bytes, dtype=torch.uint8, device=some.device)
    typed = next(t.dtype for t in tensors.values() if t is not None and t.is_floating_point())

    def value(operand: Operand | None) -> torch.Tensor | int | None:
        if isinstance(operand, Size):
            return operand(batch, seqlen)
        if isinstance(operand, Scratch):
            return workspace[operand.offset :].view(typed if operand.dtype == "T" else getattr(torch, operand.dtype))
        return None if operand is None else tensors[operand]

    for call in schedule.calls:
        grid = tuple(size(batch, seqlen) for size in call.grid)
        given = {name: value(call.operands.get(name)) for name in call.kernel.arg_names if name not in call.constants}
        call.kernel[grid](**given, **call.constants, num_warps=call.warps, num_stages=call.stages, **FLOATS_FUSED)
