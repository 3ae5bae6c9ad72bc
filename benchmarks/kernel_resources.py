"""Compiles every GPU kernel at real shapes, and records the GPU resources that it uses; needs no GPU.

    python -m shadowllm.benchmarks.kernel_resources --json kernels.json

For each shape, type and architecture it records registers per thread, shared memory per block, and bytes spilled to
local memory. Spills are too slow for a memory-bound kernel. With ``--machine-code SM`` it also records fused
multiply-adds and barriers inside innermost loops for this architecture. This takes half a second for each kernel.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shadowllm.benchmarks.script_parser import script, script_parser
from shadowllm.bundle.quantisation import LOW_BIT_COPY
from shadowllm.evaluation.speed.environment import environment
from shadowllm.plugins.kernel_program import Kernel, Program
from shadowllm.plugins.triton import cache
from shadowllm.plugins.triton.compile import POINTERS, Tensor, compile_kernel, compile_program
from shadowllm.progress import progress

SMS = (80, 86, 89, 90, 120)
DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder whose kernels are compiled."""

    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    gated: bool
    capacity: int = 1024
    vocab_size: int = 32000


SHAPES = {
    "smollm2-135m": Shape(576, 1536, 30, 9, 3, 64, gated=True, vocab_size=49152),
    "opt-6.7b": Shape(4096, 16384, 32, 32, 32, 128, gated=False, vocab_size=50272),
    "llama-2-7b": Shape(4096, 11008, 32, 32, 32, 128, gated=True),
}


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


def programs(shape: Shape, dtype: str, sms: tuple[int, ...]) -> Iterator[tuple[str, Program]]:
    """The programs of a model of this shape, for one sequence of one token or a prompt."""
    width, neurons, heads, dim = shape.hidden_size, shape.intermediate_size, shape.n_heads, shape.head_dim
    count = Tensor("int32", ())
    x = Tensor(dtype, ("batch", "seqlen", width))
    rows = Tensor(dtype, (neurons, width))
    mlp = {"x": x, "indices": Tensor("int32", (neurons,)), "count": count, "w_up": rows, "w_down": rows}
    cache = Tensor(dtype, ("batch", shape.n_kv_heads, shape.capacity, dim))
    attention = {
        "x": x,
        "key": cache,
        "value": cache,
        "lengths": Tensor("int32", ("batch",)),
        "indices": Tensor("int32", (heads,)),
        "count": count,
        "w_q": Tensor(dtype, (heads * dim, width)),
        "w_o": Tensor(dtype, (heads * dim, width)),
    }
    if shape.gated:
        mlp["w_gate"] = rows
        attention |= {name: Tensor(dtype, ("batch", "seqlen", dim // 2)) for name in ("cos", "sin")}
    else:
        mlp |= {"b_up": Tensor(dtype, (neurons,)), "b_down": Tensor(dtype, (width,))}
        attention |= {"b_q": Tensor(dtype, (heads * dim,)), "b_o": Tensor(dtype, (width,))}
    scores = {
        "scores": Tensor("float32", (shape.n_layers - 1, neurons)),
        "counts": Tensor("int32", (shape.n_layers - 1,)),
    }
    matrices = 2 if shape.gated else 1
    words = LOW_BIT_COPY.block * LOW_BIT_COPY.bits // 32
    scored = {
        "x": x,
        "copy": Tensor("int32", (matrices * neurons, LOW_BIT_COPY.blocks(width), words)),
        "scales": Tensor("float32", (matrices * neurons, LOW_BIT_COPY.blocks(width))),
        "down_norms": Tensor("float32", (neurons,)),
        "count": count,
    }
    activation = "silu" if shape.gated else "relu"
    groups = shape.n_kv_heads
    mixed_mlp = _with_rest(mlp, "gate", "up", "down") | {"down_norms": Tensor("float32", (neurons,))}
    mixed_attention = _with_rest(attention, "q", "o")
    mixed_attention |= {"score_weight": Tensor("float32", (groups, width)), "score_bias": Tensor("float32", (groups,))}
    wanted: list[tuple[str, Mapping[str, Tensor], Mapping[str, int | str]]] = [
        ("SelectTopK", scores, {"cap": neurons}),
        ("ScoreNeurons", scored, {"activation": activation}),
        ("SparseMLP", mlp, {"activation": activation}),
        ("SparseMLP", mixed_mlp, {"activation": activation}),
        ("SparseAttention", attention, {"n_heads": heads}),
        ("SparseAttention", mixed_attention, {"n_heads": heads}),
        ("ShortlistLogits", _table(shape, dtype), {}),
    ]
    for op, inputs, attributes in wanted:
        yield op, compile_program(op, inputs, attributes, max_batch=1, max_seqlen=512, sms=sms)


def _table(shape: Shape, dtype: str) -> dict[str, Tensor]:
    """Inputs of the logits of one token."""
    words = LOW_BIT_COPY.block * LOW_BIT_COPY.bits // 32
    return {
        "x": Tensor(dtype, ("batch", shape.hidden_size)),
        "table": Tensor(dtype, (shape.vocab_size, shape.hidden_size)),
        "copy": Tensor("int32", (shape.vocab_size, LOW_BIT_COPY.blocks(shape.hidden_size), words)),
        "scales": Tensor("float32", (shape.vocab_size, LOW_BIT_COPY.blocks(shape.hidden_size))),
        "errors": Tensor("float32", (shape.vocab_size,)),
        "shortlist": Tensor("int32", ()),
        "certify": Tensor("int32", ()),
        "weighting": Tensor("float32", (shape.hidden_size,)),
    }


def _with_rest(inputs: Mapping[str, Tensor], *parts: str) -> dict[str, Tensor]:
    """Inputs of a sparse op that adds a rest from a low-bit copy, and chooses the active units itself."""
    found = {name: port for name, port in inputs.items() if name != "indices"} | {"rest": Tensor("int32", ())}
    for part in parts:
        if f"w_{part}" in inputs:
            rows, width = (int(size) for size in inputs[f"w_{part}"].shape)
            size = (rows, LOW_BIT_COPY.blocks(width))
            found[f"c_{part}"] = Tensor("int32", (*size, LOW_BIT_COPY.block * LOW_BIT_COPY.bits // 32))
            found[f"cs_{part}"] = Tensor("float32", size)
    return found


def cache_writer(shape: Shape, dtype: str, sms: tuple[int, ...]) -> Kernel:
    """The kernel that writes keys and values into PyTorch's KV cache; no program contains it."""
    rows = ("projected", "query", "keys", "values", "cos", "sin")
    sizes = ("seqlen", "capacity", "n_query", "n_kv")
    types = dict.fromkeys(rows, POINTERS[dtype]) | {"positions": "*i64"} | dict.fromkeys(sizes, "i32")
    passed = {name: types[name] for name in cache.write_step.arg_names if name in types}
    constants = cache.constants(shape.head_dim, rotary=shape.gated)
    return compile_kernel(cache.write_step, passed, constants, warps=cache.WARPS, stages=1, sms=sms)


def resources(op: str, kernels: Iterable[Kernel], dtype: str, code_of: int | None) -> Iterator[Resources]:
    """Resources of all images of the kernels; the images must be cubins.

    Args:
        code_of: the architecture whose machine code is read; None for none.
    """
    for kernel in kernels:
        for image in kernel.images:
            used = _usage(image.data)
            code = _machine_code(image.data) if image.sm == code_of else None
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
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    with progress("Compiling", 6 * len(args.shapes) * len(args.dtypes)) as advance:
        for name in args.shapes:
            found[name] = []
            for dtype in args.dtypes:
                shape, sms = SHAPES[name], tuple(args.sms)
                for op, program in programs(shape, dtype, sms):
                    found[name] += map(asdict, resources(op, program.kernels, dtype, args.machine_code))
                    advance(1)
                found[name] += map(asdict, resources("write_cache", [cache_writer(shape, dtype, sms)], dtype, None))
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
