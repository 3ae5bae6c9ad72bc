"""The pass that makes a dense MLP one op."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from shadowllm.bundle.manifest import BODY, read_manifest
from shadowllm.bundle.op_domain import DOMAIN, VERSION
from shadowllm.exporter.graphs.nodes import mlp_activation
from shadowllm.models.activations import NAMES
from shadowllm.plugins import native_ops
from shadowllm.plugins.function_body import OPSET
from shadowllm.runtime.ort.fuse_dense_mlp import FuseDenseMlp
from shadowllm.runtime.ort.graph import for_cpu
from tests.plugins.native_model import built
from tests.plugins.ops.dense_mlp.native_inputs import dense_mlp_inputs
from tests.runtime.ort.test_native_linear import outputs

HIDDEN, NEURONS = 100, 33
ACTIVATIONS = sorted(set(NAMES.values()))


class Nodes:
    """Takes the place of the exporter's `GraphBuilder`."""

    def __init__(self):
        self.nodes, self.constants = [], []

    def op(self, op_type, *inputs, **attributes):
        self.nodes.append(ir.node(op_type, list(inputs), attributes))
        return self.nodes[-1].outputs[0]

    def number(self, value):
        return self.constant(np.float32(value))

    def split(self, value, sizes, axis):
        if len(sizes) == 1:
            return [value]
        node = ir.node("Split", [value, self.constant(np.array(sizes))], {"axis": axis}, num_outputs=len(sizes))
        self.nodes.append(node)
        return node.outputs

    def linear(self, x, part, data):
        weights = [self.constant(data[f"{part}_{name}"]) for name in ("w", "copy", "scales", "bias")]
        self.nodes.append(ir.node("NestedLinear", [x, *weights], domain=DOMAIN, name=part))
        return self.nodes[-1].outputs[0]

    def constant(self, array):
        name = f"constant_{len(self.constants)}"
        self.constants.append(ir.val(name, const_value=ir.tensor(np.asarray(array), name=name)))
        return self.constants[-1]


def model_of(spec, *, leak=False):
    g, data = Nodes(), dense_mlp_inputs((1, HIDDEN, NEURONS), spec.gated)
    x, y = (ir.val(name, dtype=ir.DataType.FLOAT, shape=["n", HIDDEN]) for name in ("x", "y"))
    up = g.linear(x, "up", data)
    down = g.linear(mlp_activation(g, spec, up), "down", data)
    g.nodes.append(ir.node("Add", [down, g.op("ReduceMax", up, keepdims=0) if leak else x], outputs=[y]))
    opsets = {"": OPSET, DOMAIN: VERSION}
    return ir.Model(ir.Graph([x], [y], nodes=g.nodes, initializers=g.constants, opset_imports=opsets), ir_version=11)


@pytest.fixture
def spec(llama):
    return replace(llama[0], hidden_size=HIDDEN, intermediate_size=NEURONS)


@built
@pytest.mark.parametrize(
    ("activation", "gated"),
    [(name, gated) for name in ACTIVATIONS for gated in (True, False) if gated or name != "drelu"],
)
def test_the_result_stays_the_same(spec, activation, gated):
    spec = replace(spec, activation=activation, activation_threshold=0.1 * (activation == "fatrelu"), gated=gated)
    model, x = model_of(spec), np.random.default_rng(0).standard_normal((3, HIDDEN)).astype(np.float32)
    wanted = outputs(model, x)
    assert FuseDenseMlp(spec)(model).modified
    assert [node.op_type for node in model.graph] == ["DenseMLP", "Add"]
    np.testing.assert_allclose(outputs(model, x), wanted, rtol=0, atol=0.02 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("changes", "leak"),
    [
        ({"activation": "relu"}, False),  # as in the network of a predictor
        ({"intermediate_size": NEURONS + 1}, False),
        ({"hidden_size": HIDDEN + 1}, False),
        ({"gated": False}, False),
        ({}, True),
    ],
    ids=str,
)
def test_other_pairs_stay(spec, changes, leak):
    model = model_of(spec, leak=leak)
    assert not FuseDenseMlp(replace(spec, **changes))(model).modified


def test_the_network_of_a_predictor_stays(bundle, monkeypatch):
    """Its activation is that of the model."""
    monkeypatch.setattr(native_ops, "linear_pays", lambda: True)
    folder = bundle("llama-relu", kind="layerwise", rest="shadow", weight_dtype="int8")
    graph = for_cpu([ir.load(folder / f"{BODY}.onnx")], read_manifest(folder), native=True)
    types = [node.op_type for node in onnx.ModelProto.FromString(graph.model).graph.node]
    assert "NestedLinear" in types
    assert "DenseMLP" not in types
