"""Converts programs to bytes and back; ``tensorrt/cpp/kernel_program.cpp`` reads the same format.

A program is a sequence of little-endian int64 numbers and byte strings (length as int64, then the bytes), in the
order in which `pack` writes them. One zero byte may follow, because TensorRT's ONNX parser ends an attribute with it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from mmap import mmap
from typing import TypeVar

from shadowllm.plugins.kernel_program import DTYPES, Argument, Image, Kernel, Launch, Output, Plan, Program, Size

MAGIC = b"shadowllm program 4"
# Kinds of arguments are written as their index in this tuple.
KINDS = ("input", "output", "workspace", "int")

T = TypeVar("T")


def pack(program: Program) -> bytes:
    """Serialise a program; `unpack` reads it back."""
    out = _Writer()
    out.blob(MAGIC)
    out.many(program.inputs, lambda dtype: out.number(DTYPES[dtype]))
    out.many(program.outputs, out.output)
    out.many(program.kernels, out.kernel)
    out.many(program.plans, out.plan)
    return bytes(out.data)


def unpack(data: bytes) -> Program:
    """Read a program.

    Raises:
        ValueError: the bytes are not a program, or one of another version.
    """
    program, end = read(data)
    if data[end:] not in (b"", b"\0"):
        raise ValueError("the program is longer than it should be")
    return program


def read(data: bytes | mmap, place: int = 0) -> tuple[Program, int]:
    """The program that starts at byte ``place``, and the position of its end.

    Raises:
        ValueError: see `unpack`.
    """
    source = _Reader(data, place)
    try:
        if source.blob() != MAGIC:
            raise ValueError("not a program of this version: build the engine again")
        program = Program(
            source.many(source.dtype),
            source.many(source.output),
            source.many(source.kernel),
            source.many(source.plan),
        )
    except (struct.error, IndexError, KeyError, OverflowError) as error:
        raise ValueError("the program is damaged") from error
    return program, source.place


class _Writer:
    def __init__(self) -> None:
        self.data = bytearray()

    def number(self, *values: int) -> None:
        self.data += struct.pack(f"<{len(values)}q", *values)

    def blob(self, value: bytes) -> None:
        self.number(len(value))
        self.data += value

    def many(self, values: Sequence[T], write: Callable[[T], None]) -> None:
        self.number(len(values))
        for value in values:
            write(value)

    def size(self, size: Size) -> None:
        self.number(size.factor, size.batch, size.seqlen, size.divisor)

    def output(self, output: Output) -> None:
        self.number(DTYPES[output.dtype])
        # A constant dimension is written as axis -1.
        self.many(output.shape, lambda dim: self.number(*((dim, -1) if isinstance(dim, int) else dim)))

    def kernel(self, kernel: Kernel) -> None:
        self.blob(kernel.name.encode())
        self.number(kernel.threads, kernel.hidden)
        self.many(kernel.images, self.image)

    def image(self, image: Image) -> None:
        self.number(image.sm, image.shared_bytes, image.waits)
        self.blob(image.data)

    def plan(self, plan: Plan) -> None:
        self.number(plan.max_batch, plan.max_seqlen, plan.workspace_bytes)
        self.many(plan.launches, self.launch)

    def launch(self, launch: Launch) -> None:
        self.number(launch.kernel)
        for size in launch.grid:
            self.size(size)
        self.many(launch.arguments, self.argument)

    def argument(self, argument: Argument) -> None:
        self.number(KINDS.index(argument.kind), argument.value)
        self.size(argument.size)
        self.number(argument.offset)


class _Reader:
    def __init__(self, data: bytes | mmap, place: int) -> None:
        self.data, self.place = data, place

    def number(self) -> int:
        (value,) = struct.unpack_from("<q", self.data, self.place)
        self.place += 8
        return value

    def blob(self) -> bytes:
        start, size = self.place + 8, self.number()
        if not 0 <= size <= len(self.data) - start:
            raise IndexError
        self.place = start + size
        return self.data[start : self.place]

    def many(self, read: Callable[[], T]) -> tuple[T, ...]:
        count = self.number()
        if not 0 <= count <= len(self.data):
            raise IndexError
        return tuple(read() for _ in range(count))

    def dtype(self) -> str:
        return {number: name for name, number in DTYPES.items()}[self.number()]

    def size(self) -> Size:
        return Size(self.number(), bool(self.number()), bool(self.number()), self.number())

    def output(self) -> Output:
        return Output(self.dtype(), self.many(self.dimension))

    def dimension(self) -> int | tuple[int, int]:
        first, axis = self.number(), self.number()
        return first if axis < 0 else (first, axis)

    def kernel(self) -> Kernel:
        return Kernel(self.blob().decode(), self.number(), self.number(), self.many(self.image))

    def image(self) -> Image:
        sm, shared_bytes, waits = self.number(), self.number(), {0: False, 1: True}[self.number()]
        return Image(sm, shared_bytes, self.blob(), waits)

    def plan(self) -> Plan:
        return Plan(self.number(), self.number(), self.number(), self.many(self.launch))

    def launch(self) -> Launch:
        return Launch(self.number(), (self.size(), self.size(), self.size()), self.many(self.argument))

    def argument(self) -> Argument:
        kind = dict(enumerate(KINDS))[self.number()]  # a tuple would accept negative numbers
        return Argument(kind, self.number(), self.size(), self.number())  # type: ignore[arg-type]
