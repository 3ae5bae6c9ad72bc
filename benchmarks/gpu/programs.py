r"""Runs programs through both launchers, without TensorRT: the kernels, arguments and graphs that an engine would have.

    python -m shadowllm.benchmarks.gpu.programs programs/ --shapes opt-1.3b --sms 80 90     # on any machine
    python -m shadowllm.benchmarks.gpu --only programs --programs programs/ \
        --launcher-library build/plugin/libshadowllm_programs.so                             # on one with a GPU

The results are compared with those of Triton's own launches. `make plugin` builds the library of the C++ launcher.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shadowllm.benchmarks.gpu.timing import milliseconds
from shadowllm.benchmarks.kernel_programs import SHAPES, Node, nested_nodes, nodes
from shadowllm.benchmarks.script_parser import script, script_parser
from shadowllm.bundle.gpu_images import DEPENDENT_LAUNCH_SM, with_fallback
from shadowllm.errors import UserError
from shadowllm.plugins.kernel_program import Program
from shadowllm.plugins.kernel_program_bytes import pack, unpack
from shadowllm.plugins.registry import schedules
from shadowllm.plugins.schema import copy_of
from shadowllm.plugins.triton.compile import Tensor as Port
from shadowllm.plugins.triton.compile import schema_of
from shadowllm.plugins.triton.launch import launch
from shadowllm.runtime.gpu.cuda_graph import captured

INDEX = "index.json"
# Runs a program: its bytes, the shape of input 0, addresses of inputs, outputs and scratch memory, and the stream.
Runner = Callable[[bytes, Sequence[int], Sequence[int], Sequence[int], int, int], None]
LENGTH = 33  # tokens in the cache
BATCH, PROMPT = 3, 7  # sequences in a batch, and tokens in a prompt
CALLS = 20  # in the CUDA graph that is timed


def write(folder: Path, shapes: Sequence[str], dtype: str, sms: Sequence[int]) -> None:
    """Compile the programs of models and write them, with what is needed to call them.

    Those of nested integers are float32, the type of activations beside integer weights. Each program is written once
    more with programmatic dependent launch, for the GPUs that have it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index = []
    variants = [("", False, sms), ("-dependent", True, [sm for sm in sms if sm >= DEPENDENT_LAUNCH_SM])]
    for shape in shapes:
        known = SHAPES[shape]
        for number, node in enumerate([*nodes(known, dtype), *nested_nodes(known, "float32")]):
            for suffix, dependent, targets in variants:
                if targets:
                    name = f"{shape}-{number}-{node.op}{suffix}.program"
                    (folder / name).write_bytes(pack(node.program(with_fallback(targets), dependent)))
                    index.append({"file": name, **asdict(node)})
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def read(folder: Path) -> list[tuple[str, Node, bytes]]:
    """The programs of a folder: name, node and bytes of each.

    Raises:
        UserError: the folder has no programs.
    """
    try:
        entries = json.loads((folder / INDEX).read_text())
    except OSError as error:
        remedy = f"write them: python -m shadowllm.benchmarks.gpu.programs {folder}"
        raise UserError(f"{folder} has no programs", remedy) from error
    found = []
    for entry in entries:
        inputs = {name: Port(one["dtype"], tuple(one["shape"])) for name, one in entry["inputs"].items()}
        node = Node(entry["op"], inputs, entry["attributes"], entry["max_seqlen"], entry["max_batch"])
        found.append((entry["file"], node, (folder / entry["file"]).read_bytes()))
    return found


def sizes(node: Node) -> list[tuple[int, int]]:
    """Batch and seqlen of the calls: one token, and a batch and a prompt if the node serves them."""
    dimensions = {size for port in node.inputs.values() for size in port.shape}
    found = [(1, 1)]
    if node.max_batch > 1:
        found.append((min(node.max_batch, BATCH), 1))
    if node.max_seqlen > 1 and "seqlen" in dimensions:
        found.append((1, PROMPT))
    return found


def make_inputs(node: Node, device: torch.device, batch: int = 1, seqlen: int = 1) -> dict[str, Tensor]:
    """Random inputs of a call of this size, by name; half of the units are active."""
    generator = torch.Generator().manual_seed(0)
    numbers = {"lengths": LENGTH, "rest": 1, "shortlist": 7, "certify": 0}
    symbols = {"batch": batch, "rows": batch, "seqlen": seqlen}
    found = {}
    for name, port in node.inputs.items():
        shape = tuple(symbols[size] if isinstance(size, str) else size for size in port.shape)
        if "int" not in port.dtype:
            scale = shape[-1] ** -0.5 if len(shape) > 1 else 1.0
            values = (torch.randn(shape, generator=generator) * scale).to(getattr(torch, port.dtype))
            positive = name in ("scales", "errors", "down_norms") or name.startswith("cs_")
            found[name] = values.abs() if positive else values
        elif name == "indices":
            active = torch.arange(0, shape[0], 2)
            found[name] = torch.nn.functional.pad(active, (0, shape[0] - len(active)), value=-1).int()
        elif name in ("count", "counts"):
            found[name] = torch.full(shape, _units(node) // 2, dtype=torch.int32)
        elif name == "ids":
            found[name] = torch.arange(shape[0], dtype=torch.int32)
        elif len(shape) > 1:  # words of a low-bit copy, or of a residual
            dtype = getattr(torch, port.dtype)
            limits = torch.iinfo(dtype)
            found[name] = torch.randint(limits.min, limits.max + 1, shape, generator=generator).to(dtype)
        else:
            found[name] = torch.full(shape, numbers[name], dtype=torch.int32)
    return {name: tensor.to(device) for name, tensor in found.items()}


def _units(node: Node) -> int:
    """How many units the node selects from; half of an odd number is rounded down, and an active unit has an index."""
    named = {"SelectTopK": "scores", "ScoreNeurons": "down_norms", "SparseMLP": "w_up"}
    if node.op in named:
        shape = node.inputs[named[node.op]].shape
        return int(shape[-1 if node.op == "SelectTopK" else 0])
    return int(node.attributes["n_heads"])


def make_outputs(program: Program, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Memory for the outputs, filled with numbers that no result has."""
    given = list(inputs.values())
    return [
        torch.full(
            [size if isinstance(size, int) else given[size[0]].shape[size[1]] for size in output.shape],
            -7,
            dtype=getattr(torch, output.dtype),
            device=given[0].device,
        )
        for output in program.outputs
    ]


def expected(node: Node, program: Program, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """The outputs that Triton's own launches of the same schedule write."""
    schema, outputs = schema_of(node.op, node.inputs), make_outputs(program, inputs)
    packed = {port.name for port in schema.inputs if port.dtype == "uint8"}
    tensors = {}
    for name, tensor in inputs.items():
        if copy_of(name) in inputs and not tensor.is_floating_point():
            tensors[name] = tensor.view(torch.uint8).flatten(1)  # a residual
        else:
            tensors[name] = tensor.view(torch.uint8) if name in packed else tensor
    launch(schema, schedules(node.op), tensors, node.attributes, *outputs)
    return outputs


def python_runner() -> Runner:
    """The launcher of the Python plugins."""
    from shadowllm.plugins.tensorrt.launcher import Launcher

    made: dict[bytes, Launcher] = {}

    def run(
        packed: bytes, shape: Sequence[int], inputs: Sequence[int], outputs: Sequence[int], workspace: int, stream: int
    ) -> None:
        if packed not in made:
            made[packed] = Launcher(unpack(packed))
        made[packed].run(shape, inputs, outputs, workspace, stream)

    return run


def library_runner(path: Path) -> Runner:
    """The launcher of the C++ plugins, from its library.

    Raises:
        UserError: the library cannot be loaded.
    """
    try:
        function = ctypes.CDLL(str(path.resolve())).shadowllm_run_program
    except (OSError, AttributeError) as error:
        raise UserError(f"{path} is no library of the C++ launcher ({error})", "build it with `make plugin`") from error

    def run(
        packed: bytes, shape: Sequence[int], inputs: Sequence[int], outputs: Sequence[int], workspace: int, stream: int
    ) -> None:
        words = ctypes.create_string_buffer(500)
        read, written = ((ctypes.c_void_p * len(some))(*some) for some in (inputs, outputs))
        failed = function(
            packed,
            ctypes.c_int64(len(packed)),
            (ctypes.c_int64 * len(shape))(*shape),
            ctypes.c_int(len(shape)),
            read,
            written,
            ctypes.c_void_p(workspace),
            ctypes.c_void_p(stream),
            words,
            ctypes.c_int64(len(words)),
        )
        if failed:
            raise RuntimeError(words.value.decode())

    return run


def call(runner: Runner, node: Node, packed: bytes, inputs: Mapping[str, Tensor], stream: Callable[[], int]) -> Any:
    """Prepare a call, and return a function that makes it and the outputs that it writes.

    Args:
        stream: returns the stream at the time of the call.
    """
    program = unpack(packed)
    outputs = make_outputs(program, inputs)
    given = list(inputs.values())
    workspace = torch.empty(program.workspace_bytes + 256, dtype=torch.uint8, device=given[0].device)
    start = -(-workspace.data_ptr() // 256) * 256

    def work() -> None:
        read, written = ([tensor.data_ptr() for tensor in some] for some in (given, outputs))
        runner(packed, tuple(given[0].shape), read, written, start, stream())
        assert workspace is not None  # it lives as long as the calls

    return work, outputs


def check_programs(device: torch.device, folder: Path, library: Path | None) -> dict[str, Any]:
    """Run every program plainly and as a CUDA graph, with each launcher, over one token, a batch and a prompt.

    Programs with programmatic dependent launch ("-dependent" in the name) follow the same ones without it.

    Returns:
        JSON types: for each program, launcher and size the largest difference from Triton's own launches, divided by
        the largest result, plainly and captured, and the milliseconds of a call in a graph of `CALLS` calls; ``passed``
        if all differences are at most four roundings of the type.
    """
    runners = {"python": python_runner()} | ({} if library is None else {"c++": library_runner(library)})
    found: dict[str, Any] = {}
    passed = True
    calls = [(*program, *size) for program in read(folder) for size in sizes(program[1])]
    for name, node, packed, batch, seqlen in calls:
        inputs = make_inputs(node, device, batch, seqlen)
        wanted = expected(node, unpack(packed), inputs)
        for launcher, runner in runners.items():
            work, outputs = call(runner, node, packed, inputs, lambda: torch.cuda.current_stream(device).cuda_stream)
            errors = {}
            for how, run in (("plain", work), ("captured", captured(work, device))):
                for output in outputs:
                    output.fill_(-7)
                run()
                torch.cuda.synchronize(device)
                errors[how] = max(difference(one, other) for one, other in zip(outputs, wanted, strict=True))
            passed &= all(error <= 4 * torch.finfo(inputs_type(inputs)).eps for error in errors.values())
            taken = milliseconds(repeated(work), device) or {}
            each = {name: value / CALLS for name, value in taken.items()}
            found[f"{name} {launcher} {batch}x{seqlen}"] = {**errors, "milliseconds": each}
    return {"passed": passed, "launchers": list(runners), "programs": found}


def repeated(work: Callable[[], Any]) -> Callable[[], None]:
    """A function that makes a call `CALLS` times, as the layers of a model follow each other."""

    def calls() -> None:
        for _ in range(CALLS):
            work()

    return calls


def inputs_type(inputs: Mapping[str, Tensor]) -> torch.dtype:
    """The floating-point type of the first input that has one."""
    return next(tensor.dtype for tensor in inputs.values() if tensor.is_floating_point())


def difference(found: Tensor, wanted: Tensor) -> float:
    """Largest difference divided by the largest wanted value; for integers, how many differ. NaN counts as infinite."""
    if not found.is_floating_point():
        return float((found != wanted).sum())
    error = float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max().clamp(min=1e-30))
    return error if error == error else float("inf")


@script
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = script_parser("gpu.programs", __doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["opt-1.3b"])
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--sms", nargs="+", type=int, default=[80, 86, 89, 90], metavar="SM")
    args = parser.parse_args(arguments)
    write(args.folder, args.shapes, args.dtype, args.sms)


if __name__ == "__main__":
    sys.exit(main())
