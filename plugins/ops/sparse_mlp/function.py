"""The ONNX function body of ``SparseMLP``; see `plugins.function_body`."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from shadowllm.plugins.activation_nodes import activate, times_up
from shadowllm.plugins.function_body import FunctionBody, FunctionForm
from shadowllm.plugins.ops.sparse_mlp.schema import SPARSE_MLP


def function_body(form: FunctionForm) -> ir.Function:
    """Compute all neurons, and drop those that are not active; with copies, take these from the copy."""
    body = FunctionBody(SPARSE_MLP)
    if form.gate_first:
        return _gate_first(body, form)
    low = (
        _hidden(body, form, lambda part: _project(body, form, part, _low_bit(body, form, part))) if form.rest else None
    )
    width = body.op("Shape", body["w_up"], start=0, end=1)
    if form.chooses_neurons and low is not None:
        size = body.op("Cast", body.op("Abs", low), to=ir.DataType.FLOAT)
        rows = body.choose(body.op("Mul", body.mean(size, width), body["down_norms"]), body.counts())
    else:
        rows = body.given()
    active = body.mask(rows, width)
    hidden = _hidden(body, form, lambda part: _project(body, form, part, body.matrix(part, form)))
    y = body.op("MatMul", body.where(active, hidden), body.matrix("down", form))
    if low is not None:
        others = body.where(body.of_rest(active), low)
        y = body.op("Add", y, body.op("MatMul", others, _low_bit(body, form, "down")))
    y = body.op("Add", y, body["b_down"]) if form.mlp_bias else y
    return body.finish(y, body.chosen(rows)) if form.chooses_neurons else body.finish(y)


def _hidden(body: FunctionBody, form: FunctionForm, project: Callable[[str], ir.Value]) -> ir.Value:
    """The products that the rows of down are multiplied by, ``(B, S, F)``."""
    return body.product(form, *(project(part) for part in (("gate", "up") if form.gated else ("up",))))


def _project(body: FunctionBody, form: FunctionForm, part: str, weight: ir.Value) -> ir.Value:
    return body.project(body["x"], weight, body[f"b_{part}"] if form.mlp_bias else None)


def _low_bit(body: FunctionBody, form: FunctionForm, part: str) -> ir.Value:
    assert form.rest is not None
    return body.low_bit(part, form.rest)


def _gate_first(body: FunctionBody, form: FunctionForm) -> ir.Function:
    """Compute the gates of all neurons, then gather the rows of up and down whose gate is not zero for some token."""
    first = "gate" if form.gated else "up"
    gates = activate(body, form.activation, form.threshold, _project(body, form, first, body.matrix(first, form)))
    # A NaN is not equal to zero, so it counts as fired.
    fired = body.op("Cast", body.op("Not", body.op("Equal", gates, body.number(0.0))), to=ir.DataType.FLOAT)
    any_token = body.op("ReduceMax", fired, body.const([0, 1]), keepdims=0)
    rows = body.op("Squeeze", body.op("NonZero", any_token), body.const([0]))

    def pick(weight: ir.Value) -> ir.Value:
        return body.op("Gather", weight, rows, axis=0)

    hidden = body.op("Gather", gates, rows, axis=2)
    if form.gated:
        bias = pick(body["b_up"]) if form.mlp_bias else None
        hidden = times_up(body, form.activation, hidden, body.project(body["x"], body.matrix("up", form, pick), bias))
    y = body.op("MatMul", hidden, body.matrix("down", form, pick))
    y = body.op("Add", y, body["b_down"]) if form.mlp_bias else y
    return body.finish(y, body.chosen(_list(body, fired)))


def _list(body: FunctionBody, fired: ir.Value) -> ir.Value:
    """The neurons of each selection that fired for some token, ``(R, F)``, ascending and then -1."""
    mean = body.mean(fired, body.op("Shape", body["w_up"], start=0, end=1))
    some = body.op("Cast", body.op("Greater", mean, body.op("Constant", value_float=0.0)), to=ir.DataType.INT32)
    counts = body.op("ReduceSum", body.op("Cast", some, to=ir.DataType.INT64), body.const([1]), keepdims=1)
    return body.choose(body.op("Cast", some, to=ir.DataType.FLOAT), counts)
