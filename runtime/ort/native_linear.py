"""Graph pass: linear layers with nested integers go to the native op ``NestedLinear``.

A bundle's graphs multiply by the copy and by the residual of a matrix with a ``MatMulNBits`` each, and add the results.
The native op reads both parts at once, as they lie in the file, and shares the work on a row of weights between the
tokens of a step. `native_ops.linear_pays` says where it is faster than what `JoinNested` makes.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import RemoveUnusedNodesPass

from shadowllm.bundle.op_domain import DOMAIN
from shadowllm.exporter.graphs.nested_pairs import linear_inputs, nested_pairs
from shadowllm.plugins.ops.nested_linear.schema import NESTED_LINEAR


class NativeLinear(InPlacePass):
    """Replaces every pair of ``MatMulNBits`` from `exporter.graphs.nodes` by one ``NestedLinear``.

    Requires: such a pair has an input ``(tokens, width)``. Ensures: the same inputs and outputs under the same names.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the model in place."""
        pairs = nested_pairs(model.graph, "MatMulNBits")
        for copy, residual, add in pairs:
            linear = ir.node(NESTED_LINEAR.name, linear_inputs(copy, residual), domain=DOMAIN, name=copy.name)
            model.graph.insert_before(add, linear)
            add.outputs[0].replace_all_uses_with(linear.outputs[0], replace_graph_outputs=True)
        if pairs:
            RemoveUnusedNodesPass()(model)
        return PassResult(model, modified=bool(pairs))
