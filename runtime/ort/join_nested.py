"""Graph pass: joins the two products of nested integers to one product of 8-bit integers.

A bundle's graphs multiply by the copy and by the residual of a matrix, and add the products. One product of 8 bits is
faster than two, and costs what it costs with plain 8-bit integers.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PreconditionError
from onnx_ir.passes.common import RemoveUnusedNodesPass

from shadowllm.bundle.quantisation import Quantisation
from shadowllm.plugins.function_body import MICROSOFT


class JoinNested(InPlacePass):
    """Replaces every pair of ``MatMulNBits`` from `exporter.graphs.nodes` by one.

    Requires: each ``MatMulNBits`` is one of a pair with the same input, sizes and scales. The pair is added, after the
    product of the residual is multiplied by a constant. Ensures: the same inputs and outputs under the same names.

    Standard nodes join the weights. ONNX Runtime computes them when it loads the graph, and frees the parts.

    Args:
        q: format of the nested integers.
    """

    def __init__(self, q: Quantisation) -> None:
        self._q = q

    def requires(self, model: ir.Model) -> None:
        """See the class.

        Raises:
            PreconditionError: names the weights of a product that has no partner.
        """
        products = {node for node in model.graph if node.op_type == "MatMulNBits"}
        for copy, residual, _ in _pairs(model):
            if any(copy.inputs[i] is not residual.inputs[i] for i in (0, 2)) or _sizes(copy) != _sizes(residual):
                raise PreconditionError(f"{_weights(copy)} and {_weights(residual)} are not of the same matrix")
            products -= {copy, residual}
        if products:
            raise PreconditionError(f"no product of a residual is added to that of {_weights(products.pop())}")

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the model in place."""
        pairs = _pairs(model)
        joiner = _Joiner(model.graph, self._q) if pairs else None
        for copy, residual, add in pairs:
            assert joiner is not None
            inputs = [copy.inputs[0], *joiner.join(copy, residual), *copy.inputs[3:]]
            product = ir.node("MatMulNBits", inputs, domain=MICROSOFT)
            product.attributes.update(copy.attributes)
            product.attributes["bits"] = ir.AttrInt64("bits", 8)
            model.graph.insert_before(add, product)
            add.outputs[0].replace_all_uses_with(product.outputs[0], replace_graph_outputs=True)
        if pairs:
            RemoveUnusedNodesPass()(model)
        return PassResult(model, modified=bool(pairs))


class _Joiner:
    """Adds the nodes that join weights, at the start of a graph."""

    def __init__(self, graph: ir.Graph, q: Quantisation) -> None:
        self._graph, self._q, self._first = graph, q, graph[0]

    def join(self, copy: ir.Node, residual: ir.Node) -> tuple[ir.Value, ir.Value]:
        """The joined integers, uint8 ``(rows, blocks, block)``, and their scales ``(rows, blocks)``."""
        q, high, low, steps = self._q, *(_given(*place) for place in ((copy, 1), (residual, 1), (copy, 2)))
        whole = self._op("BitShift", self._unpacked(high, q.copy.bits), self._byte(q.residual_bits), direction="LEFT")
        whole = self._op("BitwiseOr", whole, self._unpacked(low, q.residual_bits))
        # The parts are unsigned around a middle of their own. Modulo 256, this moves the middle of their sum to 128.
        middle = (1 << (q.bits - 1)) + (1 << (q.residual_bits - 1))
        whole = self._op("Add", whole, self._byte((128 - middle) % 256))
        step = self._constant("residual_step", np.array(q.residual_step, dtype=np.float32))
        return whole, self._op("Mul", steps, step)

    def _unpacked(self, data: ir.Value, bits: int) -> ir.Value:
        """The integers of ``(rows, blocks, bytes)``, one in a byte."""
        mask, last = self._byte((1 << bits) - 1), self._constant("last_axis", np.array([3]))
        places = []
        for place in range(0, 8, bits):
            shifted = self._op("BitShift", data, self._byte(place), direction="RIGHT")
            places.append(self._op("Unsqueeze", self._op("BitwiseAnd", shifted, mask), last))
        shape = self._constant("row_of_blocks", np.array([0, 0, -1]))
        return self._op("Reshape", self._op("Concat", *places, axis=3), shape)

    def _byte(self, value: int) -> ir.Value:
        return self._constant(f"byte_{value}", np.array(value, dtype=np.uint8))

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        name = f"join.{name}"
        if name not in self._graph.initializers:
            self._graph.register_initializer(ir.val(name, const_value=ir.tensor(array, name=name)))
        return self._graph.initializers[name]

    def _op(self, op_type: str, *inputs: ir.Value, **attributes: int | str) -> ir.Value:
        node = ir.node(op_type, list(inputs), attributes)
        self._graph.insert_before(self._first, node)
        return node.outputs[0]


def _pairs(model: ir.Model) -> list[tuple[ir.Node, ir.Node, ir.Node]]:
    """The product of the copy, that of the residual, and the node that adds them."""
    found = []
    for add in (node for node in model.graph if node.op_type == "Add"):
        copy, scaled = (_producer(value, kind) for value, kind in zip(add.inputs, ("MatMulNBits", "Mul"), strict=True))
        residual = _producer(scaled.inputs[0], "MatMulNBits") if copy and scaled else None
        if copy and residual:
            found.append((copy, residual, add))
    return found


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def _given(node: ir.Node, place: int) -> ir.Value:
    value = node.inputs[place]
    if value is None:
        raise PreconditionError(f"the product of {_weights(node)} has no input {place}")
    return value


def _weights(product: ir.Node) -> str:
    return str(product.inputs[1].name) if product.inputs[1] is not None else "nothing"


def _sizes(node: ir.Node) -> list[int]:
    return [node.attributes[name].as_int() for name in ("K", "N", "block_size")]
