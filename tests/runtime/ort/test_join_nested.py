"""The pass that joins the products of nested integers: the joined weights, and the graphs that it refuses."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir.passes import PreconditionError
from onnx_ir.tape import Tape

from shadowllm.bundle.quantisation import NESTED, quantise_nested, rounded
from shadowllm.plugins import native_ops
from shadowllm.plugins.function_body import MICROSOFT, OPSET
from shadowllm.runtime.ort.join_nested import JoinNested
from shadowllm.runtime.ort.shared_weights import SharedWeights

FORMATS = pytest.mark.parametrize("q", NESTED.values(), ids=NESTED)
ROWS = 7
WEIGHTS = "weights.data"


def model(q, width, *, other_scales=False, alone=False, bias=None):
    """``x matrix^T + bias`` as the exporter writes it, and the matrix."""
    matrix = np.random.default_rng(width).standard_normal((ROWS, width)).astype(np.float32)
    copy, scales, residual = quantise_nested(matrix, q)
    tape, x = Tape(), ir.val("x", dtype=ir.DataType.FLOAT, shape=["n", width])

    def constant(name, array):
        return tape.initializer(ir.tensor(array, name=name))

    def product(name, data, steps, bits, *more):
        sizes = {"K": width, "N": ROWS, "bits": bits, "block_size": q.block, "accuracy_level": 1}
        return tape.op(
            "MatMulNBits",
            (x, constant(name, data.reshape(*scales.shape, -1)), steps, *more),
            sizes,
            domain=MICROSOFT,
        )

    steps = constant("scales", scales)
    others = constant("others", 2 * scales) if other_scales else steps
    shift = () if bias is None else (None, None, constant("bias", bias))
    y = high = product("copy", copy, steps, 4, *shift)
    if not alone:
        low = tape.op(
            "Mul",
            (product("residual", residual, others, q.residual_bits), constant("step", np.float32(q.residual_step))),
        )
        y = tape.op("Add", (high, low))
    y.name, y.dtype, y.shape = "y", ir.DataType.FLOAT, ir.Shape(["n", ROWS])
    graph = ir.Graph(
        [x], [y], nodes=tape.nodes, initializers=tape.initializers, opset_imports={"": OPSET, MICROSOFT: 1}
    )
    return ir.Model(graph, ir_version=11), matrix


def in_file(built, folder):
    """The same model with its weights in a file, as in a bundle."""
    ir.save(built, folder / "model.onnx", external_data=WEIGHTS, size_threshold_bytes=1)
    return ir.load(folder / "model.onnx")


def outputs(built, folder, x, computed=None):
    options = ort.SessionOptions()
    native_ops.register(options)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    shared = SharedWeights(folder / WEIGHTS)
    shared.give_computed(computed or {}, options)
    session = ort.InferenceSession(ir.to_proto(built).SerializeToString(), options, providers=["CPUExecutionProvider"])
    shared.release()
    return session.run(None, {"x": x})[0]


@FORMATS
@pytest.mark.parametrize("width", [64, 100, 576])
def test_one_product_gives_what_two_give(q, width, tmp_path):
    built, matrix = model(q, width)
    built, join = in_file(built, tmp_path), JoinNested(q)
    x = np.random.default_rng(0).standard_normal((3, width)).astype(np.float32)
    before = outputs(built, tmp_path, x)
    assert join(built).modified
    (product,) = (node for node in built.graph if node.op_type == "MatMulNBits")
    assert product.attributes["bits"].as_int() == 8
    after, wanted = outputs(built, tmp_path, x, join.weights), x @ rounded(matrix, q).T
    for found in (before, after):
        assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


@FORMATS
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"alone": True}, "no product of a residual is added to that of copy"),
        ({"other_scales": True}, "not of the same matrix"),
    ],
)
def test_other_graphs_are_refused(q, changes, words):
    with pytest.raises(PreconditionError, match=words):
        JoinNested(q)(model(q, 64, **changes)[0])


@FORMATS
def test_weights_that_are_not_in_a_file_are_refused(q):
    with pytest.raises(PreconditionError, match="input 1 of the product of copy is not in the weight file"):
        JoinNested(q)(model(q, 64)[0])
