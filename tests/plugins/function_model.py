"""Runs one node of an op with its ONNX function body, on ONNX Runtime without the native library."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from shadowllm.bundle import op_domain
from shadowllm.plugins.function_body import OPSET, FunctionForm
from shadowllm.plugins.ops.select_topk.schema import SELECT_TOPK
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
    """A model with one node of the op and the function bodies."""
    inputs = {
        name: ir.val(name, dtype=ir.DataType.from_numpy(array.dtype), shape=array.shape)
        for name, array in feeds.items()
    }
    node = ir.node(schema.name, [inputs.get(port.name) for port in schema.inputs], attributes, domain=op_domain.DOMAIN)
    output = node.outputs[0]
    output.name, output.dtype = "output", ir.DataType.INT32 if schema is SELECT_TOPK else ir.DataType.FLOAT
    graph = ir.Graph(list(inputs.values()), [output], nodes=[node], opset_imports={"": OPSET, op_domain.DOMAIN: 1})
    model = ir.Model(graph, ir_version=11, functions=function_bodies(form))
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def padded(chosen: np.ndarray, cap: int) -> np.ndarray:
    out = np.full(cap, -1, dtype=np.int32)
    out[: len(chosen)] = np.sort(chosen)
    return out
