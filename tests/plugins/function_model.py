"""Runs one node of an op with its ONNX function body, on ONNX Runtime without the native library."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from shadowllm.bundle import op_domain
from shadowllm.plugins.function_body import OPSET, FunctionForm
from shadowllm.plugins.registry import function_bodies
from shadowllm.plugins.schema import OpSchema

# float32 sums of a few hundred products of numbers near 1.
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
FORM = FunctionForm(
    activation="silu",
    gated=True,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    rope=True,
    n_heads=6,
    n_kv_heads=2,
    head_dim=8,
)


def run(schema: OpSchema, form: FunctionForm, feeds: dict[str, np.ndarray], **attributes) -> np.ndarray:
    """The first output of the op."""
    return run_all(schema, form, feeds, outputs=1, **attributes)[0]


def run_all(
    schema: OpSchema, form: FunctionForm, feeds: dict[str, np.ndarray], outputs: int | None = None, **attributes
) -> list[np.ndarray]:
    """The outputs of a model with one node of the op and the function bodies; ``outputs`` is how many it has."""
    inputs = {
        name: ir.val(name, dtype=ir.DataType.from_numpy(array.dtype), shape=array.shape)
        for name, array in feeds.items()
    }
    ports = schema.outputs[:outputs]
    given = [inputs.get(port.name) for port in schema.inputs]
    node = ir.node(schema.name, given, attributes, domain=op_domain.DOMAIN, num_outputs=len(ports))
    for output, port in zip(node.outputs, ports, strict=True):
        output.name = f"output_{port.name}"
        output.dtype = ir.DataType.INT32 if port.dtype == "int32" else ir.DataType.FLOAT
    graph = ir.Graph(list(inputs.values()), node.outputs, nodes=[node], opset_imports={"": OPSET, op_domain.DOMAIN: 1})
    model = ir.Model(graph, ir_version=11, functions=function_bodies(form))
    serialized = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(serialized, ort.SessionOptions(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def padded(chosen: np.ndarray, cap: int) -> np.ndarray:
    out = np.full(cap, -1, dtype=np.int32)
    out[: len(chosen)] = np.sort(chosen)
    return out
