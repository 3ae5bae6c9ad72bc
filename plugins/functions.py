"""ONNX function bodies of the custom ops, in standard ops only (opset 24).

A bundle carries them as model-local functions, so that an ONNX Runtime without the native library
still runs it. They are correct rather than fast: ``Gather`` copies every row it selects. A function
cannot branch on an attribute or on which inputs are present, so each body is written for one form
of model (`FunctionForm`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from shadowllm.bundle import op_domain
from shadowllm.bundle.quantisation import ACCURACY_LEVEL, Quantisation
from shadowllm.plugins import schemas

OPSET = 24
MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class FunctionForm:
    """What the bodies are specialised to: the options of a `ModelSpec` that change their nodes."""

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
    """Sizes of the low-bit copy that ``ScoreNeurons`` reads, which ``MatMulNBits`` has as attributes."""

    hidden_size: int
    rows: int
    quantisation: Quantisation


def function_bodies(form: FunctionForm) -> list[ir.Function]:
    """The functions of domain ``shadowllm`` for one form of model; ``ScoreNeurons`` where there is a copy."""
    bodies = [_select_topk(), _sparse_mlp(form), _sparse_attention(form)]
    return bodies + ([_score_neurons(form, form.copy)] if form.copy else [])


class _Body:
    """A function under construction: named inputs, terse ops, int64 constants."""

    def __init__(self, schema: schemas.OpSchema) -> None:
        self._schema = schema
        self._tape = Tape()
        self.inputs = {port.name: ir.Value(name=port.name) for port in schema.inputs}

    def __getitem__(self, name: str) -> ir.Value:
        return self.inputs[name]

    def op(self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: object) -> ir.Value:
        return self._tape.op(op_type, inputs, attributes, domain=domain)  # type: ignore[arg-type]

    def const(self, values: int | Iterable[int]) -> ir.Value:
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
            low = self.op("BitwiseAnd", data, self.byte(15))
            high = self.op("BitShift", data, self.byte(4), direction="RIGHT")
            pair = (self.op("Unsqueeze", half, self.const([2])) for half in (low, high))
            data = self.op("Concat", *pair, axis=2)
        middle = self.op("Constant", value_float=float(1 << (q.bits - 1)))
        values = self.op("Sub", self.op("Cast", data, to=ir.DataType.FLOAT), middle)
        shape = self.op("Concat", self.op("Shape", scales), self.const([q.block]), axis=0)
        scaled = self.op("Mul", self.op("Reshape", values, shape), self.op("Unsqueeze", scales, self.const([2])))
        rows, width = self.op("Shape", scales, start=0, end=1), self.op("Shape", self["x"], start=2, end=3)
        return self.op("Reshape", scaled, self.op("Concat", rows, width, axis=0))

    def byte(self, value: int) -> ir.Value:
        return self.op("Constant", value=ir.tensor(np.array(value, dtype=np.uint8)))

    def project(self, x: ir.Value, weight: ir.Value, bias: ir.Value | None) -> ir.Value:
        y = self.op("MatMul", x, self.op("Transpose", weight, perm=[1, 0]))
        return y if bias is None else self.op("Add", y, bias)

    def finish(self, output: ir.Value) -> ir.Function:
        output.name = self._schema.outputs[0].name
        imports = {"": OPSET, op_domain.DOMAIN: op_domain.VERSION}
        imports |= {MICROSOFT: 1} if any(node.domain == MICROSOFT for node in self._tape.nodes) else {}
        graph = ir.Graph(tuple(self.inputs.values()), (output,), nodes=self._tape.nodes, opset_imports=imports)
        kinds = {int: ir.AttributeType.INT, str: ir.AttributeType.STRING}
        declared = [ir.Attr(a.name, kinds[a.type], None) for a in self._schema.attributes]
        return ir.Function(op_domain.DOMAIN, self._schema.name, graph=graph, attributes=declared)


def _select_topk() -> ir.Function:
    body = _Body(schemas.SELECT_TOPK)
    cap = body._tape.op("Constant", (), {"value_int": ir.RefAttr("value_int", "cap", ir.AttributeType.INT)})
    k = body.op("Reshape", cap, body.const([1]))
    # The best first, ties to the lower index; those past the count are replaced by a bound that
    # sorts last, so that one ascending sort leaves the chosen in front.
    _, order = body._tape.op_multi_out("TopK", (body["scores"], k), {"largest": 1, "sorted": 1}, num_outputs=2)
    rank = body.op("Unsqueeze", body.op("Range", body.const(0), cap, body.const(1)), body.const([0]))
    counts = body.op("Unsqueeze", body.op("Cast", body["counts"], to=ir.DataType.INT64), body.const([1]))
    chosen = body.op("Less", rank, counts)
    bound = body.op("Shape", body["scores"], start=1, end=2)
    ascending, _ = body._tape.op_multi_out(
        "TopK", (body.op("Where", chosen, order, bound), k), {"largest": 0, "sorted": 1}, num_outputs=2
    )
    padded = body.op("Where", chosen, ascending, body.const(-1))
    return body.finish(body.op("Cast", padded, to=ir.DataType.INT32))


def _score_neurons(form: FunctionForm, copy: CopyForm) -> ir.Function:
    """The one body with a node of ONNX Runtime's own domain: its product with integers is as fast as it gets."""
    body = _Body(schemas.SCORE_NEURONS)
    x = body.op("Reshape", body["x"], body.const([-1, copy.hidden_size]))
    bias = [None, None, body.op("Cast", _copy_bias(body, form), to=ir.DataType.FLOAT)] if form.mlp_bias else []
    projected = body.op(
        "MatMulNBits",
        body.op("Cast", x, to=ir.DataType.FLOAT),
        body["copy"],
        body["scales"],
        *bias,
        domain=MICROSOFT,
        K=copy.hidden_size,
        N=copy.rows,
        bits=copy.quantisation.bits,
        block_size=copy.quantisation.block,
        accuracy_level=ACCURACY_LEVEL,
    )
    if form.gated:
        gate, up = body._tape.op_multi_out("Split", (projected,), {"axis": 1, "num_outputs": 2}, num_outputs=2)
        product = body.op("Mul", _activate(body, form.activation, gate), up)
    else:
        product = _activate(body, form.activation, projected)
    mean = body.op("ReduceMean", body.op("Abs", product), body.const([0]), keepdims=1)
    return body.finish(body.op("Mul", mean, body["lengths"]))


def _copy_bias(body: _Body, form: FunctionForm) -> ir.Value:
    return body.op("Concat", body["b_gate"], body["b_up"], axis=0) if form.gated else body["b_up"]


def _sparse_mlp(form: FunctionForm) -> ir.Function:
    body = _Body(schemas.SPARSE_MLP)
    rows = body.active()

    def pick(weight: ir.Value) -> ir.Value:
        return body.op("Gather", weight, rows, axis=0)

    def project(part: str) -> ir.Value:
        weight = body.matrix(part, pick, form)
        bias = body.op("Gather", body[f"b_{part}"], rows, axis=0) if form.mlp_bias else None
        return body.project(body["x"], weight, bias)

    up = project("up")
    hidden = (
        body.op("Mul", _activate(body, form.activation, project("gate")), up)
        if form.gated
        else _activate(body, form.activation, up)
    )
    y = body.op("MatMul", hidden, body.matrix("down", pick, form))
    return body.finish(body.op("Add", y, body["b_down"]) if form.mlp_bias else y)


def _activate(body: _Body, activation: str, x: ir.Value) -> ir.Value:
    if activation == "silu":
        return body.op("Mul", x, body.op("Sigmoid", x))
    return body.op({"relu": "Relu", "gelu": "Gelu"}[activation], x)


def _sparse_attention(form: FunctionForm) -> ir.Function:
    body = _Body(schemas.SPARSE_ATTENTION)
    heads = body.active()

    def pick(weight: ir.Value) -> ir.Value:
        return _head_rows(body, form, weight, heads)

    query = body.project(body["x"], body.matrix("q", pick, form), _head_bias(body, form, heads))
    query = body.op("Reshape", query, body.const([0, 0, -1, form.head_dim]))
    query = body.op("Transpose", query, perm=[0, 2, 1, 3])
    if form.rope:
        query = body.op("RotaryEmbedding", query, body["cos"], body["sin"])
    group = body.const(form.n_heads // form.n_kv_heads)
    kv_heads = body.op("Div", heads, group)
    key, value = (body.op("Gather", body[name], kv_heads, axis=1) for name in ("key", "value"))
    context = body.op("Attention", query, key, value, _visible(body), scale=1 / math.sqrt(form.head_dim))
    context = body.op("Transpose", context, perm=[0, 2, 1, 3])
    context = body.op(
        "Reshape", context, body.op("Concat", body.op("Shape", body["x"], start=0, end=2), body.const([-1]), axis=0)
    )
    y = body.op("MatMul", context, body.matrix("o", pick, form))
    return body.finish(body.op("Add", y, body["b_o"]) if form.o_bias else y)


def _head_rows(body: _Body, form: FunctionForm, weight: ir.Value, heads: ir.Value) -> ir.Value:
    """The active heads' rows of a matrix of ``H*d`` rows."""
    size = body.op("Shape", weight, start=1, end=2)
    blocks = body.op("Reshape", weight, body.op("Concat", body.const([form.n_heads, form.head_dim]), size, axis=0))
    return body.op(
        "Reshape", body.op("Gather", blocks, heads, axis=0), body.op("Concat", body.const([-1]), size, axis=0)
    )


def _head_bias(body: _Body, form: FunctionForm, heads: ir.Value) -> ir.Value | None:
    if not form.qkv_bias:
        return None
    blocks = body.op("Reshape", body["b_q"], body.const([form.n_heads, form.head_dim]))
    return body.op("Reshape", body.op("Gather", blocks, heads, axis=0), body.const([-1]))


def _visible(body: _Body) -> ir.Value:
    """Boolean mask (B, 1, S, C): query s of row b sees positions up to lengths[b] - S + s."""
    seqlen = body.op("Squeeze", body.op("Shape", body["x"], start=1, end=2))
    capacity = body.op("Squeeze", body.op("Shape", body["key"], start=2, end=3))
    zero, one = body.const(0), body.const(1)
    start = body.op("Sub", body.op("Cast", body["lengths"], to=ir.DataType.INT64), seqlen)
    last = body.op("Add", body.op("Unsqueeze", start, body.const([1])), body.op("Range", zero, seqlen, one))
    positions = body.op("Range", zero, capacity, one)
    return body.op("LessOrEqual", positions, body.op("Unsqueeze", last, body.const([1, 3])))
