"""Shared code for the ONNX function bodies of the custom ops; the body of each op is in its folder of `ops`.

Bodies use standard ops (opset 24), except for one op of ONNX Runtime. A bundle carries them as model-local functions,
so that an ONNX Runtime without the native library can run it. They are correct, but not fast: ``Gather`` copies every
row it selects. A function cannot branch on an attribute or on the presence of an input, so each body is written for
one form of model (`FunctionForm`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from shadowllm.bundle import op_domain
from shadowllm.bundle.quantisation import Quantisation
from shadowllm.plugins.schema import OpSchema

OPSET = 24
MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class FunctionForm:
    """The options of a `ModelSpec` that change the nodes of the bodies."""

    activation: str
    gated: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    rope: bool
    n_heads: int
    n_kv_heads: int
    head_dim: int
    quantisation: Quantisation | None = None
    copy: CopyForm | None = None


@dataclass(frozen=True)
class CopyForm:
    """Sizes of the low-bit copy that ``ScoreNeurons`` reads; ``MatMulNBits`` takes them as attributes."""

    hidden_size: int
    rows: int
    quantisation: Quantisation


class FunctionBody:
    """Builds one function: its inputs by port name, and short methods that add nodes and int64 constants."""

    def __init__(self, schema: OpSchema) -> None:
        self._schema = schema
        self._tape = Tape()
        self.inputs = {port.name: ir.Value(name=port.name) for port in schema.inputs}

    def __getitem__(self, name: str) -> ir.Value:
        return self.inputs[name]

    def op(self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: object) -> ir.Value:
        """Add a node and return its output."""
        return self._tape.op(op_type, inputs, attributes, domain=domain)  # type: ignore[arg-type]

    def pair(self, op_type: str, *inputs: ir.Value | None, **attributes: object) -> Sequence[ir.Value]:
        """Add a node and return its two outputs."""
        return self._tape.op_multi_out(op_type, inputs, attributes, num_outputs=2)  # type: ignore[arg-type]

    def attribute(self, name: str) -> ir.Value:
        """The value of a node attribute, as an int64 scalar."""
        return self.op("Constant", value_int=ir.RefAttr("value_int", name, ir.AttributeType.INT))

    def const(self, values: int | Iterable[int]) -> ir.Value:
        """An int64 scalar or vector."""
        tensor = np.asarray(list(values) if isinstance(values, Iterable) else values, dtype=np.int64)
        return self.op("Constant", value=ir.tensor(tensor))

    def active(self) -> ir.Value:
        """The first ``count`` indices, as int64."""
        end = self.op("Reshape", self.op("Cast", self["count"], to=ir.DataType.INT64), self.const([1]))
        return self.op("Cast", self.op("Slice", self["indices"], self.const([0]), end), to=ir.DataType.INT64)

    def matrix(self, part: str, pick: Callable[[ir.Value], ir.Value], form: FunctionForm) -> ir.Value:
        """The picked rows of ``w_<part>`` as floats, ``(rows, D)``."""
        weight = pick(self[f"w_{part}"])
        if form.quantisation is None:
            return weight
        return self._dequantise(weight, pick(self[f"s_{part}"]), form.quantisation)

    def _dequantise(self, data: ir.Value, scales: ir.Value, q: Quantisation) -> ir.Value:
        if q.bits == 4:
            low = self.op("BitwiseAnd", data, self._byte(15))
            high = self.op("BitShift", data, self._byte(4), direction="RIGHT")
            pair = (self.op("Unsqueeze", half, self.const([2])) for half in (low, high))
            data = self.op("Concat", *pair, axis=2)
        middle = self.op("Constant", value_float=float(1 << (q.bits - 1)))
        values = self.op("Sub", self.op("Cast", data, to=ir.DataType.FLOAT), middle)
        shape = self.op("Concat", self.op("Shape", scales), self.const([q.block]), axis=0)
        scaled = self.op("Mul", self.op("Reshape", values, shape), self.op("Unsqueeze", scales, self.const([2])))
        rows, width = self.op("Shape", scales, start=0, end=1), self.op("Shape", self["x"], start=2, end=3)
        return self.op("Reshape", scaled, self.op("Concat", rows, width, axis=0))

    def _byte(self, value: int) -> ir.Value:
        return self.op("Constant", value=ir.tensor(np.array(value, dtype=np.uint8)))

    def project(self, x: ir.Value, weight: ir.Value, bias: ir.Value | None) -> ir.Value:
        """``x weight^T + bias``."""
        y = self.op("MatMul", x, self.op("Transpose", weight, perm=[1, 0]))
        return y if bias is None else self.op("Add", y, bias)

    def activate(self, activation: str, x: ir.Value) -> ir.Value:
        """Apply the activation function of the MLP."""
        if activation == "silu":
            return self.op("Mul", x, self.op("Sigmoid", x))
        return self.op({"relu": "Relu", "gelu": "Gelu"}[activation], x)

    def finish(self, output: ir.Value) -> ir.Function:
        """Return the function with this output."""
        output.name = self._schema.outputs[0].name
        imports = {"": OPSET, op_domain.DOMAIN: op_domain.VERSION}
        imports |= {MICROSOFT: 1} if any(node.domain == MICROSOFT for node in self._tape.nodes) else {}
        graph = ir.Graph(tuple(self.inputs.values()), (output,), nodes=self._tape.nodes, opset_imports=imports)
        kinds = {int: ir.AttributeType.INT, str: ir.AttributeType.STRING}
        declared = [ir.Attr(a.name, kinds[a.type], None) for a in self._schema.attributes]
        return ir.Function(op_domain.DOMAIN, self._schema.name, graph=graph, attributes=declared)
