"""The ONNX function body of ``SparseAttention``; see `plugins.function_body`."""

from __future__ import annotations

import math

import onnx_ir as ir

from shadowllm.plugins.function_body import FunctionBody, FunctionForm
from shadowllm.plugins.ops.sparse_attention.schema import SPARSE_ATTENTION


def function_body(form: FunctionForm) -> ir.Function:
    """Gather the rows and KV heads of the active heads, then compute ordinary attention."""
    body = FunctionBody(SPARSE_ATTENTION)
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
