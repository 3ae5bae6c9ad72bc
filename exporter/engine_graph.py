"""An ONNX piece as the engine step sees it: what it needs, and the copy that TensorRT's parser can read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from google.protobuf.message import DecodeError

from shadowllm.errors import UserError
from shadowllm.plugins.schemas import DOMAIN, SCHEMAS, VERSION
from shadowllm.plugins.tensorrt.state import INPUT_MASK, input_mask


@dataclass(frozen=True)
class TensorInfo:
    """A graph input or output; a dimension is a size or a symbol."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class CustomNode:
    """A node of one of our ops: its op, the name of its layer in an engine, and the decoder layer it serves if any."""

    op: str
    name: str
    layer: int | None


@dataclass(frozen=True)
class GraphInfo:
    """What a build of an ONNX file would need.

    Attributes:
        name: of the graph.
        opset: version of the standard domain.
        ops: how many nodes of each type, custom ones with their domain.
        weight_bytes: size of all initializers, wherever they lie.
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
    """What the ONNX file holds and what a build would need, without building or reading weights.

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


def prepare(path: Path, bindings: Mapping[str, int]) -> tuple[bytes, tuple[CustomNode, ...]]:
    """A copy of the model in the form TensorRT's parser wants; weights stay in their external file.

    - Function bodies of our ops go, so that the parser can only take the plugins.
    - Our nodes name the plugin's namespace and version. TensorRT has no empty inputs, so they are
      closed up and a mask attribute tells the plugin which are there.
    - ``Attention`` may be taken apart where no fused kernel fits (float32 has none).
    - Symbols in ``bindings`` become numbers: the capacity of a cache must be one.

    Returns:
        The serialised model, and its custom nodes by the names their layers will have.

    Raises:
        UserError: as `read_onnx`, or a node of our domain that is not one of our ops.
    """
    model = read_onnx(path)
    for key in [key for key in model.functions if key[0] == DOMAIN]:
        del model.functions[key]
    nodes = tuple(_custom_nodes(model.graph))
    for node in nodes:
        _make_plugin_node(node)
    for node in model.graph.all_nodes():
        if node.op_type == "Attention" and not node.domain:
            node.attributes.add(ir.AttrInt64("TRT_decomposable", 1))
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape([bindings.get(str(_dim(d)), _dim(d)) for d in value.shape])
    return ir.to_proto(model).SerializeToString(), tuple(map(_custom_node, nodes))


def read_onnx(path: Path) -> ir.Model:
    """Load an ONNX file, its external data unread.

    Raises:
        UserError: no such file, or it is not a usable ONNX file.
    """
    try:
        model = ir.load(path)
    except FileNotFoundError as error:
        raise UserError(f"there is no ONNX file {path}", "run `shadowllm export` first") from error
    except DecodeError as error:
        raise UserError(f"{path} is not an ONNX file, or it is damaged", "export the model again") from error
    if not model.graph.outputs:  # what an empty or cut off file decodes to
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
    """Named by what it serves, whatever the graph calls it: the name is what an inspector shows."""
    layer = node.attributes.get("layer")
    if layer is None:
        return CustomNode(node.op_type, f"{node.outputs[0].name}.{node.op_type}", None)
    return CustomNode(node.op_type, f"layers.{layer.as_int()}.{node.op_type}", layer.as_int())


def _make_plugin_node(node: ir.Node) -> None:
    """Name the plugin, close up the inputs and record which are present."""
    mask = input_mask(value is not None for value in node.inputs)
    present = [value for value in node.inputs if value is not None]
    for i, value in enumerate(present):
        node.replace_input_with(i, value)
    node.resize_inputs(len(present))
    node.name = _custom_node(node).name
    for attribute in (
        ir.AttrString("plugin_namespace", DOMAIN),
        ir.AttrString("plugin_version", str(VERSION)),
        ir.AttrInt64(INPUT_MASK, mask),
    ):
        node.attributes.add(attribute)


def _tensor_info(value: ir.Value) -> TensorInfo:
    shape = () if value.shape is None else tuple(_dim(d) for d in value.shape)
    return TensorInfo(value.name or "", "" if value.dtype is None else value.dtype.name.lower(), shape)


def _dim(dim: int | ir.SymbolicDim) -> int | str:
    return dim if isinstance(dim, int) else str(dim.value)
