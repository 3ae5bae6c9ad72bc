"""Graph pass: linear layers with 8-bit weights go to the native op ``LinearW8A8``.

ONNX Runtime has ``MatMulNBits`` for them. Its kernels for x86 multiply each token by itself. The native op shares the
work on a row of weights between the tokens of a step. `native_ops.linear_pays` says where it is faster.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from shadowllm.bundle.op_domain import DOMAIN
from shadowllm.plugins.ops.linear_w8a8.schema import LINEAR_W8A8

BITS, BLOCK = 8, 64  # what the op multiplies as integers


class NativeLinear(InPlacePass):
    """Replaces every ``MatMulNBits`` of 8 bits in blocks of 64 elements, without zero points, by ``LinearW8A8``.

    Requires: such a node has an input ``(tokens, width)``. Ensures: the same inputs and outputs under the same names.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the model in place."""
        found = [node for node in model.graph if node.op_type == "MatMulNBits" and _fits(node)]
        for node in found:
            x, weights, scales = node.inputs[:3]
            bias = [node.inputs[5]] if len(node.inputs) > 5 else []
            linear = ir.node(LINEAR_W8A8.name, [x, weights, scales, *bias], domain=DOMAIN, name=node.name)
            model.graph.insert_before(node, linear)
            node.outputs[0].replace_all_uses_with(linear.outputs[0], replace_graph_outputs=True)
            model.graph.remove(node, safe=True)
        return PassResult(model, modified=bool(found))


def _fits(node: ir.Node) -> bool:
    sizes = [node.attributes[name].as_int() for name in ("bits", "block_size")]
    return sizes == [BITS, BLOCK] and not any(node.inputs[3:5])
