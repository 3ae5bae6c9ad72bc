"""The pass that gives linear layers with nested integers to the native op."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from shadowllm.bundle.manifest import BODY, read_manifest
from shadowllm.bundle.op_domain import DOMAIN, VERSION
from shadowllm.bundle.quantisation import rounded
from shadowllm.models.sparsity import Budget
from shadowllm.plugins import native_ops
from shadowllm.runtime.ort.graph import for_cpu
from shadowllm.runtime.ort.native_linear import NativeLinear
from shadowllm.runtime.ort.session import OrtSession
from tests.plugins.native_model import built
from tests.runtime.ort.test_join_nested import FORMATS, ROWS, model


def outputs(of, x):
    options = ort.SessionOptions()
    native_ops.register(options)
    of.graph.opset_imports[DOMAIN] = VERSION
    session = ort.InferenceSession(ir.to_proto(of).SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@built
@FORMATS
@pytest.mark.parametrize("width", [64, 100, 576])
@pytest.mark.parametrize("bias", [True, False])
def test_one_product_gives_what_two_give(q, width, bias):
    rng = np.random.default_rng(0)
    shift = rng.standard_normal(ROWS).astype(np.float32) if bias else None
    (pair, matrix), x = model(q, width, bias=shift), rng.standard_normal((3, width)).astype(np.float32)
    assert NativeLinear()(pair).modified
    assert [node.op_type for node in pair.graph] == ["NestedLinear"]
    wanted = x @ rounded(matrix, q).T + (0 if shift is None else shift)
    # The native op rounds the input to 8 bits.
    np.testing.assert_allclose(outputs(pair, x), wanted, rtol=0, atol=0.02 * np.abs(wanted).max())


def test_a_product_without_a_residual_stays():
    alone, _ = model(next(iter(FORMATS.args[1])), 64, alone=True)
    assert not NativeLinear()(alone).modified
    assert [node.op_type for node in alone.graph] == ["MatMulNBits"]


@built
@pytest.mark.parametrize("pays", [False, True])
def test_steps_of_mixed_precision_use_it_where_it_pays(bundle, monkeypatch, pays):
    monkeypatch.setattr(native_ops, "linear_pays", lambda: pays)
    folder = bundle(kind="quantized-shadow", rest="shadow")
    graph = for_cpu([ir.load(folder / f"{BODY}.onnx")], read_manifest(folder), native=True, rounded=True)
    types = {node.op_type for node in onnx.ModelProto.FromString(graph.model).graph.node}
    assert types & {"NestedLinear", "MatMulNBits"} == {"NestedLinear" if pays else "MatMulNBits"}


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
