"""The parts of layers as ONNX nodes: embeddings, norms, matrix products, activations.

Hidden states are 2-D, ``(batch*seqlen, hidden_size)``, because ``Gemm`` takes 2-D inputs. ``Gemm`` reads weights
in the layout of the sparse ops (``transB``), so both read the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
import onnx_ir as ir

from shadowllm.bundle.quantisation import ACCURACY_LEVEL, Quantisation
from shadowllm.bundle.weight_names import integers, low_bit_copy, residual, scales, transposed
from shadowllm.exporter.graphs.builder import GraphBuilder
from shadowllm.models.spec import ModelSpec
from shadowllm.plugins.activation_nodes import activate, times_up


def cast(g: GraphBuilder, x: ir.Value) -> ir.Value:
    """Cast a float32 value to the graph's dtype."""
    return x if g.dtype == ir.DataType.FLOAT else g.op("Cast", x, to=g.dtype)


def as_float(g: GraphBuilder, x: ir.Value) -> ir.Value:
    """Cast a value of the graph's dtype to float32."""
    return x if g.dtype == ir.DataType.FLOAT else g.op("Cast", x, to=ir.DataType.FLOAT)


def embed(g: GraphBuilder, spec: ModelSpec, input_ids: ir.Value, position_ids: ir.Value) -> ir.Value:
    """Token and learned position embeddings, ``(batch*seqlen, hidden_size)``."""
    flat = g.op("Reshape", input_ids, g.ints([-1]))
    x = _embedding_rows(g, spec, flat)
    if spec.positions == "rope":
        return x
    places = g.op("Add", g.op("Reshape", position_ids, g.ints([-1])), g.ints(spec.position_offset))
    return g.op("Add", x, g.op("Gather", g.weight("embed_positions.weight"), places, axis=0))


def _embedding_rows(g: GraphBuilder, spec: ModelSpec, ids: ir.Value) -> ir.Value:
    name, q = "embed_tokens.weight", g.quantisation
    if q is None:
        return g.op("Gather", g.weight(name), ids, axis=0)

    def rows(data: ir.Value, factors: ir.Value, q: Quantisation) -> ir.Value:
        sizes = {"gather_axis": 0, "quantize_axis": 1, "block_size": q.block, "bits": q.bits}
        return g.microsoft("GatherBlockQuantized", data, ids, factors, **sizes)

    if not q.residual_bits:
        return rows(g.weight(integers(name)), g.weight(scales(name)), q)
    factors = g.weight(scales(low_bit_copy(name)))
    copy = rows(g.weight(integers(low_bit_copy(name))), factors, q.copy)
    x = add_residual(g, copy, rows(g.weight(residual(name)), factors, q.residual), q)
    if spec.hidden_size % q.block == 0:
        return x
    return g.op("Slice", x, g.ints([0]), g.ints([spec.hidden_size]), g.ints([1]))  # without the padding of rows


def add_residual(g: GraphBuilder, copy: ir.Value, rest: ir.Value, q: Quantisation) -> ir.Value:
    """Add what the residual gives with the scales of the copy to what the copy gives."""
    step = g.constant(np.array(q.residual_step, dtype=np.float32), "residual_step")
    return g.op("Add", copy, g.op("Mul", rest, step))


def batched(g: GraphBuilder, spec: ModelSpec, tokens: ir.Value, x: ir.Value) -> ir.Value:
    """Reshape hidden states to the form that the custom ops take, ``(batch, seqlen, hidden_size)``.

    Args:
        tokens: int64 ``[2]``, batch and seqlen.
    """
    y = g.op("Reshape", x, g.shape(tokens, [spec.hidden_size]))
    # Shape inference cannot evaluate the computed shape, and a custom op's output shape depends on its input's.
    y.dtype, y.shape = g.dtype, ir.Shape(["batch", "seqlen", spec.hidden_size])
    return y


def norm(g: GraphBuilder, spec: ModelSpec, name: str, x: ir.Value) -> ir.Value:
    """LayerNorm or RMSNorm over the last axis."""
    weight = g.weight(f"{name}.weight")
    if spec.norm == "layernorm":
        return g.op("LayerNormalization", x, weight, g.weight(f"{name}.bias"), epsilon=spec.norm_eps, axis=-1)
    return g.op("RMSNormalization", x, weight, epsilon=spec.norm_eps, axis=-1)


Block = Literal["attention", "mlp"]
# The norm of the input of a block in a pre-norm model, or of the sum of input and output in a post-norm model.
NORM: dict[Block, str] = {"attention": "input_norm", "mlp": "post_norm"}


def block_input(g: GraphBuilder, spec: ModelSpec, layer: int, block: Block, x: ir.Value) -> ir.Value:
    """What attention or MLP reads: the normed hidden states, or in a post-norm model the hidden states."""
    return norm(g, spec, f"layers.{layer}.{NORM[block]}", x) if spec.pre_norm else x


def block_output(g: GraphBuilder, spec: ModelSpec, layer: int, block: Block, x: ir.Value, y: ir.Value) -> ir.Value:
    """The hidden states after attention or MLP, whose output is y."""
    if spec.output_norms:
        y = norm(g, spec, f"layers.{layer}.{block}_output_norm", y)
    x, name = g.op("Add", x, y), f"layers.{layer}.{NORM[block]}"
    return x if spec.pre_norm or name not in spec.norms_of(layer) else norm(g, spec, name, x)


def head_norms(g: GraphBuilder, spec: ModelSpec, layer: int, projected: ir.Value) -> ir.Value:
    """RMSNorm of each head of query and key, in ``(batch*seqlen, (n_heads + 2*n_kv_heads)*head_dim)`` of q, k and v."""
    heads = [spec.n_heads, spec.n_kv_heads, spec.n_kv_heads]
    x = g.op("Reshape", projected, g.ints([-1, sum(heads), spec.head_dim]))
    query, key, value = g.split(x, heads, axis=1)
    query, key = (
        g.op("RMSNormalization", part, g.weight(f"layers.{layer}.{name}_norm.weight"), epsilon=spec.norm_eps, axis=-1)
        for name, part in (("q", query), ("k", key))
    )
    joined = g.op("Concat", query, key, value, axis=1)
    return g.op("Reshape", joined, g.ints([-1, sum(heads) * spec.head_dim]))


def gemm(g: GraphBuilder, x: ir.Value, names: list[str], bias: bool, width: int, *, rows_out: bool = True) -> ir.Value:
    """Multiply ``x`` by one stored matrix, or by several stacked ones.

    Args:
        width: width of ``x``; rows of integers may be padded to a larger one.
        rows_out: whether the matrix's rows are output channels (q, k, v, gate, up) or input channels (o, down).
    """
    biases = [g.weight(*(f"{name}.bias" for name in names))] if bias else []
    matrices = [f"{name}.weight" for name in names]
    if g.quantisation:
        stored = matrices if rows_out else [transposed(name) for name in matrices]
        return _integer_gemm(g, x, stored, biases, g.quantisation, width)
    return g.op("Gemm", x, g.weight(*matrices), *biases, transB=int(rows_out))


def _integer_gemm(
    g: GraphBuilder, x: ir.Value, matrices: list[str], biases: list[ir.Value], q: Quantisation, width: int
) -> ir.Value:
    """Multiply with ``MatMulNBits``; the rows of its matrices are output channels.

    With nested integers, the products of the copy and of the residual are added.
    """
    stored = [low_bit_copy(name) for name in matrices] if q.residual_bits else matrices
    factors = g.weight(*map(scales, stored))
    n_out, blocks = map(int, factors.shape)  # type: ignore[arg-type]

    def product(names: Iterable[str], q: Quantisation, biases: list[ir.Value]) -> ir.Value:
        data = g.weight(*names, inner=(blocks, q.block * q.bits // 8))
        inputs = [x, data, factors] + ([None, None, *biases] if biases else [])
        sizes = {"K": width, "N": n_out, "bits": q.bits, "block_size": q.block}
        return g.microsoft("MatMulNBits", *inputs, **sizes, accuracy_level=ACCURACY_LEVEL)

    if not q.residual_bits:
        return product(map(integers, stored), q, biases)
    copy = product(map(integers, stored), q.copy, biases)
    return add_residual(g, copy, product(map(residual, matrices), q.residual, []), q)


def activation_attributes(spec: ModelSpec) -> dict[str, int | float | str]:
    """The activation as attributes of an op; a threshold only if the activation has one."""
    threshold: dict[str, int | float | str] = {"threshold": spec.activation_threshold}
    return {"activation": spec.activation, **(threshold if spec.activation == "fatrelu" else {})}


def mlp_activation(g: GraphBuilder, spec: ModelSpec, projected: ir.Value) -> ir.Value:
    """The input of the down projection, from the output of gate and up side by side, or of up."""
    parts = g.split(projected, [spec.intermediate_size] * (1 + spec.gated), axis=1)
    active = activate(g, spec.activation, spec.activation_threshold, parts[0])
    return times_up(g, spec.activation, active, parts[1]) if spec.gated else active
