"""Ahead-of-time compilation: an op's schedules become the program that a TensorRT plugin carries."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shadowllm.plugins.program import PTX, PTX_SM, Argument, Image, Kernel, Launch, Output, Plan, Program, Size
from shadowllm.plugins.schemas import SCHEMAS, OpSchema
from shadowllm.plugins.triton.ops import schedules
from shadowllm.plugins.triton.schedule import Call, Operand, Schedule, Scratch, Shape

# Of the PTX, so that drivers of CUDA 12 understand it.
PTX_VERSION = 80
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
POINTERS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16", "int32": "*i32"}
# Indices and counts may be rows of a larger tensor: of them nothing is known.
ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Tensor:
    """An input of a node: type, and shape with symbols for what is open."""

    dtype: str
    shape: tuple[int | str, ...]


def compile_program(
    op: str,
    inputs: Mapping[str, Tensor],
    attributes: Mapping[str, int | str],
    *,
    max_batch: int,
    max_seqlen: int,
    sms: Sequence[int],
) -> Program:
    """The program of a node, the same object for the same arguments: the layers of a model share theirs.

    Args:
        op: name of a schema.
        inputs: those that are there, by the schema's names, in its order. Only batch and seqlen of ``x``
            may be symbols, and batch of ``key``, ``value``, ``lengths``, ``cos`` and ``sin``.
        attributes: of the node; ``layer`` is not read.
        max_batch, max_seqlen: most sequences, and tokens of each, in a call.
        sms: compute capabilities to compile for; others are served by PTX, from 8.0 on.

    Raises:
        ValueError: inputs that the op cannot have.
    """
    schema = SCHEMAS[op]
    known = tuple((name, value) for name, value in attributes.items() if name != "layer")
    order = [port.name for port in schema.inputs if port.name in inputs]
    if len(order) != len(inputs):
        raise ValueError(f"{op} has inputs {sorted(inputs)}, and knows {[port.name for port in schema.inputs]}")
    return _compile(
        op, tuple((name, inputs[name]) for name in order), known, max_batch, max_seqlen, tuple(sorted(set(sms)))
    )


@lru_cache(maxsize=64)
def _compile(
    op: str,
    inputs: tuple[tuple[str, Tensor], ...],
    attributes: tuple[tuple[str, int | str], ...],
    max_batch: int,
    max_seqlen: int,
    sms: tuple[int, ...],
) -> Program:
    schema, tensors = SCHEMAS[op], dict(inputs)
    dtype = next((tensors[p.name].dtype for p in schema.inputs if p.dtype == "T" and p.name in tensors), "float32")
    shapes: dict[str, Shape] = {
        name: tuple(size if isinstance(size, int) else 0 for size in tensor.shape) for name, tensor in inputs
    }
    planned = schedules(
        op,
        shapes,
        dict(attributes),
        itemsize=ITEMSIZE[dtype],
        max_batch=shapes["scores"][0] if "scores" in shapes else max_batch,
        max_seqlen=1 if "scores" in shapes else max_seqlen,
    )
    builder = _Builder(schema, tensors, dtype, sms)
    plans = tuple(builder.plan(schedule) for schedule in planned)
    outputs = tuple(
        Output(dtype if port.dtype == "T" else port.dtype, _dimensions(schema, list(tensors), port.shape, attributes))
        for port in schema.outputs
    )
    return Program(tuple(tensor.dtype for tensor in tensors.values()), outputs, tuple(builder.kernels), plans)


def _dimensions(
    schema: OpSchema, names: list[str], shape: tuple[str, ...], attributes: tuple[tuple[str, int | str], ...]
) -> tuple[int | tuple[int, int], ...]:
    """A dimension is an attribute, or that of the first input which has its symbol."""
    ports = {port.name: port.shape for port in schema.inputs}
    known: dict[str, int | tuple[int, int]] = {name: value for name, value in attributes if isinstance(value, int)}
    for i, name in enumerate(names):
        for axis, symbol in enumerate(ports[name]):
            known.setdefault(symbol, (i, axis))
    return tuple(known[symbol] for symbol in shape)


class _Builder:
    """Collects the kernels of a program; calls that compile to the same kernel share it."""

    def __init__(self, schema: OpSchema, inputs: Mapping[str, Tensor], dtype: str, sms: tuple[int, ...]) -> None:
        self.kernels: list[Kernel] = []
        self._found: dict[Any, int] = {}
        self._inputs, self._names, self._dtype, self._sms = inputs, list(inputs), dtype, sms
        self._outputs = {port.name: self._typed(port.dtype) for port in schema.outputs}

    def plan(self, schedule: Schedule) -> Plan:
        launches = tuple(map(self._launch, schedule.calls))
        return Plan(schedule.max_batch, schedule.max_seqlen, schedule.workspace_bytes, launches)

    def _launch(self, call: Call) -> Launch:
        passed = [name for name in call.kernel.arg_names if name in call.operands and not _folded(call.operands[name])]
        arguments = tuple(self._argument(call.operands[name]) for name in passed)
        return Launch(self._kernel(call, passed), call.grid, arguments)

    def _argument(self, operand: Operand) -> Argument:
        if isinstance(operand, Size):
            return Argument("int", 0, operand)
        if isinstance(operand, Scratch):
            return Argument("workspace", operand.offset)
        if operand in self._outputs:
            return Argument("output", list(self._outputs).index(operand))
        return Argument("input", self._names.index(operand))

    def _kernel(self, call: Call, passed: list[str]) -> int:
        types = {name: self._type(call.operands[name]) for name in passed}
        key = (call.kernel.fn, tuple(types.items()), tuple(call.constants.items()), call.warps, call.stages)
        if key not in self._found:
            self._found[key] = len(self.kernels)
            self.kernels.append(self._build(call, types))
        return self._found[key]

    def _type(self, operand: Operand) -> str:
        if isinstance(operand, Size):
            return "i32"
        if isinstance(operand, Scratch):
            return POINTERS[self._typed(operand.dtype)]
        return POINTERS[self._outputs[operand] if operand in self._outputs else self._inputs[operand].dtype]

    def _typed(self, dtype: str) -> str:
        return self._dtype if dtype == "T" else dtype

    def _build(self, call: Call, types: Mapping[str, str]) -> Kernel:
        names = call.kernel.arg_names
        # Parameters that are not passed are constants: the given ones, sizes that are always one, and None.
        fixed = {name: 1 for name, operand in call.operands.items() if _folded(operand)}
        constants = {name: ({**fixed, **call.constants}).get(name) for name in names if name not in types}
        aligned = {(names.index(name),): ALIGNED for name, kind in types.items() if kind not in ("*i32", "i32")}
        signature = {name: types.get(name, "constexpr") for name in names}

        def compiled(sm: int, **options: Any) -> Any:
            return _triton_compile(
                call.kernel, signature, constants, aligned, sm, num_warps=call.warps, num_stages=call.stages, **options
            )

        builds = {sm: compiled(sm) for sm in self._sms}
        builds[PTX] = compiled(PTX_SM, ptx_version=PTX_VERSION)
        if any(b.metadata.global_scratch_size or b.metadata.profile_scratch_size for b in builds.values()):
            raise RuntimeError(f"kernel {call.kernel.fn.__name__} wants scratch memory of its own")
        ptx = builds[PTX].asm["ptx"]
        images = {sm: ptx.encode() if sm == PTX else build.asm["cubin"] for sm, build in builds.items()}
        return Kernel(
            builds[PTX].metadata.name,
            32 * call.warps,
            max(build.metadata.shared for build in builds.values()),
            len(re.findall(r"^\s*\.param ", ptx, re.MULTILINE)) - len(types),
            tuple(Image(sm, data) for sm, data in images.items()),
        )


def _folded(operand: Operand) -> bool:
    """A size that is always one is a constant of the kernel: one token needs no masks along tokens."""
    return operand == Size()


def _triton_compile(kernel: Any, signature: Any, constants: Any, attributes: Any, sm: int, **options: Any) -> Any:
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    with triton.knobs.compilation.scope(), warnings.catch_warnings():
        triton.knobs.compilation.disable_line_info = True  # half of a cubin
        warnings.simplefilter("ignore")  # on what the next version of Triton will do
        return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
