"""Estimates a decode step on a GPU from bytes, launches and occupancy; needs no GPU, and measures nothing.

    python -m shadowllm.benchmarks.gpu_estimates --shapes opt-1.3b opt-6.7b llama-2-7b --json estimates.json

The model: a launch takes the longer of two times, and launches follow one another.

- Its bytes divided by a rate. The rate is a share of the memory's bandwidth, or less if the blocks do not keep enough
  bytes in flight: bytes that all resident threads load at a time, divided by the latency of the memory (Little's law).
  A few blocks are limited by what their multiprocessors can load.
- The shortest time of a launch in a CUDA graph.

The blocks that finish last add up partial sums, and norm the row. Each of the two takes a latency more: the
atomic addition that finds the last block and the loads that follow are both in the L2 cache, and take it together.

Bytes are those of rows of active units, and of keys and values. Registers and shared memory of the
compiled kernels decide how many blocks are resident. Latency, shares and the shortest time are assumptions; the output
names them. A dense step reads all rows at the same rate, without a cost for launches.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from shadowllm.benchmarks.kernel_programs import SHAPES, Shape, block_nodes
from shadowllm.benchmarks.kernel_resources import resources
from shadowllm.benchmarks.script_parser import add_json, script, script_parser
from shadowllm.plugins.kernel_program import Program
from shadowllm.plugins.registry import schedules
from shadowllm.plugins.triton.schedule import Call

ITEM = 2  # bytes of float16


@dataclass(frozen=True)
class Gpu:
    """Limits of a GPU (NVIDIA H100 SXM data sheet; CUDA C++ Programming Guide), and assumptions about it.

    Attributes:
        bandwidth: bytes per second.
        multiprocessor_bandwidth: bytes per second that one multiprocessor loads; assumed (64 bytes per clock).
        share: share of the bandwidth that a kernel reaches if enough bytes are in flight; assumed.
        latency: seconds from a load to its data; assumed.
        launch: seconds of the shortest launch in a CUDA graph; assumed.
    """

    sm: int = 90
    multiprocessors: int = 132
    registers: int = 65536
    threads: int = 2048
    blocks: int = 32
    shared_bytes: int = 227 * 1024
    bandwidth: float = 3.35e12
    multiprocessor_bandwidth: float = 1e11
    share: float = 0.85
    latency: float = 800e-9
    launch: float = 1.5e-6


@dataclass(frozen=True)
class Estimate:
    """One launch of a sparse layer.

    Attributes:
        blocks: blocks that have work.
        resident: blocks that are resident on the whole GPU at a time.
        microseconds: the estimated time.
        bound: what decides it: "bytes", "in flight", "few blocks" or "launch".
    """

    kernel: str
    bytes: int
    blocks: int
    registers: int
    resident: int
    microseconds: float
    bound: str


def estimate(shape: Shape, gpu: Gpu, context: int, heads: float, neurons: float, fired: float) -> list[Estimate]:
    """Estimate the launches of a sparse layer.

    Args:
        context: tokens in the cache.
        heads, neurons: shares that are active.
        fired: share of the active neurons that a ReLU does not set to zero.
    """
    found = []
    for node in block_nodes(shape, "float16"):
        program = node.program((gpu.sm,))
        shapes = {name: tuple(n if isinstance(n, int) else 0 for n in t.shape) for name, t in node.inputs.items()}
        (schedule,) = schedules(node.op)(shapes, node.attributes, itemsize=ITEM, max_batch=1, max_seqlen=1)
        used = list(_used(program))
        for call, launch in zip(schedule.calls, program.plans[0].launches, strict=True):
            read, share = _bytes(shape, call, node.op, context, heads, neurons, fired)
            grid = math.prod(size(1, 1) for size in launch.grid)
            found.append(_launch(gpu, call, used[launch.kernel], read, max(1, round(grid * share))))
    return found


def _used(program: Program) -> Iterator[Any]:
    return resources("", program.kernels, "float16", None)


def _bytes(
    shape: Shape, call: Call, op: str, context: int, heads: float, neurons: float, fired: float
) -> tuple[int, float]:
    """Bytes that a launch reads, and the share of its blocks that have work."""
    width, dim = shape.hidden_size, shape.head_dim
    kv = 2 * shape.n_kv_heads * dim
    queries = heads * shape.n_heads * dim
    name, constants = call.kernel.fn.__name__, call.constants
    if name == "project_heads":
        return round((queries + kv) * width * ITEM), (heads * shape.n_heads + 2 * shape.n_kv_heads) / (
            shape.n_heads + 2 * shape.n_kv_heads
        )
    if name == "decode_attention":
        read = min(1.0, heads * shape.n_heads / shape.n_kv_heads) * kv * context * ITEM
        spans = math.ceil(context / int(constants["SPAN"]))
        return round(read), heads * spans / int(constants["SPLITS"])
    if name == "project_back":
        rows = queries if op == "SparseAttention" else neurons * fired * shape.intermediate_size
        return round(rows * width * ITEM), 1.0
    matrices = 2 if shape.gated else 1
    return round(matrices * neurons * shape.intermediate_size * width * ITEM), neurons


def _tile_bytes(call: Call) -> int:
    """Bytes that a block loads before it uses the first of them: one tile of each matrix."""
    constants: Mapping[str, Any] = call.constants
    name = call.kernel.fn.__name__
    if name == "decode_attention":
        return int(constants["BLOCK_P"] * constants["HEAD_DIM"] * ITEM)
    if name == "project_back":
        return int(constants["BLOCK_N"] * constants["BLOCK_D"] * ITEM)
    pair = 2 if name == "project_heads" or "w_gate" in call.operands else 1  # both halves of a head, or gate and up
    return int(pair * constants["BLOCK_N"] * constants["BLOCK_K"] * ITEM)


def _launch(gpu: Gpu, call: Call, used: Any, read: int, blocks: int) -> Estimate:
    per_thread = math.ceil(used.registers / 8) * 8
    fits = min(
        gpu.blocks,
        gpu.threads // used.threads,
        gpu.registers // (per_thread * used.threads),
        gpu.shared_bytes // max(1, used.shared_bytes + 1024),  # 1 KiB of every block is the driver's
    )
    resident = min(blocks, fits * gpu.multiprocessors)
    times = {
        "bytes": read / (gpu.share * gpu.bandwidth),
        "in flight": read * gpu.latency / (resident * _tile_bytes(call)),
        "few blocks": read / (min(resident, gpu.multiprocessors) * gpu.multiprocessor_bandwidth),
        "launch": gpu.launch,
    }
    bound = max(times, key=lambda name: times[name])
    seconds = times[bound] + gpu.latency * _ends(call)
    return Estimate(call.kernel.fn.__name__, read, blocks, used.registers, resident, 1e6 * seconds, bound)


def _ends(call: Call) -> int:
    """How many times blocks of a launch wait for the others."""
    if call.kernel.fn.__name__ != "project_back":
        return 0
    return 2 if "skip" in call.operands else 1


def summary(shape: Shape, gpu: Gpu, launches: list[Estimate], context: int) -> dict[str, Any]:
    """The estimate of a step: one dense layer, the sparse layers, and the output table."""
    width, rate = shape.hidden_size, gpu.share * gpu.bandwidth
    rows = 2 * shape.n_heads * shape.head_dim + 2 * shape.n_kv_heads * shape.head_dim
    matrices = 3 if shape.gated else 2
    cache = 2 * shape.n_kv_heads * shape.head_dim * context
    dense_layer = ITEM * (width * (rows + matrices * shape.intermediate_size) + cache)
    table = ITEM * shape.vocab_size * width
    dense = (shape.n_layers * dense_layer + table) / rate
    layer = sum(one.microseconds for one in launches) / 1e6
    sparse = (shape.n_layers - 1) * layer + (dense_layer + table) / rate
    sparse_bytes = (shape.n_layers - 1) * sum(one.bytes for one in launches) + dense_layer + table
    return {
        "launches_per_layer": len(launches),
        "layer_microseconds": 1e6 * layer,
        "sparse_ms": 1e3 * sparse,
        "dense_ms": 1e3 * dense,
        "ratio": dense / sparse,
        "ratio_of_bytes": (shape.n_layers * dense_layer + table) / sparse_bytes,
    }


@script
def main() -> None:
    """Command line."""
    parser = script_parser("gpu_estimates", __doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["opt-1.3b", "opt-6.7b", "llama-2-7b"])
    parser.add_argument("--context", type=int, default=192, help="tokens in the cache (default: 192)")
    parser.add_argument("--heads", type=float, default=0.5, help="share of active heads (default: 0.5)")
    parser.add_argument("--neurons", type=float, default=0.5, help="share of active neurons (default: 0.5)")
    parser.add_argument("--fired", type=float, default=1.0, help="share of those that ReLU leaves (default: 1)")
    add_json(parser)
    args = parser.parse_args()
    gpu = Gpu()
    record: dict[str, Any] = {}
    for name in args.shapes:
        shape = SHAPES[name]
        launches = estimate(shape, gpu, args.context, args.heads, args.neurons, args.fired)
        total = summary(shape, gpu, launches, args.context)
        record[name] = {"launches": [asdict(one) for one in launches], "step": total}
        print(f"{name}: one sparse layer")
        for one in launches:
            print(
                f"  {one.kernel:17} {one.bytes / 1e6:7.2f} MB  {one.blocks:5} blocks, {one.resident:5} resident  "
                f"{one.microseconds:6.1f} us ({one.bound})"
            )
        print(
            f"  a step: {total['sparse_ms']:.2f} ms, dense {total['dense_ms']:.2f} ms, {total['ratio']:.2f}x; "
            f"the bytes alone allow {total['ratio_of_bytes']:.2f}x"
        )
    print(f"assumed: {gpu}, {args.context} tokens in the cache")
    if args.json:
        given = {name: getattr(args, name) for name in ("context", "heads", "neurons", "fired")}
        args.json.write_text(json.dumps({"gpu": asdict(gpu), "given": given, "shapes": record}, indent=1) + "\n")
        print(f"results: {args.json}")


if __name__ == "__main__":
    sys.exit(main())
