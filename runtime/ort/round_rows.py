"""Graph pass: rounds the rows that our ops read beside their low-bit copy to 8 bits.

The copy has the first 4 bits. The active rows then need only a residual of 4 bits, as with integer weights, which is an
eighth of a float32 row. This matters most for a batch, whose sequences together read about half of all rows.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import PassResult

from shadowllm.bundle.op_domain import DOMAIN
from shadowllm.bundle.quantisation import ROUNDED as FORMAT
from shadowllm.bundle.quantisation import residual_of
from shadowllm.plugins.ops.sparse_attention.schema import PARTS as ATTENTION_PARTS
from shadowllm.plugins.ops.sparse_attention.schema import SPARSE_ATTENTION
from shadowllm.plugins.ops.sparse_mlp.schema import PARTS as MLP_PARTS
from shadowllm.plugins.ops.sparse_mlp.schema import SPARSE_MLP
from shadowllm.runtime.ort.computed_weights import ComputesWeights, taken

_OPS = {SPARSE_MLP.name: (SPARSE_MLP, MLP_PARTS), SPARSE_ATTENTION.name: (SPARSE_ATTENTION, ATTENTION_PARTS)}


class RoundRows(ComputesWeights):
    """Replaces the float rows of every ``SparseMLP`` and ``SparseAttention`` that has a low-bit copy by its residuals.

    Ensures: the same inputs and outputs under the same names.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the model in place."""
        nodes = [node for node in model.graph if node.domain == DOMAIN and node.op_type in _OPS]
        rounded = [self._round(model.graph, node) for node in nodes]
        return PassResult(model, modified=any(rounded))

    def _round(self, graph: ir.Graph, node: ir.Node) -> bool:
        schema, parts = _OPS[node.op_type]
        places = {port.name: place for place, port in enumerate(schema.inputs)}
        found = False
        for part in parts:
            ports = [places[f"{kind}_{part}"] for kind in ("w", "c", "cs")]
            stored = [_stored(node, place) for place in ports]
            if any(tensor is None for tensor in stored):
                continue
            whole, copy, scales = (tensor for tensor in stored if tensor is not None)
            node.replace_input_with(ports[0], self._residual(graph, whole, copy, scales))
            found = True
        return found

    def _residual(
        self, graph: ir.Graph, whole: ir.ExternalTensor, copy: ir.ExternalTensor, scales: ir.ExternalTensor
    ) -> ir.Value:
        rows, width = whole.shape.numpy()

        def compute() -> np.ndarray:
            return residual_of(taken(whole).astype(np.float32, copy=False), taken(copy), taken(scales), FORMAT)

        shape = (rows, FORMAT.residual.bytes(width))
        return self.initializer(graph, f"{whole.name}.rounded.residual", whole, ir.DataType.UINT8, shape, compute)


def _stored(node: ir.Node, place: int) -> ir.ExternalTensor | None:
    """The tensor of the weight file that is an input of a node; None if there is none."""
    value = node.inputs[place] if place < len(node.inputs) else None
    tensor = value.const_value if value is not None else None
    return tensor if isinstance(tensor, ir.ExternalTensor) else None
