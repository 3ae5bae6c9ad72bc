"""Graph pass: replaces dense attention by one op.

It is ``CachedAttention`` of the native library, or ONNX Runtime's ``com.microsoft::GroupQueryAttention``.

A bundle's graphs use standard ONNX, which TensorRT reads too. At one token on a CPU, the overhead of the standard
nodes of an attention block is larger than their arithmetic. The fused op splits the projection, applies RoPE,
writes the cache in place and reads only the visible part of it. The native op takes less time for one token, any head
size, and several tokens of several sequences. ONNX Runtime's is faster for long prompts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PreconditionError
from onnx_ir.passes.common import RemoveUnusedNodesPass

from shadowllm.bundle.op_domain import DOMAIN
from shadowllm.models.rope import RopeSpec
from shadowllm.models.spec import ModelSpec
from shadowllm.plugins.function_body import MICROSOFT
from shadowllm.plugins.ops.cached_attention.schema import CACHED_ATTENTION

FUSED = "GroupQueryAttention"


class FuseAttention(InPlacePass):
    """Replaces every dense attention block of a graph from `exporter.graphs.bundle_graphs`.

    Requires: each ``Attention`` reads a cache that ``TensorScatter`` wrote, and a query split from one stacked q/k/v
    projection. Ensures: the same inputs and outputs under the same names. The graph does not change if ONNX Runtime's
    op does not support the model's head size.

    Args:
        spec: spec of the model.
        native: use the native op.
    """

    def __init__(self, spec: ModelSpec, native: bool = False) -> None:
        self._spec, self._native = spec, native

    def requires(self, model: ir.Model) -> None:
        """See the class.

        Raises:
            PreconditionError: names the node that is missing.
        """
        for node in self._blocks(model):
            for cache in node.inputs[1:3]:
                _producer(cache, "TensorScatter")
            _projection(node.inputs[0])

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the model in place."""
        blocks = self._blocks(model)
        if blocks:
            shared = _Shared(model.graph, self._spec)
            for node in blocks:
                _fuse(model.graph, node, shared, _native_op if self._native else _runtime_op)
            if not self._native:
                model.graph.opset_imports[MICROSOFT] = 1
            RemoveUnusedNodesPass()(model)
        return PassResult(model, modified=bool(blocks))

    def _blocks(self, model: ir.Model) -> list[ir.Node]:
        if not self._native and not fuses(self._spec):
            return []
        return [node for node in model.graph if node.op_type == "Attention"]


def fuses(spec: ModelSpec) -> bool:
    """Return whether ONNX Runtime's op supports the model's head size."""
    return spec.head_dim % (16 if spec.rope else 8) == 0


def is_fused(node: ir.Node) -> bool:
    """Return whether a node is ONNX Runtime's op."""
    return node.domain == MICROSOFT and node.op_type == FUSED


class _Shared:
    """Values that all blocks read: lengths, the shape of a projection, rotary tables."""

    def __init__(self, graph: ir.Graph, spec: ModelSpec) -> None:
        self.spec = spec
        self._graph = graph
        self._first = graph[0]
        positions = next(value for value in graph.inputs if value.name == "position_ids")
        last = self._op("Gather", positions, self._constant("last_index", np.int64(-1)), axis=1)
        self.last_slots = self._op("Cast", last, to=ir.DataType.INT32)
        self._positions = positions
        self._tables: dict[RopeSpec, tuple[ir.Value, ...]] = {}

    @cached_property
    def total(self) -> ir.Value:
        """int32 ``()``: the length of the longest sequence."""
        longest = self._op("ReduceMax", self.last_slots, keepdims=0)
        return self._op("Add", longest, self._constant("one", np.int32(1)))

    @cached_property
    def shape(self) -> ir.Value:
        """The shape of a projection, ``(batch, seqlen, (n_heads + 2*n_kv_heads)*head_dim)``."""
        width = (self.spec.n_heads + 2 * self.spec.n_kv_heads) * self.spec.head_dim
        widths = self._constant("projected_width", np.array([width]))
        return self._op("Concat", self._op("Shape", self._positions), widths, axis=0)

    def tables(self, layer: int) -> tuple[ir.Value, ...]:
        """Cosine and sine per position of a layer; none if it does not rotate."""
        spec, rope = self.spec, self.spec.rope_of(layer)
        if rope is None or not rope.frequencies:
            return ()
        if rope not in self._tables:
            tables, number = rope.tables(spec.head_dim, spec.max_seqlen), len(self._tables)
            self._tables[rope] = tuple(
                self._constant(f"{name}_table_{number}", table)
                for name, table in zip(("cos", "sin"), tables, strict=True)
            )
        return self._tables[rope]

    def _constant(self, name: str, array: np.ndarray | np.generic) -> ir.Value:
        value = ir.val(name, const_value=ir.tensor(np.asarray(array), name=name))
        self._graph.register_initializer(value)
        return value

    def _op(self, op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        node = ir.node(op_type, list(inputs), attributes)
        self._graph.insert_before(self._first, node)
        return node.outputs[0]


_Op = Callable[[_Shared, int, ir.Value, Sequence[ir.Value | None]], list[ir.Node]]


def _fuse(graph: ir.Graph, attention: ir.Node, shared: _Shared, op: _Op) -> None:
    scatters = [_producer(attention.inputs[i], "TensorScatter") for i in (1, 2)]
    pasts = [scatter.inputs[0] for scatter in scatters]
    nodes = op(shared, _layer(scatters[0]), _projection(attention.inputs[0]), pasts)
    nodes[-1].name = attention.name
    graph.insert_before(attention, nodes)
    context, *caches = nodes[-1].outputs
    for scatter, cache in zip(scatters, caches, strict=True):
        _take_over(graph, scatter.outputs[0], cache)
    # The graph has Attention -> Transpose -> Reshape to (batch*seqlen, n_heads*head_dim). The fused op's output needs
    # no transpose.
    (transpose,) = attention.outputs[0].consumers()
    (reshape,) = transpose.outputs[0].consumers()
    reshape.replace_input_with(0, context)


def _runtime_op(shared: _Shared, layer: int, projected: ir.Value, pasts: Sequence[ir.Value | None]) -> list[ir.Node]:
    spec, tables = shared.spec, shared.tables(layer)
    packed = ir.node("Reshape", [projected, shared.shape])
    attributes = {
        "num_heads": spec.n_heads,
        "kv_num_heads": spec.n_kv_heads,
        "scale": 1 / math.sqrt(spec.head_dim),
        "do_rotary": int(bool(tables)),
    }
    if window := spec.window_of(layer):
        attributes["local_window_size"] = window
    inputs = [packed.outputs[0], None, None, *pasts, shared.last_slots, shared.total, *tables]
    return [packed, ir.node(FUSED, inputs, attributes, domain=MICROSOFT, num_outputs=3)]


def _native_op(shared: _Shared, layer: int, projected: ir.Value, pasts: Sequence[ir.Value | None]) -> list[ir.Node]:
    inputs, attributes = [projected, *pasts, shared.last_slots, *shared.tables(layer)], {"n_heads": shared.spec.n_heads}
    if window := shared.spec.window_of(layer):
        attributes["window"] = window
    return [ir.node(CACHED_ATTENTION.name, inputs, attributes, domain=DOMAIN, num_outputs=3)]


def _projection(query: ir.Value | None) -> ir.Value:
    """The stacked q/k/v projection of a query: follow the first inputs back to the input of a ``Reshape``."""
    node = _producer(query, "Split")
    while node.op_type != "Reshape":
        node = _producer(node.inputs[0])
    assert node.inputs[0] is not None
    return node.inputs[0]


def _layer(scatter: ir.Node) -> int:
    """The layer of a cache, from the name of the graph input that it is written to: ``past_key_values.3.key``."""
    cache = scatter.inputs[0]
    if cache is None or cache.name is None or not (found := re.fullmatch(r"past_key_values\.(\d+)\.key", cache.name)):
        raise PreconditionError("a cache is not a graph input of the exporter")
    return int(found[1])


def _producer(value: ir.Value | None, op_type: str | None = None) -> ir.Node:
    node = value.producer() if value is not None else None
    if node is None or (op_type and node.op_type != op_type):
        raise PreconditionError(f"no {op_type or 'node'} where the exporter writes one")
    return node


def _take_over(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Make ``new`` the graph output in place of ``old``."""
    new.name, new.type, new.shape, old.name = old.name, old.type, old.shape, None
    graph.outputs[:] = [new if value is old else value for value in graph.outputs]
