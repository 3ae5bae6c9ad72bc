"""The ONNX function body of ``SparseMLP``; see `plugins.function_body`."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from shadowllm.plugins.activation_nodes import activate, times_up
from shadowllm.plugins.function_body import FunctionBody, FunctionForm
from shadowllm.plugins.ops.sparse_mlp.schema import SPARSE_MLP


def function_body(form: FunctionForm) -> ir.Function:
    """Gather the active rows of each matrix, then compute a dense MLP; with copies, add all other neurons."""
    body = FunctionBody(SPARSE_MLP)
    low = _low(body, form) if form.rest else None
    if form.gate_first:
        return _gate_first(body, form)
    if form.chooses_neurons and low is not None:
        size = body.op("Cast", body.op("Abs", low), to=ir.DataType.FLOAT)
        mean = body.op("ReduceMean", size, body.const([0, 1]), keepdims=0)
        rows = body.choose(body.op("Mul", mean, body["down_norms"]), body.counted())
    else:
        rows = body.active()

    def pick(weight: ir.Value) -> ir.Value:
        return body.op("Gather", weight, rows, axis=0)

    def project(part: str) -> ir.Value:
        bias = pick(body[f"b_{part}"]) if form.mlp_bias else None
        return body.project(body["x"], body.matrix(part, pick, form), bias)

    y = body.op("MatMul", _hidden(body, form, project), body.matrix("down", pick, form))
    width = body.op("Shape", body["w_up"], start=0, end=1)
    if low is not None and form.rest:
        others = body.where(body.of_rest(body.full(rows, width)), low)
        y = body.op("Add", y, body.op("MatMul", others, body.low_bit("down", form.rest)))
    y = body.op("Add", y, body["b_down"]) if form.mlp_bias else y
    return body.finish(y, body.padded(rows, width)) if form.chooses_neurons else body.finish(y)


def _hidden(body: FunctionBody, form: FunctionForm, project: Callable[[str], ir.Value]) -> ir.Value:
    """The products that the rows of down are multiplied by."""
    return body.product(form, *(project(part) for part in (("gate", "up") if form.gated else ("up",))))


def _gate_first(body: FunctionBody, form: FunctionForm) -> ir.Function:
    """Compute the gates of all neurons, then gather the rows of up and down whose gate is not zero for some token."""

    def project(part: str, pick: Callable[[ir.Value], ir.Value]) -> ir.Value:
        bias = pick(body[f"b_{part}"]) if form.mlp_bias else None
        return body.project(body["x"], body.matrix(part, pick, form), bias)

    gates = activate(body, form.activation, form.threshold, project("gate" if form.gated else "up", lambda rows: rows))
    # A NaN is not equal to zero, so it counts as fired.
    fired = body.op("Not", body.op("Equal", gates, body.number(0.0)))
    any_token = body.op("ReduceMax", body.op("Cast", fired, to=ir.DataType.INT32), body.const([0, 1]), keepdims=0)
    rows = body.op("Squeeze", body.op("NonZero", any_token), body.const([0]))

    def pick(weight: ir.Value) -> ir.Value:
        return body.op("Gather", weight, rows, axis=0)

    hidden = body.op("Gather", gates, rows, axis=2)
    if form.gated:
        hidden = times_up(body, form.activation, hidden, project("up", pick))
    y = body.op("MatMul", hidden, body.matrix("down", pick, form))
    y = body.op("Add", y, body["b_down"]) if form.mlp_bias else y
    return body.finish(y, body.padded(rows, body.op("Shape", body["w_up"], start=0, end=1)))


def _low(body: FunctionBody, form: FunctionForm) -> ir.Value:
    """The products of all neurons from the copy, ``(B, S, F)``."""
    copy = form.rest
    assert copy is not None

    def project(part: str) -> ir.Value:
        return body.project(body["x"], body.low_bit(part, copy), body[f"b_{part}"] if form.mlp_bias else None)

    return _hidden(body, form, project)
