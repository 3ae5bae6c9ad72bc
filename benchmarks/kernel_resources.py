"""Compiles every GPU kernel at real shapes, and records the GPU resources that it uses; needs no GPU.

    python -m shadowllm.benchmarks.kernel_resources --json kernels.json

For each shape, type and architecture it records registers per thread, shared memory per block, and bytes spilled to
local memory. Spills are too slow for a memory-bound kernel. With ``--machine-code SM`` it also records fused
multiply-adds and barriers inside innermost loops for this architecture, of the kernels of one token. This takes half a
second for each kernel.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from shadowllm.benchmarks.kernel_programs import SHAPES, Shape, cache_writer, nested_nodes, nodes
from shadowllm.benchmarks.script_parser import add_json, script, script_parser
from shadowllm.evaluation.speed.environment import environment
from shadowllm.plugins.kernel_program import Kernel
from shadowllm.progress import progress

SMS = (80, 86, 89, 90, 120)
DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Resources:
    """GPU resources of one compiled kernel.

    Attributes:
        registers: per thread.
        shared_bytes: per block, static and dynamic.
        spilled_bytes: local memory per thread.
        multiply_adds: FFMA instructions in the machine code; None if it was not read.
        loop_barriers: the most barriers in one innermost loop of the machine code; None if it was not read.
    """

    op: str
    kernel: str
    dtype: str
    sm: int
    threads: int
    registers: int
    shared_bytes: int
    spilled_bytes: int
    multiply_adds: int | None
    loop_barriers: int | None


def compiled(shape: Shape, dtype: str, sms: tuple[int, ...]) -> Iterator[tuple[str, Sequence[Kernel], Collection[int]]]:
    """Compile all programs: the op; its kernels; and the places of those for one token."""
    named = [(node.op, node) for node in nodes(shape, dtype)]
    if dtype == "float32":  # a bundle with integer weights has float32 activations
        named += [(f"{node.op} of integers", node) for node in nested_nodes(shape, dtype)]
    for name, node in named:
        program = node.program(sms)
        yield name, program.kernels, {launch.kernel for launch in program.plans[0].launches}
    yield "write_cache", [cache_writer(shape, dtype, sms)], ()


def resources(
    op: str, kernels: Iterable[Kernel], dtype: str, code_of: int | None = None, read: Collection[int] = ()
) -> Iterator[Resources]:
    """Resources of all images of the kernels; the images must be cubins.

    Args:
        code_of: the architecture whose machine code is read; None for none.
        read: places of the kernels whose machine code is read.
    """
    for place, kernel in enumerate(kernels):
        for image in kernel.images:
            used = _usage(image.data)
            code = _machine_code(image.data) if image.sm == code_of and place in read else None
            yield Resources(
                op,
                kernel.name,
                dtype,
                image.sm,
                kernel.threads,
                used["REG"],
                used["SHARED"] + image.shared_bytes,
                used["LOCAL"] + used["STACK"],
                None if code is None else sum(" FFMA" in line for line in code),
                None if code is None else _loop_barriers(code),
            )


def _usage(cubin: bytes) -> dict[str, int]:
    """Resource usage of a cubin."""
    output = _printed("cuobjdump", "--dump-resource-usage", cubin)
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", output)}


def _machine_code(cubin: bytes) -> list[str]:
    """The instructions and labels of a cubin, as lines."""
    return _printed("nvdisasm", "--print-code", cubin).splitlines()


def _loop_barriers(code: Sequence[str]) -> int:
    """The most barriers in one innermost loop: from a label to a branch back to it, with no such branch inside."""
    labels: dict[str, int] = {}
    most, inner = 0, -1  # inner: where the last loop began
    for place, line in enumerate(code):
        if found := re.match(r"(\S+):", line):
            labels[found[1]] = place
        jump = re.search(r"\bBRA\b.*`\((\S+)\)", line)
        start = labels.get(jump[1]) if jump else None
        if start is not None and start > inner:
            most, inner = max(most, sum(" BAR.SYNC" in one for one in code[start:place])), start
    return most


@cache  # programs share kernels
def _printed(tool: str, option: str, cubin: bytes) -> str:
    """What one of NVIDIA's tools prints about a cubin; they are part of Triton."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, option, file.name], check=True, capture_output=True, text=True).stdout


@script
def main() -> None:
    """Command line."""
    parser = script_parser("kernel_resources", __doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--sms", nargs="+", type=int, default=list(SMS), metavar="SM")
    parser.add_argument("--machine-code", type=int, metavar="SM", help="read the machine code for this architecture")
    add_json(parser)
    args = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    with progress("Compiling", len(args.shapes) * len(args.dtypes)) as advance:
        for name in args.shapes:
            found[name] = []
            for dtype in args.dtypes:
                for op, kernels, one_token in compiled(SHAPES[name], dtype, tuple(args.sms)):
                    found[name] += map(asdict, resources(op, kernels, dtype, args.machine_code, one_token))
                advance(1)
    for name, rows in found.items():
        worst = max(rows, key=lambda row: row["registers"])
        spilling = sorted({f"{row['kernel']} (sm_{row['sm']})" for row in rows if row["spilled_bytes"]})
        print(
            f"{name}: {len(rows)} kernels, at most {worst['registers']} registers ({worst['kernel']}); "
            f"spilling: {', '.join(spilling) or 'none'}"
        )
    if args.json:
        args.json.write_text(json.dumps({"environment": environment(), "kernels": found}, indent=1) + "\n")
        print(f"results: {args.json}")


if __name__ == "__main__":
    sys.exit(main())
