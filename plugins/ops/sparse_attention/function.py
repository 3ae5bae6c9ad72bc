"""The ONNX function body of ``SparseAttention``; see `plugins.function_body`."""

from __future__ import annotations

import math

import onnx_ir as ir

from shadowllm.plugins.function_body import FunctionBody, FunctionForm
from shadowllm.plugins.ops.sparse_attention.schema import SPARSE_ATTENTION


def function_body(form: FunctionForm) -> ir.Function:
    """Compute the attention of all heads, and drop those that are not active; with copies, take these from the copy."""
    body = FunctionBody(SPARSE_ATTENTION, absent=() if form.windows else ("window",))
    heads = _choose(body, form) if form.head_groups else body.given()
    active = body.mask(heads, body.const([form.n_heads]))
    full_rows = _of_rows(body, form, active)
    bias = body["b_q"] if form.qkv_bias else None
    query = body.project(body["x"], body.matrix("q", form), bias)
    if form.rest:
        query = body.op("Where", full_rows, query, body.project(body["x"], body.low_bit("q", form.rest), bias))
    context = _attend(body, form, query)
    y = body.op("MatMul", body.where(full_rows, context), body.matrix("o", form))
    if form.rest:
        others = body.where(_of_rows(body, form, body.of_rest(active)), context)
        y = body.op("Add", y, body.op("MatMul", others, body.low_bit("o", form.rest)))
    y = body.op("Add", y, body["b_o"]) if form.o_bias else y
    return body.finish(y, body.chosen(heads)) if form.head_groups else body.finish(y)


def _choose(body: FunctionBody, form: FunctionForm) -> ir.Value:
    """The heads of the groups with the largest mean scores, ``(R, H)``, ascending and then -1."""
    together = form.n_heads // form.head_groups
    x = body.op("Cast", body["x"], to=ir.DataType.FLOAT)
    scores = body.mean(body.project(x, body["score_weight"], body["score_bias"]), body.const([form.head_groups]))
    groups = body.op(
        "Unsqueeze", body.choose(scores, body.op("Div", body.counts(), body.const(together))), body.const([2])
    )
    heads = body.op("Add", body.op("Mul", groups, body.const(together)), body.const(range(together)))
    heads = body.op("Where", body.op("Less", groups, body.const(0)), body.const(-1), heads)
    return body.op("Reshape", heads, body.const([-1, form.n_heads]))


def _of_rows(body: FunctionBody, form: FunctionForm, heads: ir.Value) -> ir.Value:
    """A mask of heads ``(n, 1, H)`` as one of their rows, ``(n, 1, H*d)``."""
    rows = body.op("Expand", body.op("Unsqueeze", heads, body.const([3])), body.const([1, 1, 1, form.head_dim]))
    return body.op("Reshape", rows, body.const([-1, 1, form.n_heads * form.head_dim]))


def _attend(body: FunctionBody, form: FunctionForm, query: ir.Value) -> ir.Value:
    """The attention of the queries ``(B, S, H*d)`` of all heads over the cache, ``(B, S, H*d)``."""
    query = body.op("Reshape", query, body.const([0, 0, form.n_heads, form.head_dim]))
    query = body.op("Transpose", query, perm=[0, 2, 1, 3])
    if form.rope:
        query = body.op("RotaryEmbedding", query, body["cos"], body["sin"])
    context = body.op(
        "Attention", query, body["key"], body["value"], _visible(body, form.windows), scale=1 / math.sqrt(form.head_dim)
    )
    context = body.op("Transpose", context, perm=[0, 2, 1, 3])
    return body.op("Reshape", context, body.const([0, 0, form.n_heads * form.head_dim]))


def _visible(body: FunctionBody, windows: bool) -> ir.Value:
    """Boolean mask (B, 1, S, C): query s of row b sees positions up to lengths[b] - S + s, or the last of them."""
    seqlen = body.op("Squeeze", body.op("Shape", body["x"], start=1, end=2))
    capacity = body.op("Squeeze", body.op("Shape", body["key"], start=2, end=3))
    zero, one = body.const(0), body.const(1)
    start = body.op("Sub", body.op("Cast", body["lengths"], to=ir.DataType.INT64), seqlen)
    last = body.op("Add", body.op("Unsqueeze", start, body.const([1])), body.op("Range", zero, seqlen, one))
    positions = body.op("Range", zero, capacity, one)
    last = body.op("Unsqueeze", last, body.const([1, 3]))
    past = body.op("LessOrEqual", positions, last)
    if not windows:
        return past
    window = body.attribute("window")
    inside = body.op("Greater", positions, body.op("Sub", last, window))
    return body.op("And", past, body.op("Or", body.op("Equal", window, zero), inside))
