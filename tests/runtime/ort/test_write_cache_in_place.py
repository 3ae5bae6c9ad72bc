"""The pass that takes the outputs of the cache from native ops."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from shadowllm.bundle.manifest import BODY, BODY_ALL_HEADS, read_manifest
from shadowllm.plugins import native_ops
from shadowllm.runtime.ort import graph as graphs
from shadowllm.runtime.ort.session import OrtSession
from shadowllm.runtime.ort.write_cache_in_place import WRITERS, WriteCacheInPlace
from tests.plugins.native_model import built

pytestmark = built
INT8 = {"kind": "quantized-shadow", "rest": "shadow", "weight_dtype": "int8"}


def graph_of(folder, piece, **options):
    found = graphs.for_cpu([ir.load(folder / f"{piece}.onnx")], read_manifest(folder), **{"native": True, **options})
    return onnx.ModelProto.FromString(found.model).graph


def caches_of(values):
    return [value.name for value in values if value.name.startswith(("present.", "past_key_values."))]


@pytest.mark.parametrize(
    ("variant", "options", "op"),
    [("opt", INT8, "CachedAttention"), ("llama-gqa", INT8, "DecoderLayer")],
)
def test_the_cache_is_no_output(bundle, monkeypatch, variant, options, op):
    monkeypatch.setattr(native_ops, "linear_pays", lambda: True)  # on every CPU
    folder = bundle(variant, **options)
    graph = graph_of(folder, BODY_ALL_HEADS)
    assert op in {node.op_type for node in graph.node}
    assert not caches_of(graph.output)
    assert caches_of(graph.input)
    for node in graph.node:
        if node.op_type in WRITERS:
            assert not any(node.output[1:3])


def test_other_ops_keep_their_outputs(bundle):
    folder = bundle("llama-gqa", **INT8)
    spec = read_manifest(folder).spec
    prompts = graph_of(folder, "dense", prompts=True)
    assert len(caches_of(prompts.output)) == 2 * spec.n_layers
    body = graph_of(folder, BODY)
    chosen = [node for node in body.node if node.op_type == "SparseAttention"]
    assert chosen
    assert len(caches_of(body.output)) == 2 * len(chosen)


def test_the_logits_and_the_cache_stay_the_same(bundle, monkeypatch):
    folder = bundle("llama-gqa", **INT8)

    def run():
        with OrtSession(folder, "sparse", threads=2) as session:
            session.reset(2)
            session.prefill([[5, 17, 42, 3], [8, 1]])
            logits = [session.decode(np.array([token, token + 1])).copy() for token in (3, 90, 14)]
            return logits, {name: array.copy() for name, array in session.cache.items()}

    logits, cache = run()
    monkeypatch.setattr(WriteCacheInPlace, "call", lambda self, model: graphs.PassResult(model, modified=False))
    expected, expected_cache = run()
    np.testing.assert_array_equal(logits, expected)
    for name, array in expected_cache.items():
        np.testing.assert_array_equal(cache[name], array, err_msg=name)
