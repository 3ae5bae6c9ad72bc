"""The ONNX function body of ``SparseAttention``; see `plugins.function_body`."""

from __future__ import annotations

import math

import onnx_ir as ir

from shadowllm.bundle.quantisation import Quantisation
from shadowllm.plugins.function_body import FunctionBody, FunctionForm
from shadowllm.plugins.ops.sparse_attention.schema import SPARSE_ATTENTION


def function_body(form: FunctionForm) -> ir.Function:
    """Gather the rows and KV heads of the active heads, then compute ordinary attention; with copies, of all heads."""
    body = FunctionBody(SPARSE_ATTENTION)
    heads = _choose(body, form) if form.head_groups else body.active()
    y = _with_rest(body, form, heads, form.rest) if form.rest else _of_active(body, form, heads)
    y = body.op("Add", y, body["b_o"]) if form.o_bias else y
    return body.finish(y, body.padded(heads, body.const([form.n_heads]))) if form.head_groups else body.finish(y)


def _choose(body: FunctionBody, form: FunctionForm) -> ir.Value:
    """The heads of the groups with the largest mean scores."""
    together = form.n_heads // form.head_groups
    x = body.op("Cast", body["x"], to=ir.DataType.FLOAT)
    scores = body.op(
        "ReduceMean", body.project(x, body["score_weight"], body["score_bias"]), body.const([0, 1]), keepdims=0
    )
    groups = body.choose(scores, body.op("Div", body.counted(), body.const(together)))
    first = body.op("Unsqueeze", body.op("Mul", groups, body.const(together)), body.const([1]))
    return body.op("Reshape", body.op("Add", first, body.const(range(together))), body.const([-1]))


def _of_active(body: FunctionBody, form: FunctionForm, heads: ir.Value) -> ir.Value:
    def pick(weight: ir.Value) -> ir.Value:
        return _head_rows(body, form, weight, heads)

    query = body.project(body["x"], body.matrix("q", pick, form), _head_bias(body, form, heads))
    return body.op("MatMul", _attend(body, form, query, heads), body.matrix("o", pick, form))


def _with_rest(body: FunctionBody, form: FunctionForm, heads: ir.Value, copy: Quantisation) -> ir.Value:
    """All heads; those that are not active have their rows from the copy, and add nothing where ``rest`` is 0."""
    full = body.full(heads, body.const([form.n_heads]))
    shape = body.const([form.n_heads, form.head_dim])
    full_rows, rest_rows = (
        body.op("Reshape", body.op("Expand", body.op("Unsqueeze", mask, body.const([1])), shape), body.const([-1]))
        for mask in (full, body.of_rest(full))
    )
    bias = body["b_q"] if form.qkv_bias else None
    w_q, w_o = (body.matrix(part, lambda weight: weight, form) for part in ("q", "o"))
    exact, low = (body.project(body["x"], weight, bias) for weight in (w_q, body.low_bit("q", copy)))
    context = _attend(body, form, body.op("Where", full_rows, exact, low), body.const(range(form.n_heads)))
    y = body.op("MatMul", body.where(full_rows, context), w_o)
    return body.op("Add", y, body.op("MatMul", body.where(rest_rows, context), body.low_bit("o", copy)))


def _attend(body: FunctionBody, form: FunctionForm, query: ir.Value, heads: ir.Value) -> ir.Value:
    """The attention of queries ``(B, S, n*d)`` of these heads over the cache, ``(B, S, n*d)``."""
    query = body.op("Reshape", query, body.const([0, 0, -1, form.head_dim]))
    query = body.op("Transpose", query, perm=[0, 2, 1, 3])
    if form.rope:
        query = body.op("RotaryEmbedding", query, body["cos"], body["sin"])
    group = body.const(form.n_heads // form.n_kv_heads)
    kv_heads = body.op("Div", heads, group)
    key, value = (body.op("Gather", body[name], kv_heads, axis=1) for name in ("key", "value"))
    context = body.op("Attention", query, key, value, _visible(body), scale=1 / math.sqrt(form.head_dim))
    context = body.op("Transpose", context, perm=[0, 2, 1, 3])
    return body.op(
        "Reshape", context, body.op("Concat", body.op("Shape", body["x"], start=0, end=2), body.const([-1]), axis=0)
    )


def _head_rows(body: FunctionBody, form: FunctionForm, weight: ir.Value, heads: ir.Value) -> ir.Value:
    """The rows of the active heads, from a matrix of ``H*d`` rows."""
    size = body.op("Shape", weight, start=1, end=2)
    blocks = body.op("Reshape", weight, body.op("Concat", body.const([form.n_heads, form.head_dim]), size, axis=0))
    return body.op(
        "Reshape", body.op("Gather", blocks, heads, axis=0), body.op("Concat", body.const([-1]), size, axis=0)
    )


def _head_bias(body: FunctionBody, form: FunctionForm, heads: ir.Value) -> ir.Value | None:
    if not form.qkv_bias:
        return None
    blocks = body.op("Reshape", body["b_q"], body.const([form.n_heads, form.head_dim]))
    return body.op("Reshape", body.op("Gather", blocks, heads, axis=0), body.const([-1]))


def _visible(body: FunctionBody) -> ir.Value:
    """Boolean mask (B, 1, S, C): query s of row b sees positions up to lengths[b] - S + s."""
    seqlen = body.op("Squeeze", body.op("Shape", body["x"], start=1, end=2))
    capacity = body.op("Squeeze", body.op("Shape", body["key"], start=2, end=3))
    zero, one = body.const(0), body.const(1)
    start = body.op("Sub", body.op("Cast", body["lengths"], to=ir.DataType.INT64), seqlen)
    last = body.op("Add", body.op("Unsqueeze", start, body.const([1])), body.op("Range", zero, seqlen, one))
    positions = body.op("Range", zero, capacity, one)
    return body.op("LessOrEqual", positions, body.op("Unsqueeze", last, body.const([1, 3])))
