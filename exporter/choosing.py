"""How layers, or a predictor ahead of them, choose heads and neurons, as ONNX nodes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from shadowllm.exporter.builder import GraphBuilder
from shadowllm.exporter.nodes import as_float, cast, gemm, integer_gemm, product
from shadowllm.models import ModelSpec
from shadowllm.plugins import schemas
from shadowllm.predictor.networks import NORM_EPS
from shadowllm.predictor.weight_copy import COPY, copied


def choose_heads(g: GraphBuilder, spec: ModelSpec, layer: int, x: ir.Value, count: ir.Value) -> ir.Value:
    """The ``count`` heads that a linear map of the attention's input puts highest."""
    weight, bias = (g.weight(f"predictor.layers.{layer}.heads.{part}") for part in ("weight", "bias"))
    scores = g.op("Gemm", as_float(g, x), weight, bias, transB=1)
    return _choose(g, f"layers.{layer}.select_heads", scores, count, spec.n_heads, spec.heads_together)


def choose_neurons(g: GraphBuilder, spec: ModelSpec, layer: int, x: ir.Value, count: ir.Value, rank: int) -> ir.Value:
    """The ``count`` neurons that the layer's network, or the low-bit copy, puts highest."""
    if rank:
        place = f"predictor.layers.{layer}"
        scores = as_float(g, gemm(g, trunk(g, spec, f"{place}.trunk", x), [f"{place}.neurons"], bias=True, width=rank))
    else:
        scores = _copy_scores(g, spec, layer, x)
    return _choose(g, f"layers.{layer}.select_neurons", scores, count, spec.intermediate_size)


def trunk(g: GraphBuilder, spec: ModelSpec, name: str, x: ir.Value) -> ir.Value:
    """The hidden layer of a learned network, ``relu(T layer_norm(x) + t)``; see `networks.scores`."""
    ones = cast(g, g.constant(np.ones(spec.hidden_size, dtype=np.float32), "ones"))
    normed = g.op("LayerNormalization", x, ones, epsilon=NORM_EPS, axis=-1)
    return g.op("Relu", gemm(g, normed, [name], bias=True, width=spec.hidden_size))


def _copy_scores(g: GraphBuilder, spec: ModelSpec, layer: int, x: ir.Value) -> ir.Value:
    """The length of each neuron's contribution, going by the low-bit copy."""
    names = copied(spec, layer)
    biases = [g.weight(*(name.replace("weight", "bias") for name in names))] if spec.mlp_bias else []
    x, biases = as_float(g, x), [as_float(g, bias) for bias in biases]
    projected = integer_gemm(g, x, [f"copy.{name}" for name in names], biases, COPY, spec.hidden_size)
    return g.op("Mul", g.op("Abs", product(g, spec, projected)), g.weight(f"copy.layers.{layer}.lengths"))


def _choose(g: GraphBuilder, name: str, scores: ir.Value, count: ir.Value, width: int, together: int = 1) -> ir.Value:
    """Indices ``(width,)`` of the largest of ``(tokens, width)`` scores on average: one choice for all tokens."""
    mean = g.op("ReduceMean", scores, g.ints([0]), keepdims=1)
    return g.op("Reshape", select(g, name, mean, g.op("Unsqueeze", count, g.ints([0])), width, together), g.ints([-1]))


def select(g: GraphBuilder, name: str, scores: ir.Value, counts: ir.Value, width: int, together: int = 1) -> ir.Value:
    """Indices ``(rows, width)`` of the ``counts`` largest of each row of scores.

    Args:
        together: so many neighbours are chosen as one. All get the sum of their scores, so that ties, which go
            to the lower index, fall in whole groups.
    """
    if together > 1:
        groups = g.op("Reshape", scores, g.ints([-1, width // together, together]))
        sums = g.op("ReduceSum", groups, g.ints([2]), keepdims=1)
        scores = g.op("Reshape", g.op("Expand", sums, g.ints([1, 1, together])), g.ints([-1, width]))
    return g.custom(schemas.SELECT_TOPK, name, {"scores": scores, "counts": counts}, cap=width)
