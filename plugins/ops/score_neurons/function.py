"""The ONNX function body of ``ScoreNeurons``; see `plugins.function_body`."""

from __future__ import annotations

import onnx_ir as ir

from shadowllm.bundle.quantisation import ACCURACY_LEVEL
from shadowllm.plugins.function_body import MICROSOFT, FunctionBody, FunctionForm
from shadowllm.plugins.ops.score_neurons.schema import SCORE_NEURONS


def function_body(form: FunctionForm) -> ir.Function | None:
    """The body, with ``MatMulNBits`` of ONNX Runtime, which is the fastest product with packed integers.

    Returns:
        None for a model without a low-bit copy.
    """
    copy = form.copy
    if copy is None:
        return None
    body = FunctionBody(SCORE_NEURONS)
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
        gate, up = body.pair("Split", projected, axis=1, num_outputs=2)
        product = body.product(form, gate, up)
    else:
        product = body.product(form, projected)
    mean = body.mean(body.op("Abs", product), body.op("Shape", body["down_norms"]))
    return body.finish(body.op("Mul", mean, body["down_norms"]))


def _copy_bias(body: FunctionBody, form: FunctionForm) -> ir.Value:
    return body.op("Concat", body["b_gate"], body["b_up"], axis=0) if form.gated else body["b_up"]
