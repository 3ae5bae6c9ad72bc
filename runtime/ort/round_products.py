"""Graph pass: rounds the matrices that every token reads to 8 bits, and multiplies with integers.

With mixed precision per token, most of a layer is read from a 4-bit copy. Then a large part of the time goes to the
matrices that every token reads at full precision: K, V, the dense layers, and the attention if all heads are active. At
8 bits they take a quarter of it, and this rounding changes far less than the copy does.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import PassResult
from onnx_ir.passes.common import RemoveUnusedNodesPass

from shadowllm.bundle.op_domain import DOMAIN, VERSION
from shadowllm.bundle.quantisation import ACCURACY_LEVEL, joined, quantise_nested
from shadowllm.bundle.quantisation import ROUNDED as FORMAT
from shadowllm.plugins.function_body import MICROSOFT
from shadowllm.plugins.ops.nested_linear.schema import NESTED_LINEAR
from shadowllm.runtime.ort.computed_weights import ComputesWeights, taken


class RoundProducts(ComputesWeights):
    """Replaces every ``Gemm`` with a float matrix of a layer by a product with integers.

    Ensures: the same inputs and outputs under the same names. Our ops keep their rows, and predictors their networks.

    Args:
        native: whether it is a ``NestedLinear`` of the native library, else a ``MatMulNBits``.
    """

    def __init__(self, native: bool) -> None:
        super().__init__()
        self._native = native

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the model in place."""
        graph = model.graph
        products = [(node, matrix) for node in graph if (matrix := _matrix(node)) is not None]
        for node, matrix in products:
            bias = node.inputs[2] if len(node.inputs) > 2 else None
            product = (self._nested_linear if self._native else self._mat_mul)(graph, node.inputs[0], matrix, bias)
            graph.insert_before(node, product)
            node.outputs[0].replace_all_uses_with(product.outputs[0], replace_graph_outputs=True)
        if products:
            graph.opset_imports.update({DOMAIN: VERSION} if self._native else {MICROSOFT: 1})
            RemoveUnusedNodesPass()(model)
        return PassResult(model, modified=bool(products))

    def _nested_linear(self, graph: ir.Graph, x: ir.Value | None, matrix: _Matrix, bias: ir.Value | None) -> ir.Node:
        rounded, blocks = _Rounded(matrix, joins=not self._native), (matrix.rows, FORMAT.blocks(matrix.width))
        copy = self._part(graph, rounded, "copy", (*blocks, FORMAT.copy.bytes(FORMAT.block)))
        residual = self._part(graph, rounded, "residual", (matrix.rows, FORMAT.residual.bytes(matrix.width)))
        scales = self._part(graph, rounded, "scales", blocks)
        return ir.node(NESTED_LINEAR.name, [x, residual, copy, scales, *([bias] if bias else [])], domain=DOMAIN)

    def _mat_mul(self, graph: ir.Graph, x: ir.Value | None, matrix: _Matrix, bias: ir.Value | None) -> ir.Node:
        rounded, blocks = _Rounded(matrix, joins=not self._native), (matrix.rows, FORMAT.blocks(matrix.width))
        integers = self._part(graph, rounded, "integers", (*blocks, FORMAT.block))
        inputs = [x, integers, self._part(graph, rounded, "steps", blocks), *([None, None, bias] if bias else [])]
        sizes = {"K": matrix.width, "N": matrix.rows, "bits": FORMAT.bits, "block_size": FORMAT.block}
        return ir.node("MatMulNBits", inputs, {**sizes, "accuracy_level": ACCURACY_LEVEL}, domain=MICROSOFT)

    def _part(self, graph: ir.Graph, rounded: _Rounded, part: str, shape: tuple[int, ...]) -> ir.Value:
        """A new initializer: integers, or scales if the name of the part says so."""
        dtype = ir.DataType.FLOAT if part in ("scales", "steps") else ir.DataType.UINT8
        stored = rounded.matrix.tensor
        name = f"{stored.name}.rounded.product.{part}"  # `RoundRows` may round the same matrix the other way round
        return self.initializer(graph, name, stored, dtype, shape, partial(rounded.part, part, shape))


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
    """A matrix as nested integers, computed when a part is first asked for. Each part is given away once.

    Args:
        joins: whether the parts are the "integers" and the "steps" between them, else "copy", "scales" and "residual".
    """

    def __init__(self, matrix: _Matrix, joins: bool) -> None:
        self.matrix, self._joins = matrix, joins
        self._parts: dict[str, np.ndarray] = {}

    def part(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """One of the parts, in this shape."""
        self._parts = self._parts or self._compute()
        return self._parts.pop(name).reshape(shape)

    def _compute(self) -> dict[str, np.ndarray]:
        copy, scales, residual = quantise_nested(self.matrix.values(), FORMAT)
        if self._joins:
            return {"integers": joined(copy, residual, FORMAT), "steps": scales * np.float32(FORMAT.residual_step)}
        return {"copy": copy, "scales": scales, "residual": residual}


def _matrix(node: ir.Node) -> _Matrix | None:
    """The matrix of a layer that a node multiplies by; None if there is none."""
    value = node.inputs[1] if node.op_type == "Gemm" else None
    tensor = value.const_value if value is not None else None
    if not isinstance(tensor, ir.ExternalTensor) or not str(tensor.name).startswith("layers."):
        return None
    return _Matrix(tensor, inputs_first=not node.attributes["transB"].as_int())
