"""The ONNX function body of ``ShortlistLogits``; see `plugins.function_body`."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from shadowllm.plugins.function_body import MICROSOFT, FunctionBody, FunctionForm
from shadowllm.plugins.ops.shortlist_logits.schema import SHORTLIST_LOGITS

# Attribute of ``MatMulNBits``: float32 inputs are not rounded, as the certificate needs.
EXACT_INPUTS = 1
# Makes the rows of the table that a function picks, as float32.
ExactRows = Callable[[Callable[[ir.Value], ir.Value]], ir.Value]


def function_body(form: FunctionForm) -> ir.Function | None:
    """The body. It multiplies the whole table if the shortlist is the whole table, or if the result is certified.

    Returns:
        None for a model without a low-bit copy of its table.
    """
    table = form.table
    if table is None:
        return None
    body = FunctionBody(SHORTLIST_LOGITS)
    x = body.op("Cast", body["x"], to=ir.DataType.FLOAT)
    low = body.op(
        "MatMulNBits",
        x,
        body["copy"],
        body["scales"],
        domain=MICROSOFT,
        K=table.hidden_size,
        N=table.rows,
        bits=table.quantisation.bits,
        block_size=table.quantisation.block,
        accuracy_level=EXACT_INPUTS,
    )
    certify = body.op("Reshape", body.op("Cast", body["certify"], to=ir.DataType.BOOL), body.const([-1, 1]))
    rows = body.op("Shape", low, start=1, end=2)
    shortlist = body.op("Reshape", _integer(body, body["shortlist"]), body.const([-1, 1]))
    wanted = body.op("Min", body.op("Max", shortlist, _integer(body, certify)), rows)  # of each row of x, or of all
    k = body.op("ReduceMax", wanted, body.const([1, 0]), keepdims=0)
    _, best = body.pair("TopK", low, body.op("Reshape", k, body.const([1])), largest=1, sorted=1)
    own = body.op("Less", body.op("Range", body.const(0), k, body.const(1)), wanted)
    proves = body.op("Cast", body.op("ReduceMax", _integer(body, certify), keepdims=0), to=ir.DataType.BOOL)
    whole = body.op("Or", proves, body.op("Squeeze", body.op("Equal", k, rows)))

    def exact_rows(pick: Callable[[ir.Value], ir.Value]) -> ir.Value:
        return _float(body, body.rows(pick, "table", "table_scales", "copy", "scales", form))

    def all_rows() -> tuple[ir.Value, ir.Value]:
        return _from_all_rows(body, x, low, best, own, certify, exact_rows(lambda rows: rows), table.weighted)

    def some_rows() -> tuple[ir.Value, ir.Value]:
        return _from_shortlist(body, x, low, best, own, wanted, exact_rows)

    return body.finish(*body.if_else(whole, all_rows, some_rows))


def _integer(body: FunctionBody, value: ir.Value) -> ir.Value:
    return body.op("Cast", value, to=ir.DataType.INT64)


def _float(body: FunctionBody, value: ir.Value) -> ir.Value:
    return body.op("Cast", value, to=ir.DataType.FLOAT)


def _from_all_rows(
    body: FunctionBody,
    x: ir.Value,
    low: ir.Value,
    best: ir.Value,
    own: ir.Value,
    certify: ir.Value,
    rows: ir.Value,
    weighted: bool,
) -> tuple[ir.Value, ir.Value]:
    exact = body.project(x, rows, None)
    nothing = body.op("Constant", value_float=float("-inf"))
    listed = body.op("Where", own, body.op("GatherElements", exact, best, axis=1), nothing)
    largest = body.op("ReduceMax", listed, body.const([1]), keepdims=1)
    weighed = body.op("Mul", x, body["weighting"]) if weighted else x
    # In float64, because squares may leave the range of float32.
    norms = body.op("ReduceL2", body.op("Cast", weighed, to=ir.DataType.DOUBLE), body.const([1]), keepdims=1)
    bound = body.op("Add", low, body.op("Mul", _float(body, norms), body["errors"]))
    doubtful = body.op("And", certify, body.op("GreaterOrEqual", bound, largest))
    found = body.op("Or", own, body.op("GatherElements", doubtful, best, axis=1))
    recomputed = body.op("ScatterElements", doubtful, best, found, axis=1)
    counts = body.op("ReduceSum", body.op("Cast", recomputed, to=ir.DataType.INT32), body.const([1]), keepdims=0)
    return body.op("Where", recomputed, exact, low), counts


def _from_shortlist(
    body: FunctionBody,
    x: ir.Value,
    low: ir.Value,
    best: ir.Value,
    own: ir.Value,
    wanted: ir.Value,
    exact_rows: ExactRows,
) -> tuple[ir.Value, ir.Value]:
    flat = body.op("Reshape", best, body.const([-1]))
    shape = body.op("Concat", body.op("Shape", best), body.op("Shape", x, start=1), axis=0)
    rows = body.op("Reshape", exact_rows(lambda matrix: body.op("Gather", matrix, flat, axis=0)), shape, allowzero=1)
    exact = body.op("Squeeze", body.op("MatMul", rows, body.op("Unsqueeze", x, body.const([2]))), body.const([2]))
    found = body.op("Where", own, exact, body.op("GatherElements", low, best, axis=1))
    counts = body.op("Cast", body.op("Squeeze", wanted, body.const([1])), to=ir.DataType.INT32)
    counts = body.op("Expand", counts, body.op("Shape", x, start=0, end=1))
    return body.op("ScatterElements", low, best, found, axis=1), counts
