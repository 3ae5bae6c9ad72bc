"""The four graphs of a bundle: ``dense``, ``stem``, ``predictor`` and ``body``.

A dense step runs ``dense``. A sparse decode step runs ``stem`` (embeddings and the first, dense layers),
``predictor`` (reads the hidden state, writes active indices) and ``body`` (the sparse layers).
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from shadowllm.bundle import selection_names as names
from shadowllm.bundle.manifest import BODY, BODY_ALL_HEADS
from shadowllm.bundle.predictor_file import Predictor
from shadowllm.bundle.quantisation import LOW_BIT_COPY, Quantisation
from shadowllm.bundle.weight_file import WeightStore
from shadowllm.bundle.weight_names import copy_errors, copy_weighting
from shadowllm.exporter.graphs import blocks, nodes, selection
from shadowllm.exporter.graphs.builder import GraphBuilder
from shadowllm.models.sparsity import UNITS, SparseLayers, Unit, layer_units
from shadowllm.models.spec import ModelSpec
from shadowllm.plugins.function_body import CopyForm, FunctionForm, TableForm
from shadowllm.plugins.ops.shortlist_logits.schema import SHORTLIST_LOGITS
from shadowllm.plugins.registry import function_bodies

INT64, INT32, FLOAT = ir.DataType.INT64, ir.DataType.INT32, ir.DataType.FLOAT
TOKENS = ["batch", "seqlen"]


def function_form(
    spec: ModelSpec, quantisation: Quantisation | None = None, chooser: Predictor | None = None, rest: bool = False
) -> FunctionForm:
    """The properties of a model that its function bodies depend on.

    Args:
        chooser: a per-layer predictor, or None.
        rest: whether the sparse ops compute the rest from a low-bit copy. Then they also select for a per-layer
            predictor, except the neurons of a network.
    """
    rows = (1 + spec.gated) * spec.intermediate_size
    gate_first = chooser is not None and chooser.kind == "relu"
    scored = chooser is not None and not chooser.rank and not rest and not gate_first
    return FunctionForm(
        activation=spec.activation,
        gated=spec.gated,
        qkv_bias=spec.qkv_bias,
        o_bias=spec.o_bias,
        mlp_bias=spec.mlp_bias,
        rope=spec.rope is not None,
        n_heads=spec.n_heads,
        n_kv_heads=spec.n_kv_heads,
        head_dim=spec.head_dim,
        quantisation=quantisation,
        copy=CopyForm(spec.hidden_size, rows, LOW_BIT_COPY) if scored else None,
        rest=LOW_BIT_COPY if rest else None,
        chooses_neurons=rest and chooser is not None and not chooser.rank,
        head_groups=spec.n_heads // spec.heads_together if rest and chooser is not None else 0,
        table=TableForm(spec.hidden_size, spec.vocab_size, LOW_BIT_COPY, weighted=True) if rest else None,
        threshold=spec.activation_threshold,
        gate_first=gate_first,
        windows=spec.window is not None,
    )


def dense_graph(spec: ModelSpec, store: WeightStore, dtype: ir.DataType, q: Quantisation | None = None) -> ir.Model:
    """The dense model: input_ids, position_ids, logits_to_keep, cache -> logits, cache."""
    g = GraphBuilder("dense", dtype, store, q)
    input_ids, position_ids = (g.input(name, TOKENS, INT64) for name in ("input_ids", "position_ids"))
    keep = g.input("logits_to_keep", ["batch", "kept"], INT64)
    caches = _cache_inputs(g, spec, range(spec.n_layers))
    step = blocks.step(g, spec, position_ids, caches[0].key, dense=range(spec.n_layers), sparse=False)
    x = nodes.embed(g, spec, input_ids, position_ids)
    for layer in range(spec.n_layers):
        x, caches[layer] = blocks.dense_layer(g, spec, layer, x, step, caches[layer])
    _logits(g, spec, x, step, keep)
    _cache_outputs(g, spec, range(spec.n_layers), caches)
    return g.model()


def stem_graph(sparse: SparseLayers, store: WeightStore, dtype: ir.DataType, q: Quantisation | None = None) -> ir.Model:
    """The layers before the sparse ones: input_ids, position_ids, cache -> hidden, cache."""
    g, spec = GraphBuilder("stem", dtype, store, q), sparse.spec
    input_ids, position_ids = (g.input(name, TOKENS, INT64) for name in ("input_ids", "position_ids"))
    layers = range(sparse.dense_layers)
    caches = _cache_inputs(g, spec, layers)
    step = blocks.step(g, spec, position_ids, caches[0].key, dense=layers, sparse=False)
    x = nodes.embed(g, spec, input_ids, position_ids)
    for layer in layers:
        x, caches[layer] = blocks.dense_layer(g, spec, layer, x, step, caches[layer])
    shape = g.shape(step.tokens, [spec.hidden_size])
    g.output(g.op("Reshape", x, shape), "hidden", [*TOKENS, spec.hidden_size])
    _cache_outputs(g, spec, layers, caches)
    return g.model()


def body_graph(
    sparse: SparseLayers,
    store: WeightStore,
    dtype: ir.DataType,
    q: Quantisation | None = None,
    chooser: Predictor | None = None,
    rest: bool = False,
    all_heads: bool = False,
) -> ir.Model:
    """The sparse layers: hidden, position_ids, logits_to_keep, selection, cache -> logits, cache.

    Args:
        chooser: a per-layer predictor, or None. With it, indices are outputs of each layer, as
            ``neuron_indices.3``, and not inputs.
        rest: whether units that are not active, and logits outside of a shortlist, are computed from the low-bit copy.
            Then ``rest``, ``shortlist`` and ``certify`` are inputs, int32 ``()``, and ``recomputed`` is an output.
        all_heads: whether all heads are active, so that their selection is no input and no output.
    """
    g, spec = GraphBuilder(BODY_ALL_HEADS if all_heads else BODY, dtype, store, q), sparse.spec
    hidden = g.input("hidden", [*TOKENS, spec.hidden_size])
    position_ids = g.input("position_ids", TOKENS, INT64)
    keep = g.input("logits_to_keep", ["batch", "kept"], INT64)
    units: tuple[Unit, ...] = ("neurons",) if all_heads else UNITS
    selection = _selection_inputs(g, sparse, units, chooser, rest)
    caches = _cache_inputs(g, spec, sparse.layers)
    selects_heads = spec.selects_heads and not all_heads
    dense = () if selects_heads else sparse.layers
    step = blocks.step(g, spec, position_ids, caches[0].key, dense=dense, sparse=selects_heads)
    x = g.op("Reshape", hidden, g.ints([-1, spec.hidden_size]))
    for row, layer in enumerate(sparse.layers):
        x, caches[row], chosen = blocks.sparse_layer(g, spec, layer, row, x, step, caches[row], selection)
        if chooser:
            for unit in units:
                width = layer_units(spec)[unit]
                g.output(chosen[unit], names.of_row(names.indices(unit), row), [width], INT32)
    if rest:
        _shortlist_logits(g, spec, x, step, keep)
    else:
        _logits(g, spec, x, step, keep)
    _cache_outputs(g, spec, sparse.layers, caches)
    return g.model(function_bodies(function_form(spec, q, chooser, rest)))


def _selection_inputs(
    g: GraphBuilder, sparse: SparseLayers, units: Sequence[Unit], chooser: Predictor | None, rest: bool
) -> blocks.Selection:
    """The inputs for a selection: indices and counts, or only counts with a per-layer predictor."""
    found: dict[Unit, tuple[ir.Value | None, ir.Value]] = {}
    for unit in units:
        width = layer_units(sparse.spec)[unit]
        indices = None if chooser else g.input(names.indices(unit), [sparse.count, width], INT32)
        found[unit] = indices, g.input(names.counts(unit), [sparse.count], INT32)
    return blocks.Selection(
        found,
        selection.Networks(chooser.rank, chooser.normed) if chooser and chooser.rank else None,
        g.input(names.REST, [], INT32) if rest else None,
        gate_first=chooser is not None and chooser.kind == "relu",
    )


def predictor_graph(
    spec: ModelSpec, store: WeightStore, dtype: ir.DataType, predictor: Predictor, q: Quantisation | None = None
) -> ir.Model:
    """The predictor: hidden, counts -> indices.

    All sequences share one selection, or each has its own if the counts are ``(n_sparse, batch)``.

    A static ranking is a constant, so its graph has no ``hidden`` input.
    """
    g = GraphBuilder("predictor", dtype, store, q)
    widths = layer_units(spec)
    counts = {unit: g.input(names.counts(unit), [predictor.n_sparse], INT32) for unit in widths}
    grid = g.op("Shape", g.op("Reshape", counts["heads"], g.ints([predictor.n_sparse, -1])))  # n_sparse, R
    scores = _shadow_scores(g, spec, predictor, grid) if predictor.kind == "shadow" else _static_scores(g, spec, grid)
    for unit, width in widths.items():
        together = spec.heads_together if unit == "heads" else 1
        rows = selection.counts_of(g, counts[unit])
        found = selection.select(g, f"select_{unit}", scores[unit], rows, width, together)
        found.name = f"select_{unit}"  # engines name the plugin after its output
        shape = g.op("Concat", g.op("Shape", counts[unit]), g.ints([width]), axis=0)
        g.output(g.op("Reshape", found, shape), names.indices(unit), [predictor.n_sparse, width], INT32)
    return g.model(function_bodies(function_form(spec, q)))


def _shadow_scores(g: GraphBuilder, spec: ModelSpec, predictor: Predictor, grid: ir.Value) -> dict[Unit, ir.Value]:
    """Scores ``(n_sparse*R, width)`` of R selections; ``grid`` is int64 ``[n_sparse, R]``."""
    hidden = g.input("hidden", [*TOKENS, spec.hidden_size])
    x = g.op("Reshape", hidden, g.ints([-1, spec.hidden_size]))
    size = g.op("Slice", grid, g.ints([1]), g.ints([2]))
    # The last projection is linear, so the mean of the tokens' scores is the score of their mean.
    z = selection.mean(g, selection.trunk(g, spec, "predictor.trunk", x), size, predictor.rank)
    found = {}
    for unit, width in layer_units(spec).items():
        y = nodes.gemm(g, z, [f"predictor.{unit}"], True, predictor.rank)
        y = g.op("Transpose", g.op("Reshape", y, g.ints([-1, predictor.n_sparse, width])), perm=[1, 0, 2])
        found[unit] = nodes.as_float(g, g.op("Reshape", y, g.ints([-1, width])))
    return found


def _static_scores(g: GraphBuilder, spec: ModelSpec, grid: ir.Value) -> dict[Unit, ir.Value]:
    """The same for scores that do not depend on the token."""
    found = {}
    for unit, width in layer_units(spec).items():
        scores = g.op("Unsqueeze", g.weight(f"predictor.{unit}.scores"), g.ints([1]))
        scores = g.op("Expand", scores, g.op("Concat", grid, g.ints([width]), axis=0))
        found[unit] = g.op("Reshape", scores, g.ints([-1, width]))
    return found


def _logits(g: GraphBuilder, spec: ModelSpec, x: ir.Value, step: blocks.Step, keep: ir.Value) -> None:
    table = spec.output_table.removesuffix(".weight")
    logits = nodes.gemm(g, _kept(g, spec, x, step, keep), [table], False, spec.hidden_size)
    _output_logits(g, spec, nodes.as_float(g, logits), keep)


def _shortlist_logits(g: GraphBuilder, spec: ModelSpec, x: ir.Value, step: blocks.Step, keep: ir.Value) -> None:
    table, kept = spec.output_table, _kept(g, spec, x, step, keep)
    # Set here, because nothing infers it, and the op's output shapes depend on it.
    kept.dtype, kept.shape = g.dtype, ir.Shape(["rows", spec.hidden_size])
    (rows, row_scales), (copy, factors) = g.rows(table), g.copy(table)
    inputs: dict[str, ir.Value | None] = {
        "x": kept,
        "table": rows,
        "copy": copy,
        "scales": factors,
        "errors": g.weight(copy_errors(table)),
        "shortlist": g.input(names.SHORTLIST, [], INT32),
        "certify": g.input(names.CERTIFY, [], INT32),
        "weighting": g.weight(copy_weighting(table)),
        "table_scales": row_scales,
    }
    logits, recomputed = g.custom_outputs(SHORTLIST_LOGITS, "shortlist_logits", inputs, 2)
    logits.name = "row_logits"  # engines show the node under this name
    _output_logits(g, spec, logits, keep)
    g.output(recomputed, names.RECOMPUTED, ["rows"], INT32)


def _kept(g: GraphBuilder, spec: ModelSpec, x: ir.Value, step: blocks.Step, keep: ir.Value) -> ir.Value:
    """The normed hidden states of the kept positions only: a prompt needs only its last row."""
    x = g.op("Reshape", x, g.shape(step.tokens, [spec.hidden_size]))
    x = g.op("GatherND", x, g.op("Unsqueeze", keep, g.ints([2])), batch_dims=1)
    return nodes.norm(g, spec, "final_norm", g.op("Reshape", x, g.ints([-1, spec.hidden_size])))


def _output_logits(g: GraphBuilder, spec: ModelSpec, logits: ir.Value, keep: ir.Value) -> None:
    logits = g.op("Reshape", logits, g.shape(g.op("Shape", keep), [spec.vocab_size]))
    g.output(logits, "logits", ["batch", "kept", spec.vocab_size], FLOAT)


def _cache_dims(spec: ModelSpec) -> list[int | str]:
    return ["batch", spec.n_kv_heads, "capacity", spec.head_dim]


def _cache_inputs(g: GraphBuilder, spec: ModelSpec, layers: range) -> list[blocks.Cache]:
    return [
        blocks.Cache(*(g.input(f"past_key_values.{i}.{part}", _cache_dims(spec)) for part in ("key", "value")))
        for i in layers
    ]


def _cache_outputs(g: GraphBuilder, spec: ModelSpec, layers: range, caches: Sequence[blocks.Cache]) -> None:
    for i, cache in zip(layers, caches, strict=True):
        g.output(cache.key, f"present.{i}.key", _cache_dims(spec))
        g.output(cache.value, f"present.{i}.value", _cache_dims(spec))
