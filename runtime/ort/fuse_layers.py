"""Graph pass: makes each layer one op of the native library, ``DecoderLayer`` or ``DenseDecoderLayer``.

At one token, the parts of a small layer take as long as ONNX Runtime needs to go from one node to the next. In one op
they also share a team of threads, which does not stop between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import RemoveUnusedNodesPass

from shadowllm.bundle.op_domain import DOMAIN
from shadowllm.exporter.graphs.nested_pairs import producer
from shadowllm.plugins.ops.cached_attention.schema import CACHED_ATTENTION
from shadowllm.plugins.ops.decoder_layer.schema import DECODER_LAYER, stages
from shadowllm.plugins.ops.dense_decoder_layer.schema import DENSE_DECODER_LAYER
from shadowllm.plugins.ops.dense_mlp.schema import DENSE_MLP
from shadowllm.plugins.ops.nested_linear.schema import NESTED_LINEAR
from shadowllm.plugins.ops.sparse_mlp.schema import SPARSE_MLP

NORM = "RMSNormalization"
LAYERS = {
    mlp.name: (layer, stages(mlp)) for mlp, layer in ((SPARSE_MLP, DECODER_LAYER), (DENSE_MLP, DENSE_DECODER_LAYER))
}


class FuseLayers(InPlacePass):
    """Replaces every layer of a Llama-like model whose parts are native ops by one op.

    A layer with other parts stays as it is: with chosen heads, other norms, or linear layers of another type.

    Requires: hidden states have the form ``(tokens, hidden_size)``. Ensures: the same inputs and outputs under the same
    names.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the model in place."""
        found = list(_layers(model.graph))
        for layer in found:
            layer.fuse(model.graph)
        if found:
            RemoveUnusedNodesPass()(model)
        return PassResult(model, modified=bool(found))


@dataclass(frozen=True)
class _Layer:
    norm: ir.Node
    qkv: ir.Node
    attention: ir.Node
    out: ir.Node
    post_norm: ir.Node
    mlp: ir.Node
    end: ir.Node

    def fuse(self, graph: ir.Graph) -> None:
        inputs = [*self.norm.inputs[:2], self.post_norm.inputs[1]]
        schema, parts = LAYERS[self.mlp.op_type]
        for node, (_, part) in zip((self.qkv, self.attention, self.out, self.mlp), parts, strict=True):
            absent = [None] * (len(part.inputs) - len(node.inputs))
            inputs += [None, *node.inputs[1:], *absent]
        layer = ir.node(schema.name, inputs, domain=DOMAIN, num_outputs=len(schema.outputs), name=self.mlp.name)
        for node in (self.attention, self.mlp):
            layer.attributes.update(node.attributes)
        layer.attributes["epsilon"] = ir.AttrFloat32("epsilon", _epsilon(self.norm))
        graph.insert_before(self.end, layer)
        olds = [self.end.outputs[0], *self.attention.outputs[1:], *self.mlp.outputs[1:]]
        for old, new in zip(olds, layer.outputs, strict=False):
            new.name, new.type, new.shape, old.name = old.name, old.type, old.shape, None
            old.replace_all_uses_with(new, replace_graph_outputs=True)


def _layers(graph: ir.Graph) -> Iterator[_Layer]:
    for mlp in graph:
        if mlp.domain == DOMAIN and mlp.op_type in LAYERS and (layer := _layer(mlp)):
            yield layer


def _layer(mlp: ir.Node) -> _Layer | None:
    """The layer of an MLP; None if its nodes are not those of the op."""
    post_norm, end = _only_before(mlp.inputs[0], NORM), _only_user(mlp.outputs[0], "Add")
    hidden = post_norm.inputs[0] if post_norm else None
    middle = producer(hidden, "Add")
    if not (post_norm and end and hidden and middle) or set(hidden.consumers()) != {post_norm, end}:
        return None
    out = next((node for value in middle.inputs if (node := _only_before(value, NESTED_LINEAR.name))), None)
    attention = producer(_flat(out.inputs[0]), CACHED_ATTENTION.name) if out else None
    qkv = _only_before(attention.inputs[0], NESTED_LINEAR.name) if attention else None
    norm = _only_before(qkv.inputs[0], NORM) if qkv else None
    if not (out and attention and qkv and norm) or norm.inputs[0] not in middle.inputs:
        return None
    if _epsilon(norm) != _epsilon(post_norm) or hidden not in end.inputs:
        return None
    return _Layer(norm, qkv, attention, out, post_norm, mlp, end)


def _epsilon(norm: ir.Node) -> float:
    return norm.attributes["epsilon"].as_float()


def _flat(value: ir.Value | None) -> ir.Value | None:
    """The value before a ``Reshape``, which changes nothing for ``CachedAttention``: its output is flat already."""
    reshape = _only_before(value, "Reshape")
    return reshape.inputs[0] if reshape else value


def _only_before(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node of this type that computes a value, if it has a single user and the graph does not return it."""
    node = producer(value, op_type)
    return node if node and value and len(value.uses()) == 1 and not value.is_graph_output() else None


def _only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    users = list(value.consumers())
    return users[0] if len(value.uses()) == 1 and users[0].op_type == op_type else None
