"""Ahead-of-time compilation: turns an op's schedules into the program of a TensorRT plugin."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shadowllm.bundle.gpu_images import PTX, PTX_SM, check_dependent_launch
from shadowllm.errors import UserError
from shadowllm.plugins.kernel_program import ALIGNED, Argument, Image, Kernel, Launch, Output, Plan, Program, Size
from shadowllm.plugins.registry import SCHEMAS, schedules
from shadowllm.plugins.schema import Attributes, OpSchema
from shadowllm.plugins.triton.block_end import with_block_end
from shadowllm.plugins.triton.schedule import FLOATS_FUSED, Call, Operand, Schedule, Scratch, Shape

# PTX version that drivers of CUDA 12 understand.
PTX_VERSION = 80
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
POINTERS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16", "int32": "*i32"}
WORDS = {"int32": "*u32", "int16": "*u16"}  # packed integers
# Indices and counts may be rows of a larger tensor, so their alignment is unknown.
ALIGNED_POINTERS = ("*fp32", "*fp16", "*bf16", *WORDS.values())
# KiB of dynamic shared memory that a block can have, by compute capability (CUDA C++ Programming Guide, table of
# technical specifications). For a GPU that is missing here, the driver reports the error when a kernel is loaded.
SHARED_KIB = {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}

# Programmatic dependent launch: the first instructions of each kernel, put into the PTX so that none can lack them. A
# launch may start when all blocks of the one in front have waited or ended. It accesses memory only after that one has
# ended and its stores can be seen. So at most two overlap, and all accesses have the order that they have without
# overlap: also a write after reads, counters that an earlier launch clears, and those of TensorRT's kernels. Blocks
# that wait for each other (`block_sync`) all run before a block of the next launch can take their place.
WAIT = "\tgriddepcontrol.wait;\n\tgriddepcontrol.launch_dependents;\n"


@dataclass(frozen=True)
class Tensor:
    """An input of a node: its type, and its shape with symbols for variable dimensions."""

    dtype: str
    shape: tuple[int | str, ...]


def compile_program(
    op: str,
    inputs: Mapping[str, Tensor],
    attributes: Attributes,
    *,
    max_batch: int,
    max_seqlen: int,
    sms: Sequence[int],
    programmatic_dependent_launch: bool = False,
) -> Program:
    """Compile the program of a node; equal arguments return the same object, so the layers of a model share it.

    Args:
        op: name of a schema.
        inputs: the present inputs, by the schema's names; with ``skip``, those of a whole block of a layer
            (`block_end.with_block_end`). uint8 as int32 words; a residual has words at the places of its copy's, see
            `low_bit`. Only batch and seqlen of ``x`` may be symbols, and batch of ``key``, ``value``, ``lengths``,
            ``cos`` and ``sin``.
        attributes: attributes of the node; ``layer`` is not read.
        max_batch, max_seqlen: largest number of sequences in a call, and of tokens in each.
        sms: compute capabilities to compile for; `PTX` is for all others from 8.0 on.
        programmatic_dependent_launch: whether kernels are launched before the launch in front of them has ended, and
            wait for it; PTX does not, because older GPUs could not run it.

    Raises:
        ValueError: the op cannot have these inputs, or ``sms`` is empty.
        UserError: a GPU is too old for ``programmatic_dependent_launch``; or see `compile_kernel`.
    """
    if not sms:
        raise ValueError("there is no GPU to compile for")
    if programmatic_dependent_launch:
        check_dependent_launch(sms)
    schema = schema_of(op, inputs)
    known = tuple((name, value) for name, value in attributes.items() if name != "layer")
    order = [port.name for port in schema.inputs if port.name in inputs]
    if len(order) != len(inputs):
        raise ValueError(f"{op} has inputs {sorted(inputs)}, and knows {[port.name for port in schema.inputs]}")
    ports = tuple((name, inputs[name]) for name in order)
    return _compile(op, ports, known, max_batch, max_seqlen, tuple(sorted(set(sms))), programmatic_dependent_launch)


def schema_of(op: str, inputs: Mapping[str, Tensor]) -> OpSchema:
    """The signature of an op, or that of a whole block of a layer if there is a ``skip``."""
    return with_block_end(SCHEMAS[op]) if "skip" in inputs else SCHEMAS[op]


@lru_cache(maxsize=64)
def _compile(
    op: str,
    inputs: tuple[tuple[str, Tensor], ...],
    attributes: tuple[tuple[str, int | float | str], ...],
    max_batch: int,
    max_seqlen: int,
    sms: tuple[int, ...],
    dependent_launch: bool,
) -> Program:
    tensors = dict(inputs)
    schema = schema_of(op, tensors)
    dtype = next((tensors[p.name].dtype for p in schema.inputs if p.dtype == "T" and p.name in tensors), "float32")
    shapes: dict[str, Shape] = {
        name: tuple(size if isinstance(size, int) else 0 for size in tensor.shape) for name, tensor in inputs
    }
    planned = schedules(op)(
        shapes,
        dict(attributes),
        itemsize=ITEMSIZE[dtype],
        max_batch=max_batch,
        max_seqlen=max_seqlen,
    )
    written = {operand for schedule in planned for call in schedule.calls for operand in call.operands.values()}
    ports = [port for port in schema.outputs if not port.optional or port.name in written]
    builder = _Builder(schema, tensors, dtype, sms, dependent_launch)
    plans = tuple(builder.plan(schedule) for schedule in planned)
    outputs = tuple(
        Output(dtype if port.dtype == "T" else port.dtype, _dimensions(schema, list(tensors), port.shape, attributes))
        for port in ports
    )
    # TensorRT has no 16-bit integers: an engine has such words as int32, two in each.
    types = ("int32" if tensor.dtype in WORDS else tensor.dtype for tensor in tensors.values())
    return Program(tuple(types), outputs, tuple(builder.kernels), plans)


def _dimensions(
    schema: OpSchema, names: list[str], shape: tuple[str, ...], attributes: tuple[tuple[str, int | float | str], ...]
) -> tuple[int | tuple[int, int], ...]:
    """Dimensions of an output; each is a number, an attribute, or a dimension of the first input with its symbol."""
    ports = {port.name: port.shape for port in schema.inputs}
    known: dict[str, int | tuple[int, int]] = {name: value for name, value in attributes if isinstance(value, int)}
    for i, name in enumerate(names):
        for axis, symbol in enumerate(ports[name]):
            known.setdefault(symbol, (i, axis))
    return tuple(int(symbol) if symbol.isdigit() else known[symbol] for symbol in shape)


class _Builder:
    """Collects the kernels of a program; calls that compile to the same kernel share it."""

    def __init__(
        self, schema: OpSchema, inputs: Mapping[str, Tensor], dtype: str, sms: tuple[int, ...], dependent_launch: bool
    ) -> None:
        self.kernels: list[Kernel] = []
        self._dependent_launch = dependent_launch
        self._found: dict[Any, int] = {}
        self._inputs, self._names, self._dtype, self._sms = inputs, list(inputs), dtype, sms
        packed = {port.name for port in schema.inputs if port.dtype in ("uint8", "T")}  # T: or a residual
        self._words = {name: WORDS[t.dtype] for name, t in inputs.items() if name in packed and t.dtype in WORDS}
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
        if operand in self._words:
            return self._words[operand]
        return POINTERS[self._outputs[operand] if operand in self._outputs else self._inputs[operand].dtype]

    def _typed(self, dtype: str) -> str:
        return self._dtype if dtype == "T" else dtype

    def _build(self, call: Call, types: Mapping[str, str]) -> Kernel:
        ones = {name: 1 for name, operand in call.operands.items() if _folded(operand)}
        return compile_kernel(
            call.kernel,
            types,
            {**ones, **call.constants},
            warps=call.warps,
            stages=call.stages,
            sms=self._sms,
            programmatic_dependent_launch=self._dependent_launch,
        )


def _folded(operand: Operand) -> bool:
    """Whether an operand is a size that is always one; as a constant it saves the masks along tokens."""
    return operand == Size()


def compile_kernel(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, int | str | float],
    *,
    warps: int,
    stages: int,
    sms: Sequence[int],
    programmatic_dependent_launch: bool = False,
) -> Kernel:
    """Compile a kernel for several architectures in parallel.

    Args:
        kernel: a ``triton.jit`` function.
        types: Triton's types of the parameters that are passed.
        constants: values of the other parameters; a parameter without a value is None.
        warps, stages: see `Call`.
        sms, programmatic_dependent_launch: see `compile_program`.

    Raises:
        UserError: a block needs more shared memory than an architecture has.
        RuntimeError: Triton made a kernel that a program cannot launch.
    """
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    values = {name: constants.get(name) for name in names if name not in types}
    known = {
        (names.index(name),): [["tt.divisibility", ALIGNED]] for name, kind in types.items() if kind in ALIGNED_POINTERS
    }

    def build(sm: int) -> Any:
        source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=known)
        options: dict[str, Any] = {"num_warps": warps, "num_stages": stages, **FLOATS_FUSED}
        options |= {"ptx_version": PTX_VERSION} if sm == PTX else {"launch_pdl": programmatic_dependent_launch}
        return triton.compile(source, target=GPUTarget("cuda", PTX_SM if sm == PTX else sm, 32), options=options)

    # Triton releases the GIL while it compiles. The settings below apply to all threads.
    knobs = triton.knobs
    scopes = knobs.compilation.scope(), knobs.runtime.scope()
    with scopes[0], scopes[1], warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        knobs.compilation.disable_line_info = True  # it would be half of a cubin
        knobs.runtime.add_stages_inspection_hook = _add_wait
        warnings.simplefilter("ignore")  # deprecations in Triton
        builds = dict(zip(sms, pool.map(build, sms), strict=True))
    for sm, one in builds.items():
        if one.metadata.global_scratch_size or one.metadata.profile_scratch_size:
            raise RuntimeError(f"kernel {one.metadata.name} needs scratch memory of its own")
        _check_shared(one.metadata.name, one.metadata.shared, sm)
    any_build = builds[sms[0]]
    return Kernel(
        any_build.metadata.name,
        32 * warps,
        len(re.findall(r"^\s*\.param ", any_build.asm["ptx"], re.MULTILINE)) - len(types),
        tuple(
            Image(
                sm,
                one.metadata.shared,
                one.asm["ptx"].encode() if sm == PTX else one.asm["cubin"],
                one.metadata.launch_pdl,
            )
            for sm, one in builds.items()
        ),
    )


def _add_wait(*given: Any) -> tuple[str, str] | None:
    """Triton's hook: it is called without arguments for what to add to a kernel's key in the cache, and for its hash.

    Then it is called with the compiler, its stages by name, and the kernel's options.
    """
    if not given:
        return WAIT, WAIT
    _, stages, options, *_ = given
    make_ptx = stages["ptx"]
    if options.launch_pdl:
        stages["ptx"] = lambda source, metadata: _waiting(make_ptx(source, metadata))
    return None


def _waiting(ptx: str) -> str:
    """The kernel with `WAIT` as its first instructions."""
    start = ptx.index("\n{\n", ptx.index(".visible .entry")) + len("\n{\n")
    return ptx[:start] + WAIT + ptx[start:]


def _check_shared(name: str, shared_bytes: int, sm: int) -> None:
    if sm in SHARED_KIB and shared_bytes > 1024 * SHARED_KIB[sm]:
        raise UserError(
            f"kernel {name} needs {-(-shared_bytes // 1024)} KiB of shared memory, and sm_{sm} has {SHARED_KIB[sm]}",
            f"export with --dtype fp16, or leave {sm} out of --sm",
        )
