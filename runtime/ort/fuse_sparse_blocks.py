"""Graph pass: the sparse ops take over the small nodes around them, which the native ops do faster.

At one token on a CPU, a node costs more than the few numbers that it moves. So the native ops have inputs and outputs
that are not in their schemas (`plugins.native_ops.FUSED_INPUTS`), and only this pass uses them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import RemoveUnusedNodesPass

from shadowllm.bundle.op_domain import DOMAIN
from shadowllm.plugins.native_ops import FUSED_INPUTS
from shadowllm.plugins.registry import SCHEMAS


class FuseSparseBlocks(InPlacePass):
    """Gives the native sparse ops the nodes that stand around them in a graph of the exporter.

    Both ops take the norm of the hidden states before them and the residual after them. ``SparseAttention`` also takes
    the projection, rotation and storing of keys and values. Blocks of another form keep their nodes.

    Requires: `FlattenHiddenStates`. Ensures: the same inputs and outputs under the same names, if the native ops run
    the graph.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the model in place."""
        found = [node for node in model.graph if node.domain == DOMAIN and node.op_type in FUSED_INPUTS]
        fused = [_fuse(model.graph, node) for node in found]
        RemoveUnusedNodesPass()(model)
        return PassResult(model, modified=any(fused))


@dataclass
class _Block:
    """What an op takes over.

    Attributes:
        inputs: by name; they replace those of the node, or are new.
        attributes: new ones.
        outputs: the values that the outputs of the new node replace, by position.
        readers: the nodes that are no longer needed if they read the normed hidden states.
    """

    inputs: dict[str, ir.Value] = field(default_factory=dict)
    attributes: dict[str, ir.Attr] = field(default_factory=dict)
    outputs: dict[int, ir.Value] = field(default_factory=dict)
    readers: set[ir.Node] = field(default_factory=set)


def _fuse(graph: ir.Graph, node: ir.Node) -> bool:
    block = _Block(outputs=dict(enumerate(node.outputs)), readers={node})
    if node.op_type == "SparseAttention":
        _take_cache(node, block)
    last = _take_norm(node, block)
    if not block.inputs:
        return False
    names = [port.name for port in SCHEMAS[node.op_type].inputs] + list(FUSED_INPUTS[node.op_type])
    given = dict(zip(names, node.inputs, strict=False)) | block.inputs
    new = ir.node(
        node.op_type,
        [given.get(name) for name in names],
        {**node.attributes, **block.attributes},
        domain=DOMAIN,
        num_outputs=1 + max(block.outputs),
        name=node.name,
    )
    graph.insert_before(last, new)
    for place, value in enumerate(new.outputs):
        if place in block.outputs:
            _take_over(graph, block.outputs[place], value)
        else:
            value.name = ""  # the node lacks this output
    return True


def _take_norm(node: ir.Node, block: _Block) -> ir.Node:
    """Take the norm before a node and the sum after it, if nothing else reads what is between.

    Returns:
        The node before which the new one must stand: the sum, or else the old node.
    """
    norm, users = (
        _producer(node.inputs[0], "RMSNormalization", "LayerNormalization"),
        [user for user, _ in node.outputs[0].uses()],
    )
    if norm is None or [user.op_type for user in users] != ["Add"]:
        return node
    hidden, (add,) = norm.inputs[0], users
    others = {user for user, _ in norm.outputs[0].uses()} - block.readers
    if hidden is None or others or set(add.inputs) != {hidden, node.outputs[0]}:
        return node
    block.inputs |= _given(zip(("x", "norm_weight", "norm_bias"), norm.inputs, strict=False))
    block.attributes["epsilon"] = norm.attributes["epsilon"]
    block.outputs[0] = add.outputs[0]
    return add


def _take_cache(node: ir.Node, block: _Block) -> None:
    """Take what computes the keys and values of this step and writes them to the cache."""
    inputs = dict(zip((port.name for port in SCHEMAS[node.op_type].inputs), node.inputs, strict=False))
    stores = [_producer(inputs[name], "TensorScatter") for name in ("key", "value")]
    key, value = (store.inputs[1] if store else None for store in stores)
    rotary = _producer(key, "RotaryEmbedding")
    split = _producer(rotary.inputs[0] if rotary else key, "Split")
    same_rotation = (rotary.inputs[1:3] if rotary else (None, None)) == (inputs.get("cos"), inputs.get("sin"))
    if split is None or split is not _producer(value) or not same_rotation:
        return
    transpose = _producer(split.inputs[0], "Transpose")
    reshape = _producer(transpose.inputs[0], "Reshape") if transpose else None
    product = _product(reshape.inputs[0]) if reshape else None
    caches = [store.inputs[0] for store in stores if store]
    if product is None or any(cache is None or cache.dtype != ir.DataType.FLOAT for cache in caches):
        return
    weights, readers = product
    block.inputs |= {**_given(zip(("key", "value"), caches, strict=True)), **weights}
    block.outputs |= {2 + i: store.outputs[0] for i, store in enumerate(stores) if store}
    block.readers |= readers


def _product(value: ir.Value | None) -> tuple[Mapping[str, ir.Value], set[ir.Node]] | None:
    """The weights of a product by the names of the op's inputs, and the nodes that compute it.

    The product is a ``Gemm``, a ``MatMulNBits``, or the sum of two for nested integers.
    """
    if gemm := _producer(value, "Gemm"):
        return _given(zip(("w_kv", "b_kv"), map(_uncast, gemm.inputs[1:]), strict=False)), {gemm}
    if integers := _producer(value, "MatMulNBits"):
        whole = integers.attributes["K"].as_int() % integers.attributes["block_size"].as_int() == 0
        names = ("w_kv", "s_kv", None, None, "b_kv")
        return (_given(zip(names, integers.inputs[1:], strict=False)), {integers}) if whole else None
    add = _producer(value, "Add")
    scaled = _producer(add.inputs[1], "Mul") if add else None
    if add is None or scaled is None:
        return None
    copy, residual = (_producer(value, "MatMulNBits") for value in (add.inputs[0], scaled.inputs[0]))
    if copy is None or residual is None:
        return None
    names = ("c_kv", "cs_kv", None, None, "b_kv")
    return _given([*zip(names, copy.inputs[1:], strict=False), ("w_kv", residual.inputs[1])]), {copy, residual}


def _given(pairs: Iterable[tuple[str | None, ir.Value | None]]) -> dict[str, ir.Value]:
    return {name: value for name, value in pairs if name and value is not None}


def _uncast(value: ir.Value | None) -> ir.Value | None:
    """A 16-bit weight before it is cast to float32; the native ops read 16-bit rows."""
    cast = _producer(value, "Cast")
    return cast.inputs[0] if cast else value


def _producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that computes a value, if it is one of these types; of any type if none is given."""
    node = value.producer() if value is not None else None
    return node if node is not None and (not op_types or node.op_type in op_types) else None


def _take_over(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Make ``new`` stand in place of ``old``, also as a graph output."""
    new.name, new.type, new.shape, old.name = old.name, old.type, old.shape, None
    old.replace_all_uses_with(new, replace_graph_outputs=True)
