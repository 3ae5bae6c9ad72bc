"""A small helper over `onnx_ir` that builds one graph node by node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from shadowllm.bundle import op_domain
from shadowllm.bundle.quantisation import LOW_BIT_COPY, Quantisation
from shadowllm.bundle.weight_file import WeightStore
from shadowllm.bundle.weight_names import integers, low_bit_copy, residual, scales
from shadowllm.exporter.graphs.initializers import initializer
from shadowllm.plugins.function_body import MICROSOFT, OPSET
from shadowllm.plugins.schema import OpSchema

IR_VERSION = 11
Dims = Sequence[int | str]


class GraphBuilder:
    """Collects nodes, initializers, inputs and outputs of one ONNX graph.

    Args:
        name: name of the graph.
        dtype: type of weights and activations.
        store: the data file that has the initializers.
        quantisation: format of integer matrices; None if they are floats.
    """

    def __init__(
        self, name: str, dtype: ir.DataType, store: WeightStore, quantisation: Quantisation | None = None
    ) -> None:
        self.name = name
        self.dtype = dtype
        self.quantisation = quantisation
        self._store = store
        self._tape = Tape()
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._constants: dict[str, ir.Value] = {}

    def input(self, name: str, shape: Dims, dtype: ir.DataType | None = None) -> ir.Value:
        """Add a graph input; ``dtype`` defaults to that of the weights."""
        value = ir.val(name, dtype=dtype or self.dtype, shape=list(shape))
        self._inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, shape: Dims, dtype: ir.DataType | None = None) -> None:
        """Name a value and make it a graph output."""
        value.name, value.shape, value.dtype = name, ir.Shape(list(shape)), dtype or self.dtype
        self._outputs.append(value)

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Add a node with one output."""
        return self._tape.op(op_type, inputs, attributes)

    def split(self, x: ir.Value, sizes: Sequence[int], axis: int) -> Sequence[ir.Value]:
        """Split ``x`` into parts of the given sizes."""
        if len(sizes) == 1:
            return (x,)
        return self._tape.op_multi_out("Split", (x, self.ints(sizes)), {"axis": axis}, num_outputs=len(sizes))

    def custom(self, schema: OpSchema, name: str, inputs: dict[str, ir.Value | None], **attributes: Any) -> ir.Value:
        """Add a named node of one of our ops and return its first output; optional inputs may be missing."""
        return self.custom_outputs(schema, name, inputs, 1, **attributes)[0]

    def custom_outputs(
        self, schema: OpSchema, name: str, inputs: dict[str, ir.Value | None], outputs: int, **attributes: Any
    ) -> Sequence[ir.Value]:
        """Add a named node of one of our ops and return its first outputs; optional inputs may be missing."""
        unknown = set(inputs) - {port.name for port in schema.inputs}
        missing = [p.name for p in schema.inputs if not p.optional and inputs.get(p.name) is None]
        if unknown or missing:
            raise ValueError(f"{schema.name}: unknown inputs {unknown}, missing inputs {missing}")
        ordered = [inputs.get(port.name) for port in schema.inputs]
        while ordered[-1] is None:
            ordered.pop()
        domain = op_domain.DOMAIN
        return self._tape.op_multi_out(schema.name, ordered, attributes, num_outputs=outputs, domain=domain, name=name)

    def copy(self, matrix: str) -> tuple[ir.Value, ir.Value]:
        """The low-bit copy of a matrix, as its integers ``(rows, blocks, bytes)`` and scales ``(rows, blocks)``."""
        factors = self.weight(scales(low_bit_copy(matrix)))
        _, blocks = map(int, factors.shape)  # type: ignore[arg-type]
        inner = (blocks, LOW_BIT_COPY.block * LOW_BIT_COPY.bits // 8)
        return self.weight(integers(low_bit_copy(matrix)), inner=inner), factors

    def rows(self, matrix: str) -> tuple[ir.Value, ir.Value | None]:
        """The rows of a matrix as our ops read them, and their scales: floats and residuals have none."""
        if self.quantisation is None:
            return self.weight(matrix), None
        if self.quantisation.residual_bits:
            return self.weight(residual(matrix)), None
        return self.weight(integers(matrix)), self.weight(scales(matrix))

    def microsoft(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Add a node of ONNX Runtime's own domain; only graphs with integer weights have such nodes."""
        return self._tape.op(op_type, inputs, attributes, domain=MICROSOFT)

    def weight(self, name: str, *rest: str, inner: tuple[int, ...] | None = None) -> ir.Value:
        """An initializer in the shared data file; several names make one stacked matrix.

        Args:
            inner: shape of a row, if it differs from the stored one.
        """
        key = "+".join((name, *rest)) + (f"{list(inner)}" if inner else "")
        if key not in self._constants:
            tensor = initializer(self._store, name, *rest, inner=inner)
            tensor.name = key
            self._constants[key] = self._tape.initializer(tensor)
        return self._constants[key]

    def constant(self, array: np.ndarray, name: str) -> ir.Value:
        """A small constant inside the ONNX file."""
        if name not in self._constants:
            self._constants[name] = self._tape.initializer(ir.tensor(array, name=name))
        return self._constants[name]

    def ints(self, values: Sequence[int] | int) -> ir.Value:
        """An int64 constant: a vector, or a scalar for a plain int."""
        return self.constant(np.asarray(values, dtype=np.int64), f"int64_{values}".replace(" ", ""))

    def number(self, value: float) -> ir.Value:
        """A scalar constant of the graph's type."""
        array = ir.tensor(np.float32(value)).numpy().astype(self.dtype.numpy())
        return self.constant(array, f"number_{value}")

    def shape(self, leading: ir.Value, rest: Sequence[int]) -> ir.Value:
        """A shape tensor: the dimensions in ``leading``, then the constants in ``rest``."""
        key = f"shape_{leading.name or id(leading)}_{list(rest)}"
        if key not in self._constants:
            self._constants[key] = self.op("Concat", leading, self.ints(rest), axis=0)
        return self._constants[key]

    def model(self, functions: Sequence[ir.Function] = ()) -> ir.Model:
        """The finished model."""
        imports = {"": OPSET} | ({op_domain.DOMAIN: op_domain.VERSION} if functions else {})
        ours = [*self._tape.nodes, *(node for function in functions for node in function)]
        imports |= {MICROSOFT: 1} if any(node.domain == MICROSOFT for node in ours) else {}
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._tape.nodes,
            initializers=self._tape.initializers,
            opset_imports=imports,
            name=self.name,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="shadowllm", functions=functions)
