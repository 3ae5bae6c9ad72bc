"""Reads an ONNX graph for an engine build, and makes the copy of it that TensorRT's parser can read."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx_ir.passes.common import ShapeInferencePass
from onnx_ir.tape import Tape

from shadowllm.bundle.engine_record import CustomNode
from shadowllm.bundle.op_domain import DOMAIN, VERSION
from shadowllm.errors import UserError
from shadowllm.exporter.engines.nested_ops import carry_rows, use_nested_ops
from shadowllm.plugins.kernel_program import PROGRAM, Program
from shadowllm.plugins.kernel_program_bytes import pack
from shadowllm.plugins.registry import SCHEMAS
from shadowllm.plugins.schema import Attributes, copy_of, scales_of

ONNX_FLOAT = {"float": "float32"}  # all other types have the same name in ONNX and here


@dataclass(frozen=True)
class TensorInfo:
    """A graph input or output; each dimension is a size or a symbol."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphInfo:
    """The properties of an ONNX file that matter for an engine build.

    Attributes:
        name: name of the graph.
        opset: version of the standard domain.
        ops: number of nodes of each type; types of other domains include the domain.
        weight_bytes: size of all initializers, in the ONNX file or in external data.
        data_files: external-data files, as the ONNX file names them.
    """

    name: str
    opset: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    custom_ops: tuple[CustomNode, ...]
    ops: dict[str, int]
    weight_bytes: int
    data_files: tuple[str, ...]


def describe_onnx(path: Path) -> GraphInfo:
    """Describe an ONNX file without building an engine or reading weights.

    Raises:
        UserError: no such file, or it is not a usable ONNX file.
    """
    model = read_onnx(path)
    graph = model.graph
    tensors = [value.const_value for value in graph.initializers.values() if value.const_value is not None]
    ops = Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in graph.all_nodes())
    return GraphInfo(
        name=graph.name or path.stem,
        opset=graph.opset_imports.get("", 0),
        inputs=tuple(map(_tensor_info, graph.inputs)),
        outputs=tuple(map(_tensor_info, graph.outputs)),
        custom_ops=tuple(_custom_node(node) for node in _custom_nodes(graph)),
        ops=dict(sorted(ops.items())),
        weight_bytes=sum(tensor.nbytes for tensor in tensors),
        data_files=tuple(sorted({str(t.location) for t in tensors if isinstance(t, ir.ExternalTensor)})),
    )


# Compiles the program of a node. Arguments: its op, its inputs by the schema's names, its attributes.
Compiler = Callable[[str, Mapping[str, TensorInfo], Attributes], Program]


@dataclass(frozen=True)
class Prepared:
    """A serialised model in the form that TensorRT's parser needs, and the program of each custom node."""

    model: bytes
    programs: Mapping[CustomNode, Program]


def prepare(path: Path, bindings: Mapping[str, int], compiler: Compiler) -> Prepared:
    """Copy the model into the form that TensorRT's parser needs; weights stay in their external file.

    - A graph with logits also picks the most probable tokens (`pick_greedily`).
    - Products and embeddings of nested integers become nodes of ours (`use_nested_ops`).
    - Function bodies of our ops are removed, so that the parser must use the plugins.
    - Our nodes get the plugin's namespace and version, and the program. The program replaces their attributes.
    - A row of a selection is read in place (`read_rows_in_place`).
    - Empty inputs of our nodes are removed, because TensorRT has none, and so are outputs that the program lacks.
    - ``Attention`` may be decomposed if no fused kernel fits (float32 has none).
    - uint8 weights become int32, four bytes per number: TensorRT has no uint8 weights, and kernels read words. Each has
      the shape ``(rows, blocks, words)``.
    - Symbols in ``bindings`` become numbers, because TensorRT needs a fixed cache capacity.

    Raises:
        UserError: as `read_onnx` and `use_nested_ops`, a node of our domain that is not one of our ops, or a node whose
            input types or shapes are unknown.
    """
    model = read_onnx(path)
    pick_greedily(model.graph)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape([bindings.get(str(_dim(d)), _dim(d)) for d in value.shape])
    infer = ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)
    use_nested_ops(model)
    model = infer(model).model
    while carry_rows(model.graph):
        model = infer(model).model
    for key in [key for key in model.functions if key[0] == DOMAIN]:
        del model.functions[key]
    nodes = {_custom_node(node): node for node in _custom_nodes(model.graph)}
    for node in nodes.values():
        _read_bytes_as_words(node)
    programs = {named: compiler(node.op_type, _inputs(node), _attributes(node)) for named, node in nodes.items()}
    programs = {named: read_rows_in_place(nodes[named], program) for named, program in programs.items()}
    for named, node in nodes.items():
        _make_plugin_node(node, named.name, len(programs[named].outputs))
    for node in model.graph.all_nodes():
        if node.op_type == "Attention" and not node.domain:
            node.attributes.add(ir.AttrInt64("TRT_decomposable", 1))
    proto = ir.to_proto(model)
    packed = {named.name: pack(programs[named]) for named in nodes}
    for node_proto in proto.graph.node:
        if node_proto.name in packed:  # onnx_ir does not accept a string attribute with arbitrary bytes
            node_proto.attribute.add(name=PROGRAM, type=ir.AttributeType.STRING.value, s=packed[node_proto.name])
    return Prepared(proto.SerializeToString(), programs)


def pick_greedily(graph: ir.Graph) -> None:
    """Add the outputs ``next_tokens`` and ``next_position_ids`` to a graph that computes logits.

    They are int64, ``(batch, kept)`` and ``(batch, 1)``. The next decode step reads them on the device, without
    the host.
    """
    inputs, outputs = ({value.name: value for value in values} for values in (graph.inputs, graph.outputs))
    if "logits" not in outputs or "position_ids" not in inputs:
        return
    tape = Tape()
    last, one = (tape.initializer(ir.tensor(np.array([n], np.int64), name=f"pick.{n}")) for n in (-1, 1))
    tokens = tape.op("ArgMax", [outputs["logits"]], {"axis": -1, "keepdims": 0})
    position = tape.op("Gather", [inputs["position_ids"], last], {"axis": 1})
    for value, name, width in (
        (tokens, "next_tokens", "kept"),
        (tape.op("Add", [position, one]), "next_position_ids", 1),
    ):
        value.name, value.dtype, value.shape = name, ir.DataType.INT64, ir.Shape(["batch", width])
        graph.outputs.append(value)
    for value in tape.initializers:
        graph.initializers.add(value)
    graph.extend(tape.nodes)


def read_onnx(path: Path) -> ir.Model:
    """Load an ONNX file without reading its external data.

    Raises:
        UserError: no such file, or it is not a usable ONNX file.
    """
    try:
        model = ir.load(path)
    except FileNotFoundError as error:
        raise UserError(f"there is no ONNX file {path}", "run `shadowllm export` first") from error
    except DecodeError as error:
        raise UserError(f"{path} is not an ONNX file, or it is damaged", "export the model again") from error
    if not model.graph.outputs:  # an empty or truncated file decodes to an empty graph
        raise UserError(f"{path} holds no graph", "export the model again")
    return model


def _custom_nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    for node in graph.all_nodes():
        if node.domain == DOMAIN:
            if node.op_type not in SCHEMAS:
                raise UserError(
                    f"the graph uses {DOMAIN}::{node.op_type}, which this version does not know",
                    "it was written by another version: export the model again",
                )
            yield node


def _custom_node(node: ir.Node) -> CustomNode:
    """The custom node's record, with a name made from layer and op, because an engine inspector shows this name."""
    layer = node.attributes.get("layer")
    if layer is None:
        name = str(node.outputs[0].name)
        matrix = re.match(r"(predictor\.)?layers\.(\d+)\.", name)  # see `use_nested_ops`
        return CustomNode(node.op_type, f"{name}.{node.op_type}", int(matrix[2]) if matrix else None)
    return CustomNode(node.op_type, f"layers.{layer.as_int()}.{node.op_type}", layer.as_int())


def _inputs(node: ir.Node) -> dict[str, TensorInfo]:
    """The inputs that the node has, by the schema's names."""
    ports = zip(SCHEMAS[node.op_type].inputs, node.inputs, strict=False)
    found = {port.name: _tensor_info(value) for port, value in ports if value is not None}
    for name, value in zip(found, filter(None, node.inputs), strict=True):
        if value.dtype is None or value.shape is None:
            raise UserError(
                f"type or shape of {name} of {_custom_node(node).name} cannot be told", "export the model again"
            )
    return found


def _attributes(node: ir.Node) -> Attributes:
    known = [one for one in SCHEMAS[node.op_type].attributes if one.default is None or one.name in node.attributes]
    missing = [attribute.name for attribute in known if attribute.name not in node.attributes]
    if missing:
        raise UserError(f"{_custom_node(node).name} has no attribute {missing[0]!r}", "export the model again")
    return {attribute.name: node.attributes[attribute.name].value for attribute in known}


def _read_bytes_as_words(node: ir.Node) -> None:
    """Declare the uint8 weights of a node as int32; the bytes in the data file stay the same.

    Each becomes ``(rows, blocks, words)``: a residual has the blocks of its copy.
    """
    ports = zip(SCHEMAS[node.op_type].inputs, node.inputs, strict=False)
    inputs = {port.name: value for port, value in ports if value is not None}
    for name, value in inputs.items():
        if value.dtype != ir.DataType.UINT8:
            continue
        before = value.const_value
        if not isinstance(before, ir.ExternalTensor):
            raise UserError(f"{value.name} of {node.name} is no weight of a data file", "export the model again")
        copy = copy_of(name) if copy_of(name) in inputs else name
        factors = inputs[scales_of(copy)].shape
        assert factors is not None
        rows, blocks = factors.numpy()
        value.const_value = ir.ExternalTensor(
            before.location,
            before.offset,
            before.length,
            ir.DataType.INT32,
            shape=ir.Shape([rows, blocks, before.nbytes // (rows * blocks * ir.DataType.INT32.itemsize)]),
            name=before.name,
            base_dir=before.base_dir,
        )
        value.dtype, value.shape = value.const_value.dtype, value.const_value.shape


def read_rows_in_place(node: ir.Node, program: Program) -> Program:
    """Give a node the whole tensor instead of a row of it, and its program the row's place in bytes.

    This saves a launch for each ``Gather`` of indices or of a count of a layer. Only int32 may begin anywhere, because
    kernels read 16 bytes of other types at a time.
    """
    offsets: dict[int, int] = {}
    for number, value in enumerate([value for value in node.inputs if value is not None]):
        gather = value.producer()
        if gather is None or value.dtype != ir.DataType.INT32 or (place := _constant_row(gather)) is None:
            continue
        whole, offsets[number] = place
        node.replace_input_with(list(node.inputs).index(value), whole)
        if gather.graph is not None and not value.uses() and not value.is_graph_output():
            gather.graph.remove(gather, safe=True)
    return program.with_offsets(offsets) if offsets else program


def _constant_row(gather: ir.Node) -> tuple[ir.Value, int] | None:
    """The int32 tensor of which a node takes one constant row, and the row's first byte; None if it does not."""
    if (gather.domain, gather.op_type) != ("", "Gather") or gather.attributes.get_int("axis", 0) != 0:
        return None
    whole, index = gather.inputs
    row = None if index is None else ir.convenience.get_const_tensor(index)
    if row is None or row.shape.rank() or whole is None or whole.shape is None or not whole.shape.is_static():
        return None
    rows, *width = whole.shape.numpy()
    return whole, 4 * (int(row.numpy()) % rows) * math.prod(width)


def _make_plugin_node(node: ir.Node, name: str, outputs: int) -> None:
    """Set the plugin's name and version, and remove empty inputs and the outputs past the number of the plugin's."""
    present = [value for value in node.inputs if value is not None]
    for i, value in enumerate(present):
        node.replace_input_with(i, value)
    node.resize_inputs(len(present))
    node.resize_outputs(min(len(node.outputs), outputs))
    node.name = name
    node.attributes.clear()
    node.attributes.add(ir.AttrString("plugin_namespace", DOMAIN))
    node.attributes.add(ir.AttrString("plugin_version", str(VERSION)))


def _tensor_info(value: ir.Value) -> TensorInfo:
    shape = () if value.shape is None else tuple(_dim(d) for d in value.shape)
    dtype = "" if value.dtype is None else value.dtype.name.lower()
    return TensorInfo(value.name or "", ONNX_FLOAT.get(dtype, dtype), shape)


def _dim(dim: int | ir.SymbolicDim) -> int | str:
    return dim if isinstance(dim, int) else str(dim.value)
