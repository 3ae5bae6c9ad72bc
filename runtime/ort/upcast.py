"""Run a 16-bit graph where there is no 16-bit arithmetic: the same graph, computed in float32."""

from __future__ import annotations

import onnx_ir as ir

from shadowllm.bundle.op_domain import DOMAIN

HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def upcast_to_float32(model: ir.Model, keep_rows: bool) -> None:
    """Give a graph float32 activations and inputs; weights stay 16-bit on disk.

    Every 16-bit initializer is followed by a ``Cast`` that ONNX Runtime folds when it loads the
    graph, and every cast to 16 bits becomes one to float32.

    Args:
        keep_rows: leave the weights of the sparse ops as they are: the native ops read 16-bit rows.
    """
    graph = model.graph
    for node in list(graph):
        if node.op_type == "Cast" and ir.DataType(node.attributes["to"].as_int()) in HALF:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT)
    for value in list(graph.initializers.values()):
        if value.dtype in HALF:
            users = [use for use in value.uses() if not (keep_rows and use.node.domain == DOMAIN)]
            if not users:
                continue
            cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT})
            for user, index in users:
                user.replace_input_with(index, cast.outputs[0])
            graph.insert_before(graph[0], cast)
    inner = (value for node in graph for value in node.outputs)
    for value in (*graph.inputs, *graph.outputs, *inner):
        if value.dtype in HALF:
            value.dtype = ir.DataType.FLOAT
