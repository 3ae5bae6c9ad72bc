"""Dense and sparse decoder layers as ONNX nodes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from shadowllm.bundle.weight_names import down_norms
from shadowllm.exporter.graphs.builder import GraphBuilder
from shadowllm.exporter.graphs.nodes import (
    activation_attributes,
    batched,
    block_input,
    block_output,
    cast,
    gemm,
    head_norms,
    mlp_activation,
)
from shadowllm.exporter.graphs.selection import Networks, choose_heads, choose_neurons
from shadowllm.models.rope import RopeSpec
from shadowllm.models.sparsity import Unit
from shadowllm.models.spec import ModelSpec
from shadowllm.plugins.ops.sparse_attention.schema import SPARSE_ATTENTION
from shadowllm.plugins.ops.sparse_mlp.schema import SPARSE_MLP
from shadowllm.plugins.schema import Attributes, OpSchema


@dataclass(frozen=True)
class Step:
    """Values that all layers of a graph share; they are computed once, from the position ids.

    Attributes:
        tokens: int64 ``[2]``, batch and seqlen.
        write_indices: int64 ``(batch,)``, cache position of this step's first token.
        visible: bool ``(batch, 1, seqlen, capacity)``, the attention mask of each window of the dense layers.
        lengths: int32 ``(batch,)``, tokens in the cache after this step's tokens are written; None if no sparse
            layer needs it.
        rotary: cos and sin ``(batch, seqlen, head_dim/2)`` of each RoPE of the model.
    """

    tokens: ir.Value
    write_indices: ir.Value
    visible: Mapping[int | None, ir.Value]
    lengths: ir.Value | None
    rotary: Mapping[RopeSpec, tuple[ir.Value, ir.Value]]


@dataclass(frozen=True)
class Cache:
    """Keys and values of one layer, ``(batch, n_kv_heads, capacity, head_dim)`` each."""

    key: ir.Value
    value: ir.Value


@dataclass(frozen=True)
class Selection:
    """The selection of all sparse layers, as graph values.

    Attributes:
        tensors: indices and counts, as in `bundle.selection_names`. If the indices are None, each layer selects. Units
            that are missing are all active.
        networks: the networks with which layers select neurons; None if they use the low-bit copy.
        rest: int32 ``()``, whether the other units are computed from the low-bit copy; None if they are dropped.
        gate_first: the active neurons are those whose gate is not zero.
    """

    tensors: Mapping[Unit, tuple[ir.Value | None, ir.Value]]
    networks: Networks | None = None
    rest: ir.Value | None = None
    gate_first: bool = False

    def row(self, g: GraphBuilder, unit: Unit, row: int) -> tuple[ir.Value | None, ir.Value]:
        """One layer's indices ``(n_units,)`` or None, and its count ``()``."""
        indices, counts = self.tensors[unit]
        count = g.op("Gather", counts, g.ints(row), axis=0)
        return None if indices is None else g.op("Gather", indices, g.ints(row), axis=0), count


def step(
    g: GraphBuilder,
    spec: ModelSpec,
    position_ids: ir.Value,
    capacity_of: ir.Value,
    *,
    dense: Sequence[int],
    sparse: bool,
) -> Step:
    """Compute masks, lengths and rotary tables from ``position_ids``, int64 ``(batch, seqlen)``.

    Args:
        dense: the layers whose attention has all heads.
        sparse: whether other layers have selected heads.
    """
    first, last = (g.op("Gather", position_ids, g.ints(i), axis=1) for i in (0, -1))
    visible = _masks(g, position_ids, capacity_of, [spec.window_of(layer) for layer in dense]) if dense else {}
    lengths = g.op("Cast", g.op("Add", last, g.ints(1)), to=ir.DataType.INT32) if sparse else None
    ropes = filter(None, (spec.rope, spec.second_rope))
    rotary = {rope: _rotary(g, spec, rope, position_ids, f"rope_{i}") for i, rope in enumerate(ropes)}
    return Step(g.op("Shape", position_ids), first, visible, lengths, rotary)


def _masks(
    g: GraphBuilder, position_ids: ir.Value, capacity_of: ir.Value, windows: Sequence[int | None]
) -> dict[int | None, ir.Value]:
    """The mask of each window: a token at position p sees positions p - window + 1 .. p; without a window, 0 .. p."""
    capacity = g.op("Squeeze", g.op("Shape", capacity_of, start=2, end=3))
    slots = g.op("Range", g.ints(0), capacity, g.ints(1))
    positions = g.op("Unsqueeze", position_ids, g.ints([1, 3]))
    past = g.op("LessOrEqual", slots, positions)
    return {
        window: past
        if window is None
        else g.op("And", past, g.op("Greater", slots, g.op("Sub", positions, g.ints(window))))
        for window in dict.fromkeys(windows)
    }


def _rotary(
    g: GraphBuilder, spec: ModelSpec, rope: RopeSpec, position_ids: ir.Value, name: str
) -> tuple[ir.Value, ir.Value]:
    # In float32 for every dtype of the model: 16-bit angles are wrong after a few hundred positions.
    positions = g.op("Cast", g.op("Unsqueeze", position_ids, g.ints([2])), to=ir.DataType.FLOAT)
    angles = g.op("Mul", positions, g.constant(rope.inverse_frequencies(spec.head_dim), f"{name}.inverse_frequencies"))
    cos, sin = g.op("Cos", angles), g.op("Sin", angles)
    if rope.amplitude != 1:
        amplitudes = g.constant(rope.amplitudes(spec.head_dim), f"{name}.amplitudes")
        cos, sin = (g.op("Mul", table, amplitudes) for table in (cos, sin))
    return cast(g, cos), cast(g, sin)


def dense_layer(
    g: GraphBuilder, spec: ModelSpec, layer: int, x: ir.Value, step: Step, cache: Cache
) -> tuple[ir.Value, Cache]:
    """One layer with all heads and neurons; returns hidden states and the updated cache."""
    y, cache = _dense_attention(g, spec, layer, block_input(g, spec, layer, "attention", x), step, cache)
    x = block_output(g, spec, layer, "attention", x, y)
    y = _dense_mlp(g, spec, layer, block_input(g, spec, layer, "mlp", x))
    return block_output(g, spec, layer, "mlp", x, y), cache


def _dense_attention(
    g: GraphBuilder, spec: ModelSpec, layer: int, normed: ir.Value, step: Step, cache: Cache
) -> tuple[ir.Value, Cache]:
    """The attention of all heads, and the updated cache."""
    place = f"layers.{layer}"
    both = gemm(g, normed, [f"{place}.{part}_proj" for part in "qkv"], spec.qkv_bias, spec.hidden_size)
    query, cache = to_cache(g, spec, layer, step, cache, both, spec.n_heads)
    visible = step.visible[spec.window_of(layer)]
    context = g.op("Attention", query, cache.key, cache.value, visible, scale=1 / math.sqrt(spec.head_dim))
    context = g.op("Reshape", g.op("Transpose", context, perm=[0, 2, 1, 3]), g.ints([-1, spec.n_heads * spec.head_dim]))
    width = spec.n_heads * spec.head_dim
    return gemm(g, context, [f"{place}.o_proj"], spec.o_bias, width, rows_out=False), cache


def _dense_mlp(g: GraphBuilder, spec: ModelSpec, layer: int, x: ir.Value) -> ir.Value:
    place = f"layers.{layer}"
    parts = ("gate_proj", "up_proj") if spec.gated else ("up_proj",)
    both = gemm(g, x, [f"{place}.{part}" for part in parts], spec.mlp_bias, spec.hidden_size)
    hidden = mlp_activation(g, spec, both)
    return gemm(g, hidden, [f"{place}.down_proj"], spec.mlp_bias, spec.intermediate_size, rows_out=False)


def sparse_layer(
    g: GraphBuilder, spec: ModelSpec, layer: int, row: int, x: ir.Value, step: Step, cache: Cache, selection: Selection
) -> tuple[ir.Value, Cache, dict[Unit, ir.Value]]:
    """One layer with selected query heads, if they are part of the selection, and selected neurons.

    K and V are computed for all heads.

    Args:
        row: the layer's row in the selection.

    Returns:
        Hidden states, the updated cache, and the active indices of the selection's units, ``(n_units,)`` each.
    """
    place, chosen = f"layers.{layer}", dict[Unit, ir.Value]()
    normed = block_input(g, spec, layer, "attention", x)
    if spec.selects_heads and "heads" in selection.tensors:
        both = gemm(g, normed, [f"{place}.k_proj", f"{place}.v_proj"], spec.qkv_bias, spec.hidden_size)
        _, cache = to_cache(g, spec, layer, step, cache, both, 0)
        y, chosen["heads"] = _sparse_attention(g, spec, layer, row, normed, step, cache, selection)
    else:
        y, cache = _dense_attention(g, spec, layer, normed, step, cache)
        if "heads" in selection.tensors:
            chosen["heads"] = _every_head(g, spec, selection, row)
    x = block_output(g, spec, layer, "attention", x, y)
    normed = block_input(g, spec, layer, "mlp", x)
    y, chosen["neurons"] = _sparse_mlp(g, spec, layer, row, normed, step, selection)
    return block_output(g, spec, layer, "mlp", x, y), cache, chosen


def _every_head(g: GraphBuilder, spec: ModelSpec, selection: Selection, row: int) -> ir.Value:
    """The indices of all heads, in the shape of a selection."""
    _, count = selection.row(g, "heads", row)
    shape = g.op("Concat", g.op("Shape", count), g.ints([spec.n_heads]), axis=0)
    return g.op("Expand", g.constant(np.arange(spec.n_heads, dtype=np.int32), "all_heads"), shape)


def _sparse_attention(
    g: GraphBuilder,
    spec: ModelSpec,
    layer: int,
    row: int,
    normed: ir.Value,
    step: Step,
    cache: Cache,
    selection: Selection,
) -> tuple[ir.Value, ir.Value]:
    """The attention of the selected heads, and their indices ``(n_heads,)``."""
    place = f"layers.{layer}"
    indices, count = selection.row(g, "heads", row)
    rope = spec.rope_of(layer)
    scores: dict[str, ir.Value | None] = {}
    if indices is None and selection.rest is None:
        indices = choose_heads(g, spec, layer, normed, count)
    elif indices is None:
        scores = {f"score_{part}": g.weight(f"predictor.{place}.heads.{part}") for part in ("weight", "bias")}
    inputs = {
        "x": batched(g, spec, step.tokens, normed),
        "key": cache.key,
        "value": cache.value,
        "lengths": step.lengths,
        "indices": indices,
        "count": count,
        **_rows(g, place, "q", spec.qkv_bias),
        **_rows(g, place, "o", spec.o_bias),
        **dict(zip(("cos", "sin"), step.rotary[rope], strict=True) if rope else ()),
        **_rest(g, place, selection, "q", "o"),
        **scores,
    }
    attributes = {"n_heads": spec.n_heads, "layer": layer}
    if spec.window is not None:  # all nodes have it, because the function body reads it
        attributes["window"] = spec.window_of(layer) or 0
    return _selected(g, spec, SPARSE_ATTENTION, f"{place}.attention", inputs, attributes)


def _sparse_mlp(
    g: GraphBuilder, spec: ModelSpec, layer: int, row: int, normed: ir.Value, step: Step, selection: Selection
) -> tuple[ir.Value, ir.Value]:
    """The MLP of the selected neurons, and their indices ``(intermediate_size,)``."""
    place = f"layers.{layer}"
    parts = ("gate", "up", "down") if spec.gated else ("up", "down")
    indices, count = selection.row(g, "neurons", row)
    # The op itself scores with its low-bit copy, or computes the gates first.
    inside = selection.gate_first or (selection.rest is not None and selection.networks is None)
    if indices is None and not inside:
        indices = choose_neurons(g, spec, layer, normed, step.tokens, count, selection.networks)
    inputs = {
        "x": batched(g, spec, step.tokens, normed),
        "indices": indices,
        "count": count,
        **{name: value for part in parts for name, value in _rows(g, place, part, spec.mlp_bias).items()},
        **_rest(g, place, selection, *parts),
        "down_norms": g.weight(down_norms(layer)) if indices is None and not selection.gate_first else None,
    }
    attributes = activation_attributes(spec) | {"layer": layer}
    return _selected(g, spec, SPARSE_MLP, f"{place}.mlp", inputs, attributes)


def _selected(
    g: GraphBuilder,
    spec: ModelSpec,
    schema: OpSchema,
    name: str,
    inputs: dict[str, ir.Value | None],
    attributes: Attributes,
) -> tuple[ir.Value, ir.Value]:
    """Add a sparse op. Returns hidden states ``(batch*seqlen, hidden_size)`` and the active indices."""
    indices = inputs["indices"]
    if indices is not None:
        return _flat(g, spec, g.custom(schema, name, inputs, **attributes)), indices
    y, chosen = g.custom_outputs(schema, name, inputs, 2, **attributes)
    return _flat(g, spec, y), chosen


def _rest(g: GraphBuilder, place: str, selection: Selection, *parts: str) -> dict[str, ir.Value | None]:
    """The inputs of a sparse op from which the units that are not active are computed; none if they are dropped."""
    if selection.rest is None:
        return {}
    found: dict[str, ir.Value | None] = {"rest": selection.rest}
    for part in parts:
        found[f"c_{part}"], found[f"cs_{part}"] = g.copy(f"{place}.{part}_proj.weight")
    return found


def _rows(g: GraphBuilder, place: str, part: str, bias: bool) -> dict[str, ir.Value | None]:
    """The inputs of a sparse op for one matrix: the matrix, and its scales and bias if it has them."""
    name = f"{place}.{part}_proj"
    found: dict[str, ir.Value | None] = dict(zip((f"w_{part}", f"s_{part}"), g.rows(f"{name}.weight"), strict=True))
    return found | ({f"b_{part}": g.weight(f"{name}.bias")} if bias else {})


def to_cache(
    g: GraphBuilder, spec: ModelSpec, layer: int, step: Step, cache: Cache, projected: ir.Value, n_heads: int
) -> tuple[ir.Value, Cache]:
    """Norm and rotate this step's heads as the model does, and write its keys and values into the cache.

    Query and key share one transpose and one rotation: at one token a node costs more than the few numbers
    it moves.

    Args:
        projected: ``(batch*seqlen, (n_heads + 2*n_kv_heads)*head_dim)``, query, key and value side by side.
        n_heads: query heads in ``projected``; 0 if the sparse op computes the query.

    Returns:
        The query ``(batch, n_heads, seqlen, head_dim)`` (the key if ``n_heads`` is 0) and the cache.
    """
    kv, rope = spec.n_kv_heads, spec.rope_of(layer)
    if spec.qk_norm:
        projected = head_norms(g, spec, layer, projected)
    x = g.op("Reshape", projected, g.shape(step.tokens, [n_heads + 2 * kv, spec.head_dim]))
    query_key, value = g.split(g.op("Transpose", x, perm=[0, 2, 1, 3]), [n_heads + kv, kv], axis=1)
    if rope and rope.frequencies:
        query_key = g.op("RotaryEmbedding", query_key, *step.rotary[rope])
    parts = g.split(query_key, [n_heads, kv] if n_heads else [kv], axis=1)
    return parts[0], Cache(
        *(
            g.op("TensorScatter", past, new, step.write_indices, axis=2)
            for past, new in ((cache.key, parts[-1]), (cache.value, value))
        )
    )


def _flat(g: GraphBuilder, spec: ModelSpec, x: ir.Value) -> ir.Value:
    y = g.op("Reshape", x, g.ints([-1, spec.hidden_size]))
    # Nothing infers the shape of a sparse op's output, and a norm of it needs the rank.
    y.dtype, y.shape = g.dtype, ir.Shape([None, spec.hidden_size])
    return y
