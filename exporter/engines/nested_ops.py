"""Puts our ops in place of those of ONNX Runtime that read nested integers, because TensorRT lacks the latter."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from shadowllm.bundle.op_domain import DOMAIN, VERSION
from shadowllm.bundle.quantised_tensors import INSTEAD_OF_PLAIN_INTEGERS
from shadowllm.bundle.weight_names import base
from shadowllm.errors import UserError
from shadowllm.exporter.graphs.nested_pairs import linear_inputs, nested_pairs
from shadowllm.plugins.function_body import MICROSOFT
from shadowllm.plugins.ops.nested_gather.schema import NESTED_GATHER
from shadowllm.plugins.ops.nested_linear.schema import NESTED_LINEAR


def use_nested_ops(model: ir.Model) -> None:
    """Replace each pair of ``MatMulNBits`` or ``GatherBlockQuantized`` by one ``NestedLinear`` or ``NestedGather``.

    The new nodes read the weights as they are stored. Their outputs are named after the matrix, and have types and
    shapes.

    Raises:
        UserError: the graph has other nodes of ONNX Runtime's own domain, as for integers in one part.
    """
    graph = model.graph
    linear, gather = (nested_pairs(graph, op_type) for op_type in ("MatMulNBits", "GatherBlockQuantized"))
    for copy, residual, add in linear:
        _replace(graph, add, _linear(copy, residual))
    for copy, residual, add in gather:
        _replace(graph, add, *_gather(copy, residual))
    if linear or gather:
        graph.opset_imports[DOMAIN] = VERSION
        RemoveUnusedNodesPass()(model)
    if foreign := [node for node in graph if node.domain == MICROSOFT]:
        raise UserError(
            f"TensorRT has no {foreign[0].op_type}, which the graph {graph.name} has",
            INSTEAD_OF_PLAIN_INTEGERS,
        )
    graph.opset_imports.pop(MICROSOFT, None)


def carry_rows(graph: ir.Graph) -> bool:
    """Give products the number of rows of their inputs, which ONNX's shape inference does not; whether one was new."""
    changed = False
    for node in graph:
        if node.op_type == NESTED_LINEAR.name:
            (x, *_), (y,) = node.inputs, node.outputs
            if x is not None and x.shape and y.shape and isinstance(x.shape[0], int) and x.shape[0] != y.shape[0]:
                y.shape = ir.Shape([x.shape[0], y.shape[1]])
                changed = True
    return changed


def _linear(copy: ir.Node, residual: ir.Node) -> ir.Node:
    inputs = linear_inputs(copy, residual)
    x = inputs[0]
    assert x is not None
    rows = None if x.shape is None else x.shape[0]
    x.dtype, x.shape = ir.DataType.FLOAT, ir.Shape([rows, copy.attributes["K"].as_int()])
    node = ir.node(NESTED_LINEAR.name, inputs, domain=DOMAIN)
    _declare(node, _matrix(residual.inputs[1]), copy.attributes["N"].as_int())
    return node


def _gather(copy: ir.Node, residual: ir.Node) -> tuple[ir.Node, ir.Node]:
    """The node, and one before it that makes the numbers of the rows int32."""
    data, ids, scales = copy.inputs
    low = residual.inputs[0]
    assert scales is not None
    assert scales.shape is not None
    width = scales.shape.numpy()[1] * copy.attributes["block_size"].as_int()
    cast = ir.node("Cast", [ids], {"to": ir.DataType.INT32})
    cast.outputs[0].dtype, cast.outputs[0].shape = ir.DataType.INT32, ir.Shape([None])
    node = ir.node(NESTED_GATHER.name, [cast.outputs[0], low, data, scales], {"width": width}, domain=DOMAIN)
    _declare(node, f"{_matrix(low)}.rows", width)
    return cast, node


def _declare(node: ir.Node, name: str, width: int) -> None:
    """Name the output, and set its type and shape, because nothing infers them."""
    (y,) = node.outputs
    y.name, y.dtype, y.shape = name, ir.DataType.FLOAT, ir.Shape([None, width])


def _replace(graph: ir.Graph, add: ir.Node, *nodes: ir.Node) -> None:
    graph.insert_before(add, nodes)
    add.outputs[0].replace_all_uses_with(nodes[-1].outputs[0])


def _matrix(residual: ir.Value | None) -> str:
    """The name of a matrix, or the names of stacked ones, from that of its residual; see `GraphBuilder.weight`."""
    assert residual is not None
    stored = str(residual.name).partition("[")[0].split("+")
    return "+".join(base(name).removesuffix(".weight") for name in stored)
