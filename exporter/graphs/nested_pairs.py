"""Finds the two nodes that read a matrix of nested integers, as `nodes.add_residual` joins them."""

from __future__ import annotations

import onnx_ir as ir


def nested_pairs(graph: ir.Graph, op_type: str) -> list[tuple[ir.Node, ir.Node, ir.Node]]:
    """The node that reads a copy, that which reads its residual, and the node that adds their results.

    Args:
        op_type: type of the first two: ``MatMulNBits`` or ``GatherBlockQuantized``.
    """
    found = []
    for add in (node for node in graph if node.op_type == "Add"):
        copy, scaled = (producer(value, kind) for value, kind in zip(add.inputs, (op_type, "Mul"), strict=True))
        residual = producer(scaled.inputs[0], op_type) if copy and scaled else None
        if copy and residual:
            found.append((copy, residual, add))
    return found


def linear_inputs(copy: ir.Node, residual: ir.Node) -> list[ir.Value | None]:
    """The inputs of the ``NestedLinear`` that multiplies as a pair of ``MatMulNBits`` does."""
    x, data, scales, *more = copy.inputs
    return [x, residual.inputs[1], data, scales, *more[2:3]]


def producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that computes a value, if it has this type."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None
