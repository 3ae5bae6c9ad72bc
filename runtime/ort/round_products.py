"""Graph pass: rounds the matrices that every token reads to 8 bits, and multiplies with integers.

With mixed precision per token, most of a layer is read from a 4-bit copy. Then a large part of the time goes to the
matrices that every token reads at full precision: K, V, the dense layers, and the attention if all heads are active. At
8 bits they take a quarter of it, and this rounding changes far less than the copy does.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import PassResult
from onnx_ir.passes.common import RemoveUnusedNodesPass

from shadowllm.bundle.quantisation import ACCURACY_LEVEL, quantise
from shadowllm.bundle.quantisation import ROUNDED_PRODUCTS as FORMAT
from shadowllm.plugins.function_body import MICROSOFT
from shadowllm.runtime.ort.computed_weights import ComputesWeights, taken


class RoundProducts(ComputesWeights):
    """Replaces every ``Gemm`` with a float matrix of a layer by a ``MatMulNBits``.

    Ensures: the same inputs and outputs under the same names. Our ops keep their rows, and predictors their networks.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the model in place."""
        graph = model.graph
        products = [(node, matrix) for node in graph if (matrix := _matrix(node)) is not None]
        for node, matrix in products:
            integers, scales = self._initializers(graph, _Rounded(matrix))
            inputs = [node.inputs[0], integers, scales]
            if len(node.inputs) > 2:
                inputs += [None, None, node.inputs[2]]
            sizes = {"K": matrix.width, "N": matrix.rows, "bits": FORMAT.bits, "block_size": FORMAT.block}
            attributes = {**sizes, "accuracy_level": ACCURACY_LEVEL}
            product = ir.node("MatMulNBits", inputs, attributes, domain=MICROSOFT)
            graph.insert_before(node, product)
            node.outputs[0].replace_all_uses_with(product.outputs[0], replace_graph_outputs=True)
        if products:
            graph.opset_imports[MICROSOFT] = 1
            RemoveUnusedNodesPass()(model)
        return PassResult(model, modified=bool(products))

    def _initializers(self, graph: ir.Graph, rounded: _Rounded) -> list[ir.Value]:
        """New initializers for integers and scales."""
        stored, blocks = rounded.matrix.tensor, (rounded.matrix.rows, FORMAT.blocks(rounded.matrix.width))
        names = [f"{stored.name}.rounded.{part}" for part in ("integers", "scales")]
        shape = (*blocks, FORMAT.block)
        return [
            self.initializer(graph, names[0], stored, ir.DataType.UINT8, shape, rounded.integers),
            self.initializer(graph, names[1], stored, ir.DataType.FLOAT, blocks, rounded.scales),
        ]


class _Matrix:
    """The matrix of a ``Gemm``, with a row for each output.

    Args:
        tensor: in the weight file, ``(rows, width)``, or ``(width, rows)`` if ``inputs_first``.
    """

    def __init__(self, tensor: ir.ExternalTensor, inputs_first: bool) -> None:
        self.tensor, self._inputs_first = tensor, inputs_first
        self.rows, self.width = tensor.shape.numpy()[::-1] if inputs_first else tensor.shape.numpy()

    def values(self) -> np.ndarray:
        """A copy of the data, float32 ``(rows, width)``."""
        values = taken(self.tensor).astype(np.float32, copy=False)
        return np.ascontiguousarray(values.T) if self._inputs_first else values


class _Rounded:
    """A matrix as integers and scales, computed when they are first asked for; only the scales are kept."""

    def __init__(self, matrix: _Matrix) -> None:
        self.matrix = matrix
        self._scales: np.ndarray | None = None

    def integers(self) -> np.ndarray:
        """Return uint8 ``(rows, blocks, block)``."""
        integers, self._scales = quantise(self.matrix.values(), FORMAT)
        return integers.reshape(self.matrix.rows, -1, FORMAT.block)

    def scales(self) -> np.ndarray:
        """Return float32 ``(rows, blocks)``."""
        if self._scales is None:
            self.integers()
        assert self._scales is not None
        return self._scales


def _matrix(node: ir.Node) -> _Matrix | None:
    """The matrix of a layer that a node multiplies by; None if there is none."""
    value = node.inputs[1] if node.op_type == "Gemm" else None
    tensor = value.const_value if value is not None else None
    if not isinstance(tensor, ir.ExternalTensor) or not str(tensor.name).startswith("layers."):
        return None
    return _Matrix(tensor, inputs_first=not node.attributes["transB"].as_int())
