"""The pass that gives linear layers with 8-bit weights to the native op."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from shadowllm.bundle.manifest import BODY, read_manifest
from shadowllm.bundle.quantisation import Quantisation, quantise
from shadowllm.models.sparsity import Budget
from shadowllm.plugins import native_ops
from shadowllm.plugins.function_body import MICROSOFT, OPSET
from shadowllm.runtime.ort.graph import for_cpu
from shadowllm.runtime.ort.native_linear import NativeLinear
from shadowllm.runtime.ort.session import OrtSession
from tests.plugins.native_model import built

ROWS = 7


def product(q, width, bias=False, zero_points=False):
    """A model with one ``MatMulNBits``."""
    rng = np.random.default_rng(width)
    integers, scales = quantise(rng.standard_normal((ROWS, width)).astype(np.float32), q)
    blocks = scales.shape[1]
    data = {"w": integers.reshape(ROWS, blocks, -1), "scales": scales}
    if zero_points:
        data["zero_points"] = np.full((ROWS, blocks * q.bits // 8), 128, np.uint8)
    if bias:
        data["bias"] = rng.standard_normal(ROWS).astype(np.float32)
    values = {name: ir.val(name, const_value=ir.tensor(array, name=name)) for name, array in data.items()}
    x, y = (ir.val(each, dtype=ir.DataType.FLOAT, shape=["n", size]) for each, size in (("x", width), ("y", ROWS)))
    inputs = [x, values["w"], values["scales"], values.get("zero_points"), None, values.get("bias")]
    sizes = {"K": width, "N": ROWS, "bits": q.bits, "block_size": q.block, "accuracy_level": 4}
    node = ir.node(
        "MatMulNBits", inputs[: 6 if bias else 4 if zero_points else 3], sizes, domain=MICROSOFT, outputs=[y]
    )
    graph = ir.Graph(
        [x], [y], nodes=[node], initializers=list(values.values()), opset_imports={"": OPSET, MICROSOFT: 1}
    )
    return ir.Model(graph, ir_version=11)


def outputs(model, x):
    options = ort.SessionOptions()
    native_ops.register(options)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@built
@pytest.mark.parametrize("width", [64, 100, 576])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_stays_the_same(width, bias):
    model, x = product(Quantisation(8, 64), width, bias), np.random.default_rng(0).standard_normal((3, width))
    wanted = outputs(model, x.astype(np.float32))
    assert NativeLinear()(model).modified
    assert [node.op_type for node in model.graph] == ["LinearW8A8"]
    # Both round the input to 8 bits. A value in the middle between two integers may be rounded to either.
    np.testing.assert_allclose(outputs(model, x.astype(np.float32)), wanted, rtol=0, atol=0.02 * np.abs(wanted).max())


@pytest.mark.parametrize(
    "model",
    [
        product(Quantisation(4, 64), 128),
        product(Quantisation(8, 32), 64),
        product(Quantisation(8, 64), 64, False, True),
    ],
    ids=["4 bits", "blocks of 32", "zero points"],
)
def test_other_products_stay(model):
    assert not NativeLinear()(model).modified
    assert [node.op_type for node in model.graph] == ["MatMulNBits"]


@built
@pytest.mark.parametrize("pays", [False, True])
def test_steps_of_mixed_precision_use_it_where_it_pays(bundle, monkeypatch, pays):
    monkeypatch.setattr(native_ops, "linear_pays", lambda: pays)
    folder = bundle(kind="quantized-shadow", rest="shadow")
    graph = for_cpu([folder / f"{BODY}.onnx"], read_manifest(folder), native=True, rounded=True)
    types = {node.op_type for node in onnx.ModelProto.FromString(graph.model).graph.node}
    assert types & {"LinearW8A8", "MatMulNBits"} == {"LinearW8A8" if pays else "MatMulNBits"}


@built
@pytest.mark.parametrize("weight_dtype", ["float32", "int8"])
@pytest.mark.parametrize("heads", [0.5, 1.0])
def test_the_runtime_has_no_objections(bundle, weight_dtype, heads, capfd):
    """It writes a warning for shapes that contradict each other."""
    options = {} if weight_dtype == "float32" else {"weight_dtype": weight_dtype}
    with OrtSession(bundle("llama-blocks", kind="quantized-shadow", rest="shadow", **options), "sparse") as session:
        capfd.readouterr()
        session.set_budget(Budget(neurons=0.3, heads=heads, shortlist=5))
        session.prefill([[5, 17, 42]])
        session.decode(np.array([3]))
    assert "[W:onnxruntime" not in capfd.readouterr().err
