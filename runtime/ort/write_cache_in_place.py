"""Graph pass: ops of the native library write a step's keys and values into the inputs of the cache.

A session binds every output ``present.*`` to the memory of its input, so the output is not needed. But at each run
ONNX Runtime compares all weights of a graph with all its outputs, and looks the name of each output up.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from shadowllm.bundle.op_domain import DOMAIN
from shadowllm.plugins.ops.cached_attention.schema import CACHED_ATTENTION
from shadowllm.plugins.ops.decoder_layer.schema import DECODER_LAYER
from shadowllm.plugins.ops.dense_decoder_layer.schema import DENSE_DECODER_LAYER

WRITERS = frozenset({CACHED_ATTENTION.name, DECODER_LAYER.name, DENSE_DECODER_LAYER.name})


class WriteCacheInPlace(InPlacePass):
    """Removes the outputs ``key`` and ``value`` of the native ops, and of the graph.

    Requires: no other node reads the inputs of the cache, and the session binds them to memory that can be written.
    Ensures: the inputs and the other outputs are the same.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the model in place."""
        graph = model.graph
        caches = [
            cache
            for node in graph
            if node.domain == DOMAIN and node.op_type in WRITERS
            for cache in node.outputs[1:3]
            if cache.is_graph_output() and not cache.uses()
        ]
        graph.outputs[:] = [value for value in graph.outputs if value not in caches]
        for cache in caches:
            cache.name = ""
        return PassResult(model, modified=bool(caches))
