"""The ONNX function body of ``SelectTopK``; see `plugins.function_body`."""

from __future__ import annotations

import onnx_ir as ir

from shadowllm.plugins.function_body import FunctionBody, FunctionForm
from shadowllm.plugins.ops.select_topk.schema import SELECT_TOPK


def function_body(_form: FunctionForm) -> ir.Function:
    """The body, which is the same for every form of model."""
    body = FunctionBody(SELECT_TOPK)
    counts = body.op("Unsqueeze", body.op("Cast", body["counts"], to=ir.DataType.INT64), body.const([1]))
    found = body.best(body["scores"], body.attribute("cap"), counts)
    return body.finish(body.op("Cast", found, to=ir.DataType.INT32))
