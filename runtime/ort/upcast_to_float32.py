"""Graph pass: computes a 16-bit graph in float32, because ONNX Runtime's CPU kernels have no 16-bit arithmetic."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from shadowllm.bundle.op_domain import DOMAIN
from shadowllm.plugins.ops.nested_linear.schema import NESTED_LINEAR

HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class UpcastToFloat32(InPlacePass):
    """Changes a graph to float32 activations, inputs and outputs; weights stay 16-bit on disk.

    Every 16-bit initializer gets a ``Cast``, which ONNX Runtime folds when it loads the graph. A table of which single
    rows are gathered stays 16-bit, and the rows get a ``Cast``. Every cast to 16 bits becomes a cast to float32.

    Args:
        keep_rows: whether the weights of the sparse ops stay 16-bit, because the native ops read 16-bit rows.
    """

    def __init__(self, keep_rows: bool) -> None:
        self._keep_rows = keep_rows

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the model in place."""
        graph = model.graph
        for node in list(graph):
            if node.op_type == "Cast" and ir.DataType(node.attributes["to"].as_int()) in HALF:
                node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
        halves = [value for value in graph.initializers.values() if value.dtype in HALF]
        inner = [value for node in graph for value in node.outputs]
        for value in (*graph.inputs, *graph.outputs, *inner):
            if value.dtype in HALF:
                value.dtype = ir.DataType.FLOAT
        for value in halves:
            self._cast(graph, value)
        return PassResult(model, modified=bool(halves))

    def _cast(self, graph: ir.Graph, value: ir.Value) -> None:
        users = [use for use in value.uses() if not (self._keep_rows and _reads_rows(use.node))]
        gathers = [use.node for use in users if use.node.op_type == "Gather" and use.idx == 0]
        for gather in gathers:
            _cast_rows(graph, gather, value)
        others = [use for use in users if use.node not in gathers]
        if not others:
            return
        cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT})
        for user, index in others:
            user.replace_input_with(index, cast.outputs[0])
        graph.insert_before(graph[0], cast)


def _cast_rows(graph: ir.Graph, gather: ir.Node, table: ir.Value) -> None:
    assert table.dtype is not None
    rows = gather.outputs[0]
    cast = ir.node("Cast", [rows], {"to": ir.DataType.FLOAT})
    cast.outputs[0].type, cast.outputs[0].shape = rows.type, rows.shape
    rows.replace_all_uses_with(cast.outputs[0], replace_graph_outputs=True)
    cast.replace_input_with(0, rows)
    rows.dtype = table.dtype
    graph.insert_after(gather, cast)


def _reads_rows(node: ir.Node) -> bool:
    """Whether it is a sparse op. The only float weight of a ``NestedLinear`` is its bias."""
    return node.domain == DOMAIN and node.op_type != NESTED_LINEAR.name
