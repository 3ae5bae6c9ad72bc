"""Compares stacks of `SparseMLP` with ONNX Runtime's dense layers: time, GB/s and share of the memory bandwidth.

    python -m shadowllm.benchmarks.op_bench --json result.json

Every stack has its own process, because the spinning threads of two sessions disturb each other. The processes
take turns, so that a slow phase of the machine affects all of them. The results are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper
from rich.console import Console
from rich.progress import track

from shadowllm.benchmarks.script_parser import add_json, script, script_parser
from shadowllm.bundle import op_domain
from shadowllm.bundle.quantisation import LOW_BIT_COPY, WEIGHT_DTYPES, Quantisation, quantise
from shadowllm.child import Child, Progress, module_command, serve
from shadowllm.evaluation.speed.bandwidth import read_bandwidth
from shadowllm.evaluation.speed.environment import environment
from shadowllm.plugins import native_ops
from shadowllm.plugins.function_body import MICROSOFT
from shadowllm.plugins.ops.sparse_mlp.schema import PARTS, SPARSE_MLP

SIZES = {"large": (2048, 8192, 8), "small": (576, 1536, 30)}  # hidden size, intermediate size, layers
FLOATS = {
    "float32": (TensorProto.FLOAT, 4),
    "bfloat16": (TensorProto.BFLOAT16, 2),
    "float16": (TensorProto.FLOAT16, 2),
}
DTYPES = (*FLOATS, *WEIGHT_DTYPES)
# Accuracy levels of MatMulNBits: float32 or int8 activations. Both run, and the faster one is the baseline.
ACCURACY_LEVELS = (1, 4)
KINDS = ("sparse", "mixed")
INDEX_SETS = 5  # sets of random neurons, so that no cache keeps the rows of one set


@dataclass(frozen=True)
class Stack:
    """The layers that one process runs: all of one kind, each added to its input."""

    size: str
    kind: str  # "dense", "sparse", or "mixed": the neurons that are not kept come from a low-bit copy
    dtype: str
    accuracy_level: int = 0  # only for a dense stack of integers

    @property
    def bytes(self) -> float:
        """Bytes of all weights, scales included, but without the low-bit copy."""
        hidden, neurons, layers = SIZES[self.size]
        q = WEIGHT_DTYPES.get(self.dtype)
        return 3 * hidden * neurons * layers * (q.itemsize if q else FLOATS[self.dtype][1])

    def read(self, kept: float) -> float:
        """Bytes read for a token."""
        hidden, neurons, layers = SIZES[self.size]
        copied = self.kind == "mixed" and kept < 1
        return kept * self.bytes + (3 * hidden * neurons * layers * LOW_BIT_COPY.itemsize if copied else 0)


class Builder:
    """Builds a graph whose initializers are passed to the session and not written to a file."""

    def __init__(self, hidden: int) -> None:
        self.hidden = hidden
        self.nodes: list[Any] = []
        self.inputs = [helper.make_tensor_value_info("x0", TensorProto.FLOAT, [1, 1, hidden])]
        self.declared: list[Any] = []
        self.values: dict[str, ort.OrtValue] = {}
        self._pool = (np.random.default_rng(0).standard_normal(1 << 20) / np.sqrt(4 * hidden)).astype(np.float32)

    def op(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def _values(self, shape: tuple[int, int]) -> np.ndarray:
        # Every weight is different, because ONNX Runtime stores equal packed weights only once.
        return np.resize(np.roll(self._pool, 1000 * len(self.values)), shape)

    def weight(self, name: str, shape: tuple[int, int], dtype: str) -> str:
        data, kind = self._values(shape), FLOATS[dtype][0]
        if dtype == "bfloat16":
            halves = (data.view(np.uint32) >> 16).astype(np.uint16)
            return self._declare(name, kind, ort.OrtValue.ortvalue_from_numpy_with_onnx_type(halves, kind))
        return self._declare(name, kind, ort.OrtValue.ortvalue_from_numpy(data.astype(dtype)))

    def integers(self, name: str, shape: tuple[int, int], q: Quantisation, *, blocked: bool) -> tuple[str, str]:
        """Integers and scales; in the shape for `MatMulNBits` if ``blocked``."""
        data, scales = quantise(self._values(shape), q)
        data = data.reshape(*scales.shape, -1) if blocked else data
        return (
            self._declare(name, TensorProto.UINT8, ort.OrtValue.ortvalue_from_numpy(data)),
            self._declare(f"{name}.scales", TensorProto.FLOAT, ort.OrtValue.ortvalue_from_numpy(scales)),
        )

    def constant(self, name: str, values: np.ndarray) -> str:
        kind = TensorProto.INT32 if values.dtype == np.int32 else TensorProto.FLOAT
        return self._declare(name, kind, ort.OrtValue.ortvalue_from_numpy(values))

    def _declare(self, name: str, kind: int, value: ort.OrtValue) -> str:
        tensor = TensorProto(name=name, data_type=kind, dims=value.shape(), data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="given to the session")
        self.declared.append(tensor)
        self.values[name] = value
        return name

    def session(self, output: str, threads: int) -> ort.InferenceSession:
        graph = helper.make_graph(
            self.nodes,
            "stack",
            self.inputs,
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, [1, 1, self.hidden])],
            self.declared,
        )
        model = helper.make_model(
            graph,
            ir_version=10,
            opset_imports=[
                helper.make_opsetid("", 21),
                helper.make_opsetid(op_domain.DOMAIN, op_domain.VERSION),
                helper.make_opsetid(MICROSOFT, 1),
            ],
        )
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_external_initializers(list(self.values), list(self.values.values()))
        if not native_ops.register(options):
            raise SystemExit("the native ops are not available: nothing to measure")
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def dense_stack(stack: Stack, threads: int) -> tuple[ort.InferenceSession, list[str]]:
    """The dense graph: three MatMul or MatMulNBits nodes per layer."""
    hidden, neurons, layers = SIZES[stack.size]
    build, x = Builder(hidden), "x0"

    def multiply(x: str, part: str, layer: int, width: int, n_out: int) -> str:
        name, output = f"w_{part}{layer}", f"{part}{layer}"
        if stack.dtype in FLOATS:
            return build.op("MatMul", [x, build.weight(name, (width, n_out), stack.dtype)], output)
        q = WEIGHT_DTYPES[stack.dtype]
        attributes = {"K": width, "N": n_out, "bits": q.bits, "block_size": q.block}
        inputs = [x, *build.integers(name, (n_out, width), q, blocked=True)]
        return build.op(
            "MatMulNBits", inputs, output, domain=MICROSOFT, accuracy_level=stack.accuracy_level, **attributes
        )

    for i in range(layers):
        gate, up = multiply(x, "gate", i, hidden, neurons), multiply(x, "up", i, hidden, neurons)
        act = build.op("Mul", [gate, build.op("Sigmoid", [gate], f"sigmoid{i}")], f"act{i}")
        h = build.op("Mul", [act, up], f"h{i}")
        x = build.op("Add", [x, multiply(h, "down", i, neurons, hidden)], f"x{i + 1}")
    return build.session(x, threads), [x]


def sparse_stack(stack: Stack, threads: int) -> tuple[ort.InferenceSession, list[str]]:
    """The same layers as `SparseMLP`, each with its own list of active neurons, or with its own choice of them."""
    hidden, neurons, layers = SIZES[stack.size]
    build, x = Builder(hidden), "x0"
    build.inputs.append(helper.make_tensor_value_info("count", TensorProto.INT32, []))
    for i in range(layers):
        inputs = {"x": x, "count": "count"}
        if stack.kind == "mixed":
            inputs["rest"] = build.constant(f"rest{i}", np.asarray(1, dtype=np.int32))
            # Equal norms: a random neuron is as likely to be chosen as any other.
            inputs["down_norms"] = build.constant(f"norms{i}", np.ones(neurons, dtype=np.float32))
        else:
            build.inputs.append(helper.make_tensor_value_info(f"indices{i}", TensorProto.INT32, [neurons]))
            inputs["indices"] = f"indices{i}"
        for part in PARTS:
            if stack.kind == "mixed":
                inputs[f"c_{part}"], inputs[f"cs_{part}"] = build.integers(
                    f"c_{part}{i}", (neurons, hidden), LOW_BIT_COPY, blocked=True
                )
            name, shape = f"w_{part}{i}", (neurons, hidden)
            if stack.dtype in FLOATS:
                inputs[f"w_{part}"] = build.weight(name, shape, stack.dtype)
            else:
                q = WEIGHT_DTYPES[stack.dtype]
                inputs[f"w_{part}"], inputs[f"s_{part}"] = build.integers(name, shape, q, blocked=False)
        ordered = [inputs.get(port.name, "") for port in SPARSE_MLP.inputs]
        y = build.op("SparseMLP", ordered, f"y{i}", domain=op_domain.DOMAIN, activation="silu", layer=i)
        x = build.op("Add", [x, y], f"x{i + 1}")
    return build.session(x, threads), [x]


def bind(session: ort.InferenceSession, stack: Stack, output: str, kept: float, seed: int) -> ort.IOBinding:
    """Bind random inputs and the output of a session; a sparse or mixed one keeps the share ``kept`` of its neurons."""
    hidden, neurons, layers = SIZES[stack.size]
    rng = np.random.default_rng(seed)
    binding = session.io_binding()
    feeds: dict[str, np.ndarray] = {"x0": rng.standard_normal((1, 1, hidden)).astype(np.float32)}
    count = max(1, round(kept * neurons))
    if stack.kind != "dense":
        feeds["count"] = np.asarray(count, dtype=np.int32)
    if stack.kind == "sparse":
        for i in range(layers):
            indices = np.full(neurons, -1, dtype=np.int32)
            indices[:count] = np.sort(rng.permutation(neurons)[:count])
            feeds[f"indices{i}"] = indices
    for name, array in feeds.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
    binding.bind_output(output)
    return binding


def worker(stack: Stack, threads: int) -> int:
    """Answer each request ``[kept, repeats]`` with a list of seconds."""
    session, (output,) = (dense_stack if stack.kind == "dense" else sparse_stack)(stack, threads)
    bindings: dict[float, list[ort.IOBinding]] = {}

    def run(request: list[Any], _: Progress) -> list[float]:
        if not request:
            return []  # only tells the parent that the session is open
        kept, repeats = request
        if kept not in bindings:
            bindings[kept] = [bind(session, stack, output, kept, seed) for seed in range(INDEX_SETS)]
        session.run_with_iobinding(bindings[kept][0])  # wakes the threads
        times = []
        for i in range(repeats):
            start = time.perf_counter()
            session.run_with_iobinding(bindings[kept][i % INDEX_SETS])
            times.append(time.perf_counter() - start)
        return times

    return serve(run)


def start_worker(stack: Stack, threads: int) -> Child:
    """Start a process that runs one stack."""
    arguments = ("--worker", json.dumps(asdict(stack)), "--threads", str(threads))
    command = module_command("shadowllm.benchmarks.op_bench", *arguments)
    return Child(command, f"the process of {stack}", keep_output=False)


def stacks_of(size: str, kinds: list[str], dtypes: list[str]) -> list[Stack]:
    """Dense stacks (float32, and each integer type at every accuracy level), then sparse and mixed ones of `kinds`."""
    integers = [dtype for dtype in dtypes if dtype in WEIGHT_DTYPES]
    return [
        Stack(size, "dense", "float32"),
        *(Stack(size, "dense", dtype, level) for dtype in integers for level in ACCURACY_LEVELS),
        *(Stack(size, kind, dtype) for kind in kinds for dtype in dtypes if kind == "sparse" or dtype in FLOATS),
    ]


def measure_size(stacks: list[Stack], kept: list[float], rounds: int, threads: int) -> list[dict[str, Any]]:
    """Measure the stacks of one size; return table rows: dense ones, then one per stack and fraction kept."""
    roof = read_bandwidth(threads)
    jobs = [(stack, k) for stack in stacks for k in ([1.0] if stack.kind == "dense" else kept)]
    times: dict[tuple[Stack, float], list[float]] = {job: [] for job in jobs}
    with ExitStack() as running:
        workers: dict[Stack, Child] = {}
        for stack in stacks:
            workers[stack] = running.enter_context(start_worker(stack, threads))
            workers[stack].ask([])
        for _ in track(range(rounds), stacks[0].size, console=Console(stderr=True), disable=not sys.stderr.isatty()):
            for stack, k in jobs:
                times[stack, k] += workers[stack].ask([k, 4])
    roof = max(roof, read_bandwidth(threads))
    dense: dict[str, float] = {}
    for (stack, _), seconds in times.items():
        if stack.kind == "dense":
            dense[stack.dtype] = min(median(seconds), dense.get(stack.dtype, np.inf))
    # 16-bit rows are compared with dense float32, because ONNX Runtime has no dense 16-bit layer on CPU.
    return [
        row_of(stack, k, seconds, dense.get(stack.dtype, dense["float32"]), roof)
        for (stack, k), seconds in times.items()
    ]


def row_of(stack: Stack, kept: float, seconds: list[float], dense: float, roof: float) -> dict[str, Any]:
    """Results of one stack at one fraction kept: median and quartiles of the times, and the bandwidth."""
    middle = median(seconds)
    low, high = np.percentile(seconds, [25, 75]) * 1e3
    rate = stack.read(kept) / middle / 1e9
    return asdict(stack) | {
        "kept": kept,
        "median_ms": middle * 1e3,
        "q25_ms": low,
        "q75_ms": high,
        "samples": len(seconds),
        "speedup": dense / middle,
        "gb_per_s": rate,
        "share_of_bandwidth": rate / roof,
        "read_gb_per_s": roof,
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the results as a table."""
    print(
        f"{'size':6} {'kind':7} {'dtype':10} {'kept':>5} {'median ms':>10} {'q25..q75':>16} {'speedup':>8} "
        f"{'GB/s':>6} {'share':>6}"
    )
    for r in rows:
        name = f"{r['dtype']}/{r['accuracy_level']}" if r["accuracy_level"] else r["dtype"]
        spread = f"{r['q25_ms']:.2f}..{r['q75_ms']:.2f}"
        print(
            f"{r['size']:6} {r['kind']:7} {name:10} {r['kept']:5.0%} {r['median_ms']:10.2f} {spread:>16} "
            f"{r['speedup']:7.2f}x {r['gb_per_s']:6.1f} {r['share_of_bandwidth']:6.0%}"
        )


@script
def main() -> None:
    """Command line."""
    parser = script_parser("op_bench", __doc__)
    add_json(parser, "write all results to this file")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=DTYPES,
        default=["float32", "bfloat16", "int8", "int4"],
        help="types of the sparse weights; floats are compared with dense float32, integers with MatMulNBits",
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="beside dense")
    parser.add_argument("--kept", nargs="+", type=float, default=[1.0, 0.5, 0.3, 0.1], help="fractions of the neurons")
    parser.add_argument("--rounds", type=int, default=15, help="number of rounds; each stack runs four times per round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        sys.exit(worker(Stack(**json.loads(args.worker)), args.threads))
    rows = []
    for size in args.sizes:
        rows += measure_size(stacks_of(size, args.kinds, args.dtypes), args.kept, args.rounds, args.threads)
    print_table(rows)
    if args.json:
        kernels = os.environ.get(native_ops.ISA_VARIABLE) or native_ops.kernels()[0]
        record = {"environment": environment(args.threads) | {"kernels": kernels}, "rows": rows}
        args.json.write_text(json.dumps(record, indent=2))


if __name__ == "__main__":
    sys.exit(main())
