"""The pass that makes each layer one op."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from shadowllm.bundle.manifest import BODY, BODY_ALL_HEADS, read_manifest
from shadowllm.models.sparsity import Budget
from shadowllm.plugins import native_ops
from shadowllm.runtime.ort import graph as graphs
from shadowllm.runtime.ort.fuse_layers import FuseLayers
from shadowllm.runtime.ort.session import OrtSession
from tests.plugins.native_model import built

pytestmark = built
PROMPTS = [[5, 17, 42, 3], [8, 1]]


@pytest.fixture(autouse=True)
def native_linear(monkeypatch):
    """On every CPU, because only layers of native ops are fused."""
    monkeypatch.setattr(native_ops, "linear_pays", lambda: True)


def count_layers(folder, piece=BODY_ALL_HEADS, rounded=True):
    graph = graphs.for_cpu([ir.load(folder / f"{piece}.onnx")], read_manifest(folder), native=True, rounded=rounded)
    return sum(node.op_type == "DecoderLayer" for node in onnx.ModelProto.FromString(graph.model).graph.node)


def logits_of(folder, budget):
    with OrtSession(folder, "sparse", exact=True, threads=2) as session:
        session.set_budget(budget)
        session.reset(len(PROMPTS))
        session.prefill(PROMPTS)
        found = [session.decode(np.array([token, token + 1])).copy() for token in (3, 90, 14)]
        return np.stack(found), session.selection["neurons"].copy()


@pytest.mark.parametrize("variant", ["llama-gqa", "llama-biases", "llama-blocks"])
@pytest.mark.parametrize("neurons", [0.3, 1.0])
def test_the_results_stay_the_same(bundle, monkeypatch, variant, neurons):
    folder = bundle(variant, kind="quantized-shadow", rest="shadow", weight_dtype="int8")
    layers = read_manifest(folder).sparse_layers.count
    assert count_layers(folder, rounded=False) == layers
    budget = Budget(neurons=neurons, shortlist=9)
    logits, neurons_of = logits_of(folder, budget)
    monkeypatch.setattr(FuseLayers, "call", lambda self, model: graphs.PassResult(model, modified=False))
    assert count_layers(folder, rounded=False) == 0
    expected, expected_neurons = logits_of(folder, budget)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_array_equal(neurons_of, expected_neurons)


@pytest.mark.parametrize(
    ("variant", "piece", "rounded", "fused"),
    [
        ("llama-gqa", BODY_ALL_HEADS, True, True),
        ("llama-gqa", BODY_ALL_HEADS, False, False),  # linear layers of floats
        ("llama-gqa", BODY, True, False),  # chosen heads
        ("opt", BODY_ALL_HEADS, True, False),  # LayerNormalization
        ("llama-head-dim-16", BODY_ALL_HEADS, True, True),
    ],
)
def test_only_layers_of_native_parts_are_fused(bundle, variant, piece, rounded, fused):
    folder = bundle(variant, kind="quantized-shadow", rest="shadow")
    assert count_layers(folder, piece, rounded) == (read_manifest(folder).sparse_layers.count if fused else 0)
