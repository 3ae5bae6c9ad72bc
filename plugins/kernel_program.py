"""The program of a TensorRT plugin node: precompiled kernels, and how they are launched.

A *program* is the whole state of a plugin. The exporter makes one per node and stores it in the ONNX
node as one binary attribute. The engine stores it too, and the plugin, in Python or in C++, only interprets
it. So an engine needs neither Triton nor a compiler, and both plugins follow the same few rules:

- the program has the types of the inputs, and the types and shapes of the outputs;
- the plugin takes the first plan whose ``max_batch`` and ``max_seqlen`` cover the call, and runs its launches in
  order on one stream; batch and seqlen are the first two dimensions of input 0 (seqlen is 1 if it has only two);
- each kernel has one image per compute capability, and may have PTX for the other GPUs
  (`bundle.gpu_images.serving`);
- tensors of floating-point types begin at multiples of `ALIGNED` bytes, because kernels are compiled for that.

`kernel_program_bytes` converts programs to bytes and back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from shadowllm.bundle.gpu_images import DEPENDENT_LAUNCH_SM

# Name of the ONNX node attribute, and of the plugin field, that holds a program.
PROGRAM = "program"
# TensorRT's numbers for its data types.
DTYPES = {"float32": 0, "float16": 1, "int32": 3, "bfloat16": 7}
INT32, MAX_RANK = 2**31 - 1, 8
# Largest number of blocks along x, y and z of a grid.
GRID = (INT32, 65535, 65535)
ALIGNED = 16


@dataclass(frozen=True)
class Size:
    """A number that may depend on the call: ``ceil(factor * batch * seqlen / divisor)``.

    Attributes:
        batch, seqlen: whether the number is multiplied by that dimension.
    """

    factor: int = 1
    batch: bool = False
    seqlen: bool = False
    divisor: int = 1

    def __call__(self, batch: int, seqlen: int) -> int:
        """The number for a call of this size."""
        product = self.factor * (batch if self.batch else 1) * (seqlen if self.seqlen else 1)
        return -(-product // self.divisor)


def call_size(shape: Sequence[int]) -> tuple[int, int]:
    """Batch and seqlen of a call, from the shape of input 0."""
    return shape[0] if shape else 1, shape[1] if len(shape) > 2 else 1


@dataclass(frozen=True)
class Argument:
    """A kernel parameter.

    Attributes:
        kind: "input" and "output" are pointers to the tensor number ``value``. "workspace" is a pointer to
            byte ``value`` of the plan's workspace. "int" is the int32 ``size``.
        offset: for "input", bytes from the beginning of the tensor, which must be int32: the row of a selection that
            this layer reads. A `Gather` node would be another launch.
    """

    kind: Literal["input", "output", "workspace", "int"]
    value: int = 0
    size: Size = Size()
    offset: int = 0


@dataclass(frozen=True)
class Image:
    """A kernel compiled for one GPU architecture.

    Attributes:
        sm: compute capability, e.g. 89 for 8.9; `PTX` (0) for PTX text, which the driver compiles.
        shared_bytes: dynamic shared memory per block.
        data: a cubin, or PTX without a terminating zero.
        waits: whether the kernel waits for the launch in front of it before it accesses memory, so that it may be
            launched before that one has ended (programmatic dependent launch, from sm_90 on).
    """

    sm: int
    shared_bytes: int
    data: bytes
    waits: bool = False


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel.

    Attributes:
        name: symbol, the same in all images.
        threads: threads per block, along x.
        hidden: number of pointers that the compiler added after the arguments; null is passed for them.
        images: one per architecture.
    """

    name: str
    threads: int
    hidden: int
    images: tuple[Image, ...]


@dataclass(frozen=True)
class Launch:
    """One launch: number of the kernel, grid of blocks, and arguments in order."""

    kernel: int
    grid: tuple[Size, Size, Size]
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class Plan:
    """The launches for every call up to a batch and a seqlen.

    Attributes:
        workspace_bytes: scratch memory on the device, aligned to 256.
    """

    max_batch: int
    max_seqlen: int
    workspace_bytes: int
    launches: tuple[Launch, ...]


@dataclass(frozen=True)
class Output:
    """Type and shape of an output; a dimension is a number, or the ``(input, axis)`` of an equal dimension."""

    dtype: str
    shape: tuple[int | tuple[int, int], ...]


@dataclass(frozen=True)
class Program:
    """Everything that a plugin node needs.

    Attributes:
        inputs: type of each input, a key of `DTYPES`.
        plans: in ascending order of the calls they cover.
    """

    inputs: tuple[str, ...]
    outputs: tuple[Output, ...]
    kernels: tuple[Kernel, ...]
    plans: tuple[Plan, ...]

    def __post_init__(self) -> None:
        """Check numbers and references once, so that no interpreter has to check them in a call.

        Raises:
            ValueError: a number or reference is out of range.
        """
        _within("inputs", len(self.inputs), 1)
        _within("plans", len(self.plans), 1)
        for output in self.outputs:
            _within("dimensions", len(output.shape), 0, MAX_RANK)
            for dim in output.shape:
                size, axis = (dim, 0) if isinstance(dim, int) else dim
                _within("dimension", size, 0, INT32 if isinstance(dim, int) else len(self.inputs) - 1)
                _within("axis", axis, 0, MAX_RANK - 1)
        for kernel in self.kernels:
            _within("threads", kernel.threads, 1, 1024)
            _within("hidden", kernel.hidden, 0, 64)
            if re.fullmatch("[!-~]+", kernel.name) is None:
                raise ValueError(f"kernel name {kernel.name!r}")
            for image in kernel.images:
                _within("capability", image.sm, 0, 10_000)
                _within("shared_bytes", image.shared_bytes, 0)
                _within("waits", image.waits, 0, int(image.sm >= DEPENDENT_LAUNCH_SM))
        for plan in self.plans:
            self._check_plan(plan)

    def _check_plan(self, plan: Plan) -> None:
        for number in (plan.max_batch, plan.max_seqlen):
            _within("largest call", number, 1)
        _within("workspace_bytes", plan.workspace_bytes, 0, 2**62)
        limits = {"input": len(self.inputs) - 1, "output": len(self.outputs) - 1, "int": 0}
        for launch in plan.launches:
            _within("kernel", launch.kernel, 0, len(self.kernels) - 1)
            for size, least in (*((size, 1) for size in launch.grid), *((a.size, 0) for a in launch.arguments)):
                _within("factor", size.factor, least)
                _within("divisor", size.divisor, 1)
                # Sizes grow with the call: if the largest one fits into an int32, all do.
                _within("size", size(plan.max_batch, plan.max_seqlen) * size.divisor, 0)
            for size, most in zip(launch.grid, GRID, strict=True):
                _within("grid", size(plan.max_batch, plan.max_seqlen), 1, most)
            for argument in launch.arguments:
                _within(argument.kind, argument.value, 0, limits.get(argument.kind, plan.workspace_bytes))
                movable = argument.kind == "input" and self.inputs[argument.value] == "int32"
                _within("offset", argument.offset, 0, INT32 if movable else 0)

    def plan(self, batch: int, seqlen: int) -> Plan:
        """The plan for a call.

        Raises:
            ValueError: no plan covers the call.
        """
        for plan in self.plans:
            if batch <= plan.max_batch and seqlen <= plan.max_seqlen:
                return plan
        raise ValueError(f"no plan serves batch {batch}, seqlen {seqlen}")

    def with_offsets(self, offsets: Mapping[int, int]) -> Program:
        """The program that reads some inputs from a later byte on.

        Args:
            offsets: bytes by the number of an input, whose type is int32.
        """

        def moved(argument: Argument) -> Argument:
            if argument.kind != "input" or argument.value not in offsets:
                return argument
            return replace(argument, offset=offsets[argument.value])

        return replace(
            self,
            plans=tuple(
                replace(
                    plan,
                    launches=tuple(
                        replace(launch, arguments=tuple(map(moved, launch.arguments))) for launch in plan.launches
                    ),
                )
                for plan in self.plans
            ),
        )

    @property
    def workspace_bytes(self) -> int:
        """Scratch memory that is enough for every plan."""
        return max(plan.workspace_bytes for plan in self.plans)


def _within(what: str, number: int, low: int, high: int = INT32) -> None:
    if not low <= number <= high:
        raise ValueError(f"{what} is {number}, and should be {low}..{high}")
