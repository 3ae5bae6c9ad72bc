"""The pass that gives the native ops the nodes around them; that the results stay the same is tested with sessions."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir
import pytest

from shadowllm.bundle.manifest import read_manifest
from shadowllm.bundle.op_domain import DOMAIN
from shadowllm.runtime.ort.graph import for_cpu

BUNDLES = {
    "float32": {},
    "opt": {"variant": "opt"},
    "biases": {"variant": "qwen2"},
    "bfloat16": {"dtype": "bfloat16"},
    "int4": {"variant": "llama-blocks", "weight_dtype": "int4"},
    "int8": {"variant": "opt-blocks", "weight_dtype": "int8"},
    "int8-copy": {"weight_dtype": "int8", "rest": "shadow", "kind": "quantized-shadow"},
    "int6": {"weight_dtype": "int6", "rest": "shadow", "kind": "quantized-shadow"},
    "copy": {"rest": "shadow", "kind": "quantized-shadow"},
}


def body(folder, native=True) -> ir.Model:
    return ir.serde.deserialize_model(_proto(for_cpu(folder / "body.onnx", read_manifest(folder), native).model))


def _proto(data: bytes):
    proto = ir.serde.onnx.ModelProto()
    proto.ParseFromString(data)
    return proto


@pytest.mark.parametrize("options", BUNDLES.values(), ids=BUNDLES)
def test_a_sparse_layer_has_two_nodes(bundle, options):
    folder = bundle(**options)
    graph, spec = body(folder).graph, read_manifest(folder).spec
    ops = Counter(node.op_type for node in graph)
    for op in ("SparseMLP", "SparseAttention"):
        assert ops[op] == spec.n_layers - 1
    assert not {"TensorScatter", "RotaryEmbedding", "Split", "Transpose"} & set(ops)
    assert ops["RMSNormalization"] + ops["LayerNormalization"] == 1  # the final one
    caches = {value.name for value in graph.outputs if value.name.startswith("present")}
    for node in graph:
        if node.op_type == "SparseAttention":
            caches -= {value.name for value in node.outputs}
            assert node.inputs[1].name.startswith("past_key_values")
    assert not caches


def test_a_norm_that_a_predictor_reads_stays(bundle):
    """Layers that choose by themselves, without the op, read the normed hidden states too."""
    folder = bundle(kind="layerwise")
    ops = Counter(node.op_type for node in body(folder).graph)
    assert ops["RMSNormalization"] == 1 + 2 * (read_manifest(folder).spec.n_layers - 1)
    assert "TensorScatter" not in ops


def test_blocks_of_other_models_keep_their_nodes(bundle):
    """The norms of OPT-350m stand after the sums."""
    ops = Counter(node.op_type for node in body(bundle("opt-350m")).graph)
    assert ops["LayerNormalization"] > 1
    assert ops["Add"] > 1
    assert "TensorScatter" not in ops


def test_without_the_native_ops_nothing_changes(bundle):
    ops = Counter(node.op_type for node in body(bundle(), native=False).graph if node.domain != DOMAIN)
    assert ops["TensorScatter"] == 4
    assert ops["RMSNormalization"] == 5
