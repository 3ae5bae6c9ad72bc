"""Small ONNX files for the engine tests: one with three custom ops, and some that must be refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from shadowllm.bundle.op_domain import DOMAIN, VERSION
from shadowllm.plugins.function_body import FunctionForm
from shadowllm.plugins.registry import function_bodies

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
HIDDEN, NEURONS, HEADS, HEAD_DIM = 32, 41, 4, 8
FORM = FunctionForm(
    activation="silu",
    gated=True,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    rope=False,
    n_heads=HEADS,
    n_kv_heads=2,
    head_dim=HEAD_DIM,
)


def write_sample(path: Path, dtype: str = "float16") -> Path:
    """Selection, attention and MLP of two "layers" 5 and 6, without biases; weights are in a second file."""
    kind, rng, tape = ir.DataType[{"float32": "FLOAT"}.get(dtype, dtype.upper())], np.random.default_rng(0), Tape()

    def weight(name: str, rows: int) -> ir.Value:
        return tape.initializer(ir.tensor(rng.normal(size=(rows, HIDDEN)).astype(DTYPES[dtype]), name=name))

    x = ir.val("x", dtype=kind, shape=["batch", "seqlen", HIDDEN])
    key, value = (ir.val(n, dtype=kind, shape=["batch", 2, "capacity", HEAD_DIM]) for n in ("key", "value"))
    lengths = ir.val("lengths", dtype=ir.DataType.INT32, shape=["batch"])
    inputs, y, row = [x, key, value, lengths], x, tape.initializer(ir.tensor(np.array(0, np.int64), name="row"))
    for layer in (5, 6):
        picked = []
        for unit, width in (("heads", HEADS), ("neurons", NEURONS)):
            scores = ir.val(f"{unit}.{layer}.scores", dtype=ir.DataType.FLOAT, shape=[1, width])
            counts = ir.val(f"{unit}.{layer}.counts", dtype=ir.DataType.INT32, shape=[1])
            inputs += [scores, counts]
            indices = tape.op("SelectTopK", [scores, counts], {"cap": width}, domain=DOMAIN)
            picked.append([tape.op("Gather", [rows, row], {"axis": 0}) for rows in (indices, counts)])
        heads = [weight(f"{layer}.{p}", HEADS * HEAD_DIM) for p in ("q", "o")]
        mlp = [weight(f"{layer}.{p}", NEURONS) for p in ("gate", "up", "down")]
        part = tape.op(
            "SparseAttention",
            [y, key, value, lengths, *picked[0], heads[0], None, heads[1]],
            {"n_heads": HEADS, "layer": layer},
            domain=DOMAIN,
        )
        y = tape.op("Add", [y, part])
        y.dtype, y.shape = kind, x.shape  # the exporter sets it too: it does not follow from the function body
        part = tape.op(
            "SparseMLP",
            [y, *picked[1], mlp[0], None, mlp[1], None, mlp[2]],
            {"activation": "silu", "layer": layer},
            domain=DOMAIN,
        )
        y = tape.op("Add", [y, part])
    y.name, y.dtype, y.shape = "y", kind, x.shape
    return _save(path, inputs, y, tape, function_bodies(FORM))


def write_selection(path: Path) -> Path:
    """One ``SelectTopK``; it compiles in a second."""
    tape, x = Tape(), ir.val("scores", dtype=ir.DataType.FLOAT, shape=[3, 41])
    counts = ir.val("counts", dtype=ir.DataType.INT32, shape=[3])
    y = tape.op("SelectTopK", [x, counts], {"cap": 41}, domain=DOMAIN)
    y.name, y.dtype, y.shape = "indices", ir.DataType.INT32, x.shape
    return _save(path, [x, counts], y, tape)


def write_sum(path: Path, op: str = "Add", domain: str = "") -> Path:
    """``c = op(a, b)`` of two float32 vectors of unrelated open lengths."""
    tape = Tape()
    a, b = (ir.val(name, dtype=ir.DataType.FLOAT, shape=[f"len_{name}"]) for name in "ab")
    c = tape.op(op, [a, b], domain=domain)
    c.name, c.dtype, c.shape = "c", ir.DataType.FLOAT, ir.Shape(["n"])
    return _save(path, [a, b], c, tape)


def _save(
    path: Path, inputs: list[ir.Value], output: ir.Value, tape: Tape, functions: Sequence[ir.Function] = ()
) -> Path:
    graph = ir.Graph(
        inputs,
        [output],
        nodes=tape.nodes,
        initializers=tape.initializers,
        opset_imports={"": 24, DOMAIN: VERSION},
        name=path.stem,
    )
    model = ir.Model(graph, ir_version=11, functions=functions)
    ir.save(model, path, external_data=path.name + ".data", size_threshold_bytes=64)
    return path
