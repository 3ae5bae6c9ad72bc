"""Shared code for the ONNX function bodies of the custom ops; the body of each op is in its folder of `ops`.

Bodies use standard ops (opset 24), except for one op of ONNX Runtime. A bundle carries them as model-local functions,
so that an ONNX Runtime without the native library can run it. They are correct, but not fast: they compute all units,
and then drop those that a selection leaves out, because every sequence may have its own selection. A function cannot
branch on an attribute or on the presence of an input, so each body is written for one form of model (`FunctionForm`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from shadowllm.bundle import op_domain
from shadowllm.bundle.quantisation import Quantisation
from shadowllm.plugins.activation_nodes import activate, times_up
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
    rest: Quantisation | None = None  # the format of the low-bit copies of the sparse ops; None: they have no copies
    chooses_neurons: bool = False  # `SparseMLP` has no indices and chooses itself
    head_groups: int = 0  # G of a `SparseAttention` without indices, which chooses itself; 0: it has indices
    table: TableForm | None = None
    threshold: float = 0.0  # of FATReLU
    gate_first: bool = False  # `SparseMLP` has neither indices nor a copy, and drops neurons whose gate is zero
    windows: bool = False  # `SparseAttention` has the attribute window


@dataclass(frozen=True)
class CopyForm:
    """Sizes of the low-bit copy that ``ScoreNeurons`` reads; ``MatMulNBits`` takes them as attributes."""

    hidden_size: int
    rows: int
    quantisation: Quantisation


@dataclass(frozen=True)
class TableForm:
    """Sizes of the low-bit copy of the output table that ``ShortlistLogits`` reads, and whether it has a weighting."""

    hidden_size: int
    rows: int
    quantisation: Quantisation
    weighted: bool = False


class FunctionBody:
    """Builds one function: its inputs by port name, and short methods that add nodes and int64 constants.

    Args:
        absent: attributes that no node of the model has.
    """

    def __init__(self, schema: OpSchema, absent: Sequence[str] = ()) -> None:
        self._schema, self._absent = schema, absent
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

    def counts(self) -> ir.Value:
        """The count of each selection, int64 ``(R, 1)``. There is one selection, or one for each sequence."""
        return self.op("Reshape", self.op("Cast", self["count"], to=ir.DataType.INT64), self.const([-1, 1]))

    def given(self) -> ir.Value:
        """The input ``indices``, int64 ``(R, cap)``, -1 past the counts."""
        counts, cap = self.counts(), self.op("Shape", self["indices"], start=-1)
        shape = self.op("Concat", self.op("Shape", counts, start=0, end=1), cap, axis=0)
        indices = self.op("Reshape", self.op("Cast", self["indices"], to=ir.DataType.INT64), shape, allowzero=1)
        places = self.op("Range", self.const(0), self.op("Squeeze", cap), self.const(1))
        return self.op("Where", self.op("Less", places, counts), indices, self.const(-1))

    def mean(self, scores: ir.Value, width: ir.Value) -> ir.Value:
        """The mean over the tokens of each selection, ``(R, W)``, of scores ``(B, S, W)``; ``width`` is W, ``(1,)``."""
        size = self.op("Reshape", self.op("Size", self["count"]), self.const([1]))
        shape = self.op("Concat", size, self.const([-1]), width, axis=0)
        return self.op("ReduceMean", self.op("Reshape", scores, shape), self.const([1]), keepdims=0)

    def best(self, scores: ir.Value, k: ir.Value, counts: ir.Value) -> ir.Value:
        """The ascending indices of the largest of each row of scores, -1 past the row's count.

        Scores ``(n, W)``, a scalar k and counts ``(n, 1)`` give int64 ``(n, k)``. Ties go to the lower index.
        """
        size = self.op("Reshape", k, self.const([1]))
        _, order = self.pair("TopK", scores, size, largest=1, sorted=1)
        # Indices past the count are replaced by a bound that sorts last, so that one ascending sort puts the
        # selected indices first.
        rank = self.op("Range", self.const(0), k, self.const(1))
        chosen = self.op("Less", self.op("Unsqueeze", rank, self.const([0])), counts)
        bound = self.op("Shape", scores, start=1, end=2)
        ascending, _ = self.pair("TopK", self.op("Where", chosen, order, bound), size, largest=0, sorted=1)
        return self.op("Where", chosen, ascending, self.const(-1))

    def choose(self, scores: ir.Value, counts: ir.Value) -> ir.Value:
        """`best` of scores ``(R, W)`` with room for all of them, ``(R, W)``."""
        return self.best(scores, self.op("Squeeze", self.op("Shape", scores, start=1)), counts)

    def chosen(self, indices: ir.Value) -> ir.Value:
        """Indices ``(R, W)`` as the output ``chosen``: int32, ``(R, W)``, or ``(W,)`` if ``count`` has no dimension."""
        shape = self.op("Concat", self.op("Shape", self["count"]), self.op("Shape", indices, start=1), axis=0)
        return self.op("Cast", self.op("Reshape", indices, shape), to=ir.DataType.INT32)

    def mask(self, indices: ir.Value, width: ir.Value) -> ir.Value:
        """Boolean ``(R, 1, W)``: whether a unit is one of the indices ``(R, n)``; ``width`` is W, ``(1,)``."""
        end = self.op("Where", self.op("Less", indices, self.const(0)), width, indices)  # an entry past the units
        size = self.op("Add", width, self.const(1))
        shape = self.op("Concat", self.op("Shape", indices, start=0, end=1), size, axis=0)
        ones = self.op("Expand", self.const(1), self.op("Shape", indices))
        marks = self.op("ScatterElements", self.op("Expand", self.const(0), shape), end, ones, axis=1)
        units = self.op("Slice", marks, self.const([0]), width, self.const([1]))
        return self.op("Unsqueeze", self.op("Cast", units, to=ir.DataType.BOOL), self.const([1]))

    def of_rest(self, mask: ir.Value) -> ir.Value:
        """Boolean: whether a unit is computed from the copy, which none is where the input ``rest`` is 0."""
        rest = self.op("Reshape", self.op("Cast", self["rest"], to=ir.DataType.BOOL), self.const([-1, 1, 1]))
        return self.op("And", self.op("Not", mask), rest)

    def where(self, mask: ir.Value, x: ir.Value) -> ir.Value:
        """``x`` where the mask is true, else 0."""
        return self.op("Where", mask, x, self.op("CastLike", self.const(0), x))

    def low_bit(self, part: str, q: Quantisation) -> ir.Value:
        """All rows of the copy ``c_<part>`` in the type of x, ``(rows, D)``."""
        data = self.op("Reshape", self[f"c_{part}"], self.const([0, -1]))
        return self.op("CastLike", self._dequantise(data, self[f"cs_{part}"], q), self["x"])

    def matrix(
        self, part: str, form: FunctionForm, pick: Callable[[ir.Value], ir.Value] = lambda weight: weight
    ) -> ir.Value:
        """The picked rows of ``w_<part>`` as floats, ``(rows, D)``; all rows by default."""
        return self.rows(pick, f"w_{part}", f"s_{part}", f"c_{part}", f"cs_{part}", form)

    def rows(
        self,
        pick: Callable[[ir.Value], ir.Value],
        weight: str,
        scales: str,
        copy: str,
        copy_scales: str,
        form: FunctionForm,
    ) -> ir.Value:
        """The picked rows of a matrix as floats, ``(rows, D)``, from the inputs with these names."""
        q = form.quantisation
        if q is None:
            return pick(self[weight])
        if not q.residual_bits:
            return self._dequantise(pick(self[weight]), pick(self[scales]), q)
        high = pick(self.op("Reshape", self[copy], self.const([0, -1])))
        steps = pick(self[copy_scales])
        fine = self.op("Mul", steps, self.op("Constant", value_float=q.residual_step))
        residual = self._dequantise(pick(self[weight]), fine, q.residual)
        return self.op("Add", self._dequantise(high, steps, q.copy), residual)

    def _dequantise(self, data: ir.Value, scales: ir.Value, q: Quantisation) -> ir.Value:
        if q.bits < 8:
            mask = self._byte((1 << q.bits) - 1)
            shifted = (
                self.op("BitShift", data, self._byte(place), direction="RIGHT") if place else data
                for place in range(0, 8, q.bits)
            )
            places = (self.op("Unsqueeze", self.op("BitwiseAnd", part, mask), self.const([2])) for part in shifted)
            data = self.op("Concat", *places, axis=2)
        middle = self.op("Constant", value_float=float(1 << (q.bits - 1)))
        values = self.op("Sub", self.op("Cast", data, to=ir.DataType.FLOAT), middle)
        shape = self.op("Concat", self.op("Shape", scales), self.const([q.block]), axis=0)
        scaled = self.op("Mul", self.op("Reshape", values, shape), self.op("Unsqueeze", scales, self.const([2])))
        rows, blocks = self.op("Shape", scales, start=0, end=1), self.op("Shape", scales, start=1, end=2)
        size = self.op("Concat", rows, self.op("Mul", blocks, self.const(q.block)), axis=0)
        width = self.op("Shape", self["x"], start=-1)  # the last block may be padded
        return self.op("Slice", self.op("Reshape", scaled, size), self.const([0]), width, self.const([1]))

    def _byte(self, value: int) -> ir.Value:
        return self.op("Constant", value=ir.tensor(np.array(value, dtype=np.uint8)))

    def project(self, x: ir.Value, weight: ir.Value, bias: ir.Value | None) -> ir.Value:
        """``x weight^T + bias``."""
        y = self.op("MatMul", x, self.op("Transpose", weight, perm=[1, 0]))
        return y if bias is None else self.op("Add", y, bias)

    def number(self, value: float) -> ir.Value:
        """A scalar constant of the type of x."""
        return self.op("CastLike", self.op("Constant", value_float=value), self["x"])

    def product(self, form: FunctionForm, first: ir.Value, up: ir.Value | None = None) -> ir.Value:
        """The products that the rows of down are multiplied by, from the outputs of gate and up, or of up alone."""
        active = activate(self, form.activation, form.threshold, first)
        return active if up is None else times_up(self, form.activation, active, up)

    def if_else(
        self, condition: ir.Value, if_true: Callable[[], Sequence[ir.Value]], if_false: Callable[[], Sequence[ir.Value]]
    ) -> Sequence[ir.Value]:
        """Add an ``If`` node, whose branches are made of the nodes that two functions add; return its outputs."""
        branches = {}
        outer = self._tape
        for name, add_nodes in (("then_branch", if_true), ("else_branch", if_false)):
            self._tape = Tape()
            outputs = add_nodes()
            # A name in a branch must differ from those outside, which the branch can read.
            for i, value in enumerate(value for node in self._tape.nodes for value in node.outputs):
                value.name = f"{name}_{i}"
            branches[name] = ir.Graph((), outputs, nodes=self._tape.nodes, name=name)
        self._tape = outer
        return self._tape.op_multi_out("If", [condition], branches, num_outputs=len(outputs))

    def finish(self, *outputs: ir.Value) -> ir.Function:
        """Return the function with these outputs. ONNX Runtime wants a node to name all outputs of its function."""
        for output, port in zip(outputs, self._schema.outputs, strict=False):
            output.name = port.name
        imports = {"": OPSET, op_domain.DOMAIN: op_domain.VERSION}
        imports |= {MICROSOFT: 1} if any(node.domain == MICROSOFT for node in self._tape.nodes) else {}
        graph = ir.Graph(tuple(self.inputs.values()), outputs, nodes=self._tape.nodes, opset_imports=imports)
        kinds = {int: ir.AttributeType.INT, float: ir.AttributeType.FLOAT, str: ir.AttributeType.STRING}
        declared = [ir.Attr(a.name, kinds[a.type], None) for a in self._schema.attributes if a.name not in self._absent]
        return ir.Function(op_domain.DOMAIN, self._schema.name, graph=graph, attributes=declared)
