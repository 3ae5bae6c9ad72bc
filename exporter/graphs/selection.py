"""The selection of heads and neurons as ONNX nodes, in each layer or in an upfront predictor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from shadowllm.bundle.quantisation import LOW_BIT_COPY
from shadowllm.bundle.weight_names import copied, down_norms, integers, low_bit_copy, scales
from shadowllm.exporter.graphs.builder import GraphBuilder
from shadowllm.exporter.graphs.nodes import activation_attributes, as_float, batched, cast, gemm
from shadowllm.models.spec import ModelSpec
from shadowllm.plugins.ops.score_neurons.schema import SCORE_NEURONS
from shadowllm.plugins.ops.select_topk.schema import SELECT_TOPK
from shadowllm.predictor.networks import NORM_EPS


@dataclass(frozen=True)
class Networks:
    """The networks that score neurons in each layer: their rank, and whether they see the layer norm of their input."""

    rank: int
    normed: bool


def choose_heads(g: GraphBuilder, spec: ModelSpec, layer: int, x: ir.Value, count: ir.Value) -> ir.Value:
    """Select the ``count`` heads with the highest scores; the scores are a linear map of the attention's input."""
    weight, bias = (g.weight(f"predictor.layers.{layer}.heads.{part}") for part in ("weight", "bias"))
    scores = mean(g, g.op("Gemm", as_float(g, x), weight, bias, transB=1), selections(g, count), spec.n_heads)
    return _choose(g, f"layers.{layer}.select_heads", scores, count, spec.n_heads, spec.heads_together)


def choose_neurons(
    g: GraphBuilder,
    spec: ModelSpec,
    layer: int,
    x: ir.Value,
    tokens: ir.Value,
    count: ir.Value,
    networks: Networks | None,
) -> ir.Value:
    """Select the ``count`` neurons that the layer's network or its low-bit copy scores highest.

    Args:
        tokens: int64 ``[2]``, batch and seqlen of x.
        networks: the form of the layer's network; None for the copy.
    """
    if networks:
        place = f"predictor.layers.{layer}"
        z = trunk(g, spec, f"{place}.trunk", x, networks.normed)
        scores = as_float(g, gemm(g, z, [f"{place}.neurons"], True, networks.rank))
        scores = mean(g, scores, selections(g, count), spec.intermediate_size)
    else:
        scores = _copy_scores(g, spec, layer, batched(g, spec, tokens, x), count)
    return _choose(g, f"layers.{layer}.select_neurons", scores, count, spec.intermediate_size)


def trunk(g: GraphBuilder, spec: ModelSpec, name: str, x: ir.Value, normed: bool = True) -> ir.Value:
    """The hidden layer of a learned network, ``relu(T layer_norm(x) + t)``; see `networks.scores`."""
    if normed:
        ones = cast(g, g.constant(np.ones(spec.hidden_size, dtype=np.float32), "ones"))
        x = g.op("LayerNormalization", x, ones, epsilon=NORM_EPS, axis=-1)
    return g.op("Relu", gemm(g, x, [name], True, spec.hidden_size))


def _copy_scores(g: GraphBuilder, spec: ModelSpec, layer: int, x: ir.Value, count: ir.Value) -> ir.Value:
    """The norm of each neuron's output, estimated with the low-bit copy, ``(R, intermediate_size)``."""
    copies = [low_bit_copy(name) for name in copied(spec, layer)]
    biased = (("gate", "up") if spec.gated else ("up",)) if spec.mlp_bias else ()
    blocks = (LOW_BIT_COPY.blocks(spec.hidden_size), LOW_BIT_COPY.block * LOW_BIT_COPY.bits // 8)
    scores = g.custom(
        SCORE_NEURONS,
        f"layers.{layer}.score_neurons",
        {
            "x": x,
            "copy": g.weight(*map(integers, copies), inner=blocks),
            "scales": g.weight(*map(scales, copies)),
            # Not stacked, as in the layer itself: TensorRT needs one size for all tensors at one file offset.
            **{f"b_{part}": g.weight(f"layers.{layer}.{part}_proj.bias") for part in biased},
            "down_norms": g.weight(down_norms(layer)),
            "count": count,
        },
        **activation_attributes(spec),
        layer=layer,
    )
    # Set here, because nothing infers them after the function body is removed.
    scores.dtype, scores.shape = ir.DataType.FLOAT, ir.Shape([1, spec.intermediate_size])
    return scores


def counts_of(g: GraphBuilder, count: ir.Value) -> ir.Value:
    """The counts ``(R,)`` of R selections, from ``()`` if there is one for all sequences, or ``(batch,)``."""
    return g.op("Reshape", count, g.ints([-1]))


def selections(g: GraphBuilder, count: ir.Value) -> ir.Value:
    """The number of selections R, int64 ``[1]``."""
    return g.op("Shape", counts_of(g, count))


def mean(g: GraphBuilder, scores: ir.Value, size: ir.Value, width: int) -> ir.Value:
    """The mean ``(R, width)`` of ``(tokens, width)`` scores over the tokens of each selection; ``size`` is ``[R]``."""
    shape = g.op("Concat", size, g.ints([-1, width]), axis=0)
    return g.op("ReduceMean", g.op("Reshape", scores, shape), g.ints([1]), keepdims=0)


def _choose(g: GraphBuilder, name: str, scores: ir.Value, count: ir.Value, width: int, together: int = 1) -> ir.Value:
    """Indices of the largest of ``(R, width)`` scores, with the dimensions of ``count`` and the width."""
    indices = select(g, name, scores, counts_of(g, count), width, together)
    shape = g.op("Concat", g.op("Shape", count), g.ints([width]), axis=0)
    return g.op("Reshape", indices, shape)


def select(g: GraphBuilder, name: str, scores: ir.Value, counts: ir.Value, width: int, together: int = 1) -> ir.Value:
    """Indices ``(rows, width)`` of the ``counts`` largest scores of each row.

    Args:
        together: size of a group of neighbours that are selected together. Each gets the sum of the group's
            scores. Ties go to the lower index, so whole groups are selected.
    """
    if together > 1:
        groups = g.op("Reshape", scores, g.ints([-1, width // together, together]))
        sums = g.op("ReduceSum", groups, g.ints([2]), keepdims=1)
        scores = g.op("Reshape", g.op("Expand", sums, g.ints([1, 1, together])), g.ints([-1, width]))
    return g.custom(SELECT_TOPK, name, {"scores": scores, "counts": counts}, cap=width)
