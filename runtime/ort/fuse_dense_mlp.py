"""Graph pass: makes the MLP of a dense layer one op, ``DenseMLP`` of the native library."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import RemoveUnusedNodesPass

from shadowllm.bundle.op_domain import DOMAIN
from shadowllm.models.spec import ModelSpec
from shadowllm.plugins.activation_nodes import activate, times_up
from shadowllm.plugins.ops.dense_mlp.schema import DENSE_MLP
from shadowllm.plugins.ops.nested_linear.schema import NESTED_LINEAR

MOST_BETWEEN = 8  # nodes between up and down


class FuseDenseMlp(InPlacePass):
    """Replaces every dense MLP whose linear layers are ``NestedLinear`` by ``DenseMLP``.

    Other pairs of linear layers, as those of a predictor's network, stay.

    Requires: if the nodes between two linear layers of these sizes have the types that `mlp_activation` of the exporter
    writes, it wrote them.
    Ensures: the same inputs and outputs under the same names.

    Args:
        spec: spec of the model.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._attributes = {
            "activation": spec.activation,
            "threshold": spec.activation_threshold,
            "gated": int(spec.gated),
        }
        self._nodes = _nodes_between(spec)
        self._rows = [spec.intermediate_size * (1 + spec.gated), spec.hidden_size]

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the model in place."""
        found = [mlp for mlp in _pairs(model.graph) if mlp.nodes == self._nodes and mlp.rows == self._rows]
        for mlp in found:
            inputs = [*_inputs(mlp.up), None, *_inputs(mlp.down)[1:]]
            node = ir.node(DENSE_MLP.name, inputs, self._attributes, domain=DOMAIN, name=mlp.down.name)
            model.graph.insert_before(mlp.down, node)
            mlp.down.outputs[0].replace_all_uses_with(node.outputs[0], replace_graph_outputs=True)
        if found:
            RemoveUnusedNodesPass()(model)
        return PassResult(model, modified=bool(found))


class _Recorder:
    """Counts the nodes that the exporter writes for an activation, by their type."""

    def __init__(self) -> None:
        self.nodes: Counter[str] = Counter()

    def op(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """Count a node."""
        self.nodes[op_type] += 1
        return ir.val(None)

    def number(self, value: float) -> ir.Value:
        """A constant, which is no node."""
        return ir.val(None)


def _nodes_between(spec: ModelSpec) -> Counter[str]:
    """The nodes between up and down, as `exporter.graphs.nodes.mlp_activation` writes them."""
    recorder, x = _Recorder(), ir.val(None)
    active = activate(recorder, spec.activation, spec.activation_threshold, x)
    if spec.gated:
        recorder.op("Split", x)
        times_up(recorder, spec.activation, active, x)
    return recorder.nodes


@dataclass(frozen=True)
class _Pair:
    """Two linear layers, and the types of the nodes between them, which have no other inputs."""

    up: ir.Node
    down: ir.Node
    nodes: Counter[str]

    @property
    def rows(self) -> list[object]:
        """Of their weights."""
        shapes = [node.inputs[2].shape if node.inputs[2] is not None else None for node in (self.up, self.down)]
        return [shape[0] if shape else None for shape in shapes]


def _pairs(graph: ir.Graph) -> Iterator[_Pair]:
    for down in graph:
        if (down.domain, down.op_type) == (DOMAIN, NESTED_LINEAR.name) and (pair := _pair(down)):
            yield pair


def _pair(down: ir.Node) -> _Pair | None:
    """Follow the inputs of a linear layer back to another one; None if there is none, or if other values come in."""
    between: set[ir.Node] = set()
    ups: set[ir.Node] = set()
    values = [down.inputs[0]]
    while values and len(between) <= MOST_BETWEEN:
        value = values.pop()
        if value is None or value.is_initializer():
            continue
        node = value.producer()
        if node is None:
            return None
        if node.op_type == NESTED_LINEAR.name:
            ups.add(node)
        elif node not in between:
            between.add(node)
            values += node.inputs
    if values or len(ups) != 1:
        return None
    (up,) = ups
    inside = [up.outputs[0], *(value for node in between for value in node.outputs)]
    users = {user for value in inside for user in value.consumers()}
    if not users <= between | {down} or any(value.is_graph_output() for value in inside):
        return None
    return _Pair(up, down, Counter(node.op_type for node in between))


def _inputs(linear: ir.Node) -> list[ir.Value | None]:
    absent = [None] * (len(NESTED_LINEAR.inputs) - len(linear.inputs))
    return [*linear.inputs, *absent]
