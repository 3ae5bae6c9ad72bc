"""The ONNX function body of ``SparseMLP``; see `plugins.function_body`."""

from __future__ import annotations

import onnx_ir as ir

from shadowllm.plugins.function_body import FunctionBody, FunctionForm
from shadowllm.plugins.ops.sparse_mlp.schema import SPARSE_MLP


def function_body(form: FunctionForm) -> ir.Function:
    """Gather the active rows of each matrix, then compute a dense MLP."""
    body = FunctionBody(SPARSE_MLP)
    rows = body.active()

    def pick(weight: ir.Value) -> ir.Value:
        return body.op("Gather", weight, rows, axis=0)

    def project(part: str) -> ir.Value:
        weight = body.matrix(part, pick, form)
        bias = body.op("Gather", body[f"b_{part}"], rows, axis=0) if form.mlp_bias else None
        return body.project(body["x"], weight, bias)

    up = project("up")
    hidden = (
        body.op("Mul", body.activate(form.activation, project("gate")), up)
        if form.gated
        else body.activate(form.activation, up)
    )
    y = body.op("MatMul", hidden, body.matrix("down", pick, form))
    return body.finish(body.op("Add", y, body["b_down"]) if form.mlp_bias else y)
