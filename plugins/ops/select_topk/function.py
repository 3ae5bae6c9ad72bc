"""The ONNX function body of ``SelectTopK``; see `plugins.function_body`."""

from __future__ import annotations

import onnx_ir as ir

from shadowllm.plugins.function_body import FunctionBody, FunctionForm
from shadowllm.plugins.ops.select_topk.schema import SELECT_TOPK


def function_body(_form: FunctionForm) -> ir.Function:
    """The body, which is the same for every form of model."""
    body = FunctionBody(SELECT_TOPK)
    cap = body.attribute("cap")
    k = body.op("Reshape", cap, body.const([1]))
    # Best first, ties to the lower index. Indices past the count are replaced by a bound that
    # sorts last, so that one ascending sort puts the selected indices first.
    _, order = body.pair("TopK", body["scores"], k, largest=1, sorted=1)
    rank = body.op("Unsqueeze", body.op("Range", body.const(0), cap, body.const(1)), body.const([0]))
    counts = body.op("Unsqueeze", body.op("Cast", body["counts"], to=ir.DataType.INT64), body.const([1]))
    chosen = body.op("Less", rank, counts)
    bound = body.op("Shape", body["scores"], start=1, end=2)
    ascending, _ = body.pair("TopK", body.op("Where", chosen, order, bound), k, largest=0, sorted=1)
    padded = body.op("Where", chosen, ascending, body.const(-1))
    return body.finish(body.op("Cast", padded, to=ir.DataType.INT32))
