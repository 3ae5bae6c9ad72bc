"""Runs the copy of a graph that TensorRT's parser gets, without TensorRT.

Standard nodes run in ONNX's reference evaluator. Our nodes run the launches that the programs in an engine have, in
Triton's interpreter, on the weights as the copy declares them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from shadowllm.bundle.op_domain import DOMAIN
from shadowllm.exporter.engines.graph import TensorInfo, prepare
from shadowllm.exporter.engines.worker import as_kernels_read, most_rows
from shadowllm.plugins.kernel_program import Argument, Launch, Output, Plan, Program, Size, call_size
from shadowllm.plugins.registry import SCHEMAS, schedules
from shadowllm.plugins.schema import Attributes
from shadowllm.plugins.triton.schedule import cover, run
from tests.plugins import kernel_programs

LIMITS = {"max_batch": 2, "max_seqlen": 8, "max_kept": 2}
TYPES = {"float32": torch.float32, "int32": torch.int32, "int16": torch.int16}


class Node:
    """One of our nodes, made from what a compiler is told about it."""

    def __init__(self, op: str, inputs: Mapping[str, TensorInfo], attributes: Attributes) -> None:
        self._inputs, self._ports, self._schema = inputs, as_kernels_read(inputs), SCHEMAS[op]
        self._attributes = {name: value for name, value in attributes.items() if name != "layer"}
        shapes = {
            name: tuple(size if isinstance(size, int) else 0 for size in port.shape)
            for name, port in self._ports.items()
        }
        most = {"max_batch": most_rows(op, LIMITS), "max_seqlen": LIMITS["max_seqlen"]}
        self._schedules = schedules(op)(shapes, self._attributes, itemsize=4, **most)
        written = {operand for one in self._schedules for call in one.calls for operand in call.operands.values()}
        self._outputs = [port for port in self._schema.outputs if port.name in written]

    @property
    def program(self) -> Program:
        """A program with the types of the inputs and a launch that reads them, so that it can have offsets."""
        launch = Launch(0, (Size(), Size(), Size()), tuple(Argument("input", i) for i in range(len(self._inputs))))
        types, outputs = [port.dtype for port in self._inputs.values()], [Output("float32", ())] * len(self._outputs)
        kernels = kernel_programs.program().kernels
        return Program(tuple(types), tuple(outputs), kernels, (Plan(1, 1, 0, (launch,)),))

    def run(self, program: Program, arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        """The outputs, from the inputs as an engine has them."""
        tensors: dict[str, torch.Tensor] = {}
        arguments = program.plans[0].launches[0].arguments
        for (name, port), argument, array in zip(self._ports.items(), arguments, arrays, strict=True):
            found = torch.from_numpy(np.array(array))  # a copy, because constants are read-only
            assert port.dtype in (str(array.dtype), "int16")
            if all(isinstance(size, int) for size in port.shape):  # a weight, or a row of a selection
                words = found.flatten()[argument.offset // 4 :].view(TYPES[port.dtype])
                found = words[: math.prod(port.shape)].view(port.shape)
            tensors[name] = found
        size = call_size(arrays[0].shape)
        tensors |= self._allocate(tensors)
        run(cover(self._schedules, *size), tensors, *size)
        return tuple(tensors[port.name].numpy() for port in self._outputs)

    def _allocate(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        sizes: dict[str, Any] = {"1": 1, **self._attributes}
        for port in self._schema.inputs:
            for symbol, size in zip(port.shape, tensors[port.name].shape if port.name in tensors else (), strict=False):
                sizes.setdefault(symbol, size)
        kinds = {port.name: TYPES.get(port.dtype, torch.float32) for port in self._outputs}
        shapes = {port.name: [sizes[symbol] for symbol in port.shape] for port in self._outputs}
        return {name: torch.full(shapes[name], -7, dtype=kind) for name, kind in kinds.items()}


def interpreted(path: Path, feeds: Mapping[str, np.ndarray], capacity: int) -> dict[str, np.ndarray]:
    """The outputs of the parser's copy of an ONNX file, by name; ``capacity`` is that of the cache."""
    nodes: list[Node] = []

    def compiler(*told: Any) -> Program:
        nodes.append(Node(*told))
        return nodes[-1].program

    prepared = prepare(path, {"capacity": capacity}, compiler)
    ours = {named.name: (node, made) for (named, made), node in zip(prepared.programs.items(), nodes, strict=True)}
    model = onnx.load_from_string(prepared.model)
    onnx.load_external_data_for_model(model, str(path.parent))
    for node in model.graph.node:
        if node.domain == DOMAIN or node.op_type == "Attention":  # the evaluator knows none of these attributes
            kept = [one for one in node.attribute if one.name not in ("program", "TRT_decomposable")]
            kept = [one for one in kept if not one.name.startswith("plugin_")]
            del node.attribute[:]
            node.attribute.extend(kept)

    def of_ours(self: OpRun, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        node, program = ours[self.onnx_node.name]
        return node.run(program, arrays)

    new_ops = [type(op, (OpRun,), {"op_domain": DOMAIN, "_run": of_ours}) for op in SCHEMAS]
    found = ReferenceEvaluator(model, new_ops=new_ops).run(None, dict(feeds))
    return dict(zip((output.name for output in model.graph.output), found, strict=True))
