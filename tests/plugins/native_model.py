"""A session with one node of a native op, and the largest error that its result may have.

The native ops are compared with float64 arithmetic, on every kernel that this CPU can run (the fixture ``isa``). The
error may be twice that of the float32 NumPy reference, plus a few roundings of the result, because both add the same
products in another order.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from shadowllm.bundle import op_domain
from shadowllm.bundle.quantisation import Quantisation, dense_rows, quantise
from shadowllm.plugins import native_ops
from shadowllm.plugins.registry import NATIVE_SCHEMAS, SCHEMAS

ort = pytest.importorskip("onnxruntime")
built = pytest.mark.skipif(not native_ops.kernels(), reason="the native ops are not built")
STATES = ort.capi.onnxruntime_pybind11_state
REFUSED = (STATES.InvalidArgument, STATES.Fail)
ONNX_TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.uint8): TensorProto.UINT8,
}

# Kernels round the factor of rows only if their scales are constant; see `shorten` in op.hpp.
PARTS = ("qkv", "out", "up", "down", "mlp_up", "mlp_down")
SCALES = (
    "scales",
    *(f"{part}_scales" for part in PARTS),
    *(f"cs_{part}" for part in ("gate", "up", "down", "q", "o")),
)


def make_session(
    op: str,
    inputs: dict[str, np.ndarray | None],
    weights: tuple[str, ...] = (),
    threads: int = 1,
    outputs: int | None = 1,
    absent: tuple[str, ...] = (),
    **attributes,
):
    """A session of one node.

    Inputs named in ``weights``, and the scales of copies, are initializers. The others are given at each run. The node
    has the first outputs, all if ``outputs`` is None, but for those that are ``absent``.
    """
    schema, weights = (SCHEMAS | NATIVE_SCHEMAS)[op], (*weights, *SCALES)
    given = {name: value for name, value in inputs.items() if value is not None}
    node = helper.make_node(
        op,
        [port.name if port.name in given else "" for port in schema.inputs],
        ["" if port.name in absent else port.name for port in schema.outputs[:outputs]],
        domain=op_domain.DOMAIN,
        **attributes,
    )
    fed = [
        helper.make_tensor_value_info(name, ONNX_TYPES[value.dtype], [f"{name}_{axis}" for axis in range(value.ndim)])
        for name, value in given.items()
        if name not in weights
    ]
    kinds = {"int32": TensorProto.INT32}
    graph = helper.make_graph(
        [node],
        "test",
        fed,
        [
            helper.make_tensor_value_info(port.name, kinds.get(port.dtype, TensorProto.FLOAT), None)
            for port in schema.outputs[:outputs]
            if port.name not in absent
        ],
        [onnx.numpy_helper.from_array(given[name], name) for name in weights if name in given],
    )
    model = helper.make_model(
        graph,
        ir_version=9,
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid(op_domain.DOMAIN, op_domain.VERSION)],
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # refused inputs are part of the tests
    assert native_ops.register(options)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(op: str, inputs: dict[str, np.ndarray | None], weights: tuple[str, ...] = (), threads: int = 1, **attributes):
    """The first output."""
    return run_all(op, inputs, weights, threads, 1, **attributes)[0]


def run_all(
    op: str,
    inputs: dict[str, np.ndarray | None],
    weights: tuple[str, ...] = (),
    threads: int = 1,
    outputs: int | None = None,
    **attributes,
):
    """The first outputs, all unless ``outputs`` says how many."""
    session = make_session(op, inputs, weights, threads, outputs, **attributes)
    feeds = {i.name: inputs[i.name] for i in session.get_inputs()}
    return session.run(None, feeds)


# avx512vnni rounds the inputs of integer rows to 16 bits, and the errors of gate, up and down add up.
INPUT_STEP = {"avx512vnni": 3 / 32639}


def assert_as_exact_as(found: np.ndarray, float32: np.ndarray, exact: np.ndarray, step: float = 0) -> None:
    assert found.shape == exact.shape
    floor = max(step, 8 * np.finfo(np.float32).eps) * np.abs(exact).max(initial=0)
    assert np.abs(found - exact).max(initial=0) <= 2 * np.abs(float32 - exact).max(initial=0) + floor


def pick(rng: np.random.Generator, bound: int, count: int, cap: int) -> np.ndarray:
    """``count`` ascending indices below ``bound``, then -1 up to ``cap``."""
    chosen = np.sort(rng.permutation(bound)[:count])
    return np.concatenate((chosen, np.full(cap - count, -1))).astype(np.int32)


STORED = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}  # the ops widen these exactly


def stored(inputs: dict[str, np.ndarray | None], names: tuple[str, ...], dtype: str) -> dict[str, np.ndarray | None]:
    """The same inputs with their weights rounded to ``dtype``."""
    return {k: v.astype(STORED[dtype]) if k in names and v is not None else v for k, v in inputs.items()}


QUANTISATIONS = [Quantisation(8), Quantisation(4), Quantisation(8, 64)]


def integers(inputs: dict[str, np.ndarray | None], q: Quantisation) -> dict[str, np.ndarray | None]:
    """The same inputs with matrices as integers and scales."""
    matrices = [name for name, value in inputs.items() if name.startswith("w_") and value is not None]
    found = dict(inputs)
    for name in matrices:
        found[name], found[name.replace("w_", "s_")] = quantise(inputs[name], q)
    return found


def restored(inputs: dict[str, np.ndarray | None], width: int) -> dict[str, np.ndarray | None]:
    """Integer inputs converted to floats."""
    found = {name: value for name, value in inputs.items() if not name.startswith("s_")}
    for name, scales in inputs.items():
        if name.startswith("s_"):
            weight = name.replace("s_", "w_")
            found[weight] = dense_rows(inputs[weight], scales, width)
    return found


def ints(*values: int) -> np.ndarray:
    return np.asarray(values, dtype=np.int32)


def scalar(value: int) -> np.ndarray:
    return np.asarray(value, dtype=np.int32)


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, dtype=np.float32)
