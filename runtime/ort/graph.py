"""Rewrites an ONNX graph of a bundle for ONNX Runtime's CPU kernels, and loads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import chain
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes import InPlacePass, PassResult
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from shadowllm.bundle.manifest import BODIES, Manifest
from shadowllm.bundle.op_domain import DOMAIN
from shadowllm.errors import UserError
from shadowllm.plugins import native_ops
from shadowllm.runtime.ort.computed_weights import ComputesWeights
from shadowllm.runtime.ort.flatten_hidden_states import FlattenHiddenStates
from shadowllm.runtime.ort.fuse_attention import FuseAttention, is_fused
from shadowllm.runtime.ort.fuse_dense_mlp import FuseDenseMlp
from shadowllm.runtime.ort.fuse_layers import FuseLayers
from shadowllm.runtime.ort.join_graphs import join
from shadowllm.runtime.ort.join_nested import JoinNested
from shadowllm.runtime.ort.native_linear import NativeLinear
from shadowllm.runtime.ort.own_selections import OwnSelections
from shadowllm.runtime.ort.round_products import RoundProducts
from shadowllm.runtime.ort.round_rows import RoundRows
from shadowllm.runtime.ort.shorten_dense import shorten
from shadowllm.runtime.ort.split_selection import SplitSelection
from shadowllm.runtime.ort.upcast_to_float32 import UpcastToFloat32
from shadowllm.runtime.ort.write_cache_in_place import WriteCacheInPlace

SELECTING = frozenset({"predictor", *BODIES})  # graphs with a selection


@dataclass(frozen=True)
class CpuGraph:
    """A graph of a bundle, rewritten for ONNX Runtime's CPU kernels.

    Attributes:
        model: the serialised graph. Its weights are in the bundle's file.
        computed: functions for initializers that are not in a file, by name.
        fused: whether dense attention is one op, which takes several tokens after a past for one sequence only.
    """

    model: bytes
    computed: Mapping[str, Callable[[], np.ndarray]]
    fused: bool


def with_data(model: ir.Model, data: Path) -> ir.Model:
    """A copy of a graph that reads its weights from a data file.

    Args:
        data: the file itself. The bundle may have a link to it, as in the Hugging Face cache, and ONNX Runtime and
            onnx-ir refuse a link out of its folder.
    """
    copy = model.clone()
    for value in copy.graph.initializers.values():
        if isinstance(stored := value.const_value, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                data.name,
                stored.offset,
                stored.length,
                stored.dtype,
                shape=stored.shape,
                name=str(value.name),
                base_dir=data.parent,
            )
    return copy


def for_cpu(
    models: Sequence[ir.Model],
    manifest: Manifest,
    native: bool,
    exact: bool = False,
    fused: bool = True,
    rounded: bool = False,
    prompts: bool = False,
) -> CpuGraph:
    """Rewrite graphs of a bundle as one graph for ONNX Runtime's CPU kernels.

    Inputs and outputs are those of the graphs, except that every sequence has its own selection, ``body`` takes them
    layer by layer, and native ops write the cache in place. Several graphs are joined, see `join`, and the dense graph
    with ``body``, see `shorten`.

    Args:
        models: the graphs, in their order. They cannot be used afterwards.
        manifest: manifest of the bundle.
        native: whether the native ops run the graph.
        exact: whether integer layers read float32 inputs, and not inputs rounded to 8 bits.
        fused: whether dense attention becomes one op, see `CpuGraph`.
        rounded: whether float matrices become integers, see `RoundProducts` and `RoundRows`.
        prompts: whether it runs prompts only. Then attention is ONNX Runtime's own, which is made for many tokens.
    """
    first, name = models[0].graph.name, str(models[-1].graph.name)
    model = reduce(shorten if first == "dense" else join, models)
    computed: dict[str, Callable[[], np.ndarray]] = {}
    attention = [FuseAttention(manifest.spec, native and not prompts)] if fused else []
    for rewrite in _passes(name, manifest, native, exact, attention, rounded):
        rewrite(model)
        if isinstance(rewrite, ComputesWeights):
            computed |= rewrite.weights
    return CpuGraph(ir.to_proto(model).SerializeToString(), computed, any(is_fused(node) for node in model.graph))


def _passes(
    name: str, manifest: Manifest, native: bool, exact: bool, attention: Sequence[InPlacePass], rounded: bool
) -> list[InPlacePass]:
    """The passes, in their order, for a graph or for several that end with it."""
    passes = list(attention)
    q, linear = manifest.quantisation, native and native_ops.linear_pays()
    if q and q.residual_bits:
        passes.insert(0, NativeLinear() if linear else JoinNested(q))
    if manifest.dtype != "float32":
        passes.insert(0, UpcastToFloat32(keep_rows=native))
    if rounded:
        passes[:0] = [RoundProducts(linear), RoundRows()]
    if name in SELECTING:
        passes.append(OwnSelections())
    if name in BODIES:
        passes += [SplitSelection(), *([FlattenHiddenStates()] if native else [])]
    if linear:
        passes += [FuseDenseMlp(manifest.spec), FuseLayers()]
    if native:
        passes.append(WriteCacheInPlace())
    if exact:  # at the end, for it marks the native ops
        passes.append(ExactIntegerInputs(native))
    return passes


class ExactIntegerInputs(InPlacePass):
    """Makes the products with integers read float32 inputs; by default they are rounded to 8 bits for speed.

    These are ``MatMulNBits``, and the native ops' products with a low-bit copy.

    Args:
        native: whether the native ops run the graph. Function bodies do not round, and do not know the attribute.
    """

    def __init__(self, native: bool) -> None:
        self._native = native

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the model in place."""
        nodes = list(chain(model.graph, *model.functions.values()))
        products = [node for node in nodes if node.op_type == "MatMulNBits"]
        for node in products:
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
        ours = [node for node in model.graph if node.domain == DOMAIN] if self._native else []
        for node in ours:
            node.attributes["exact_copies"] = ir.AttrInt64("exact_copies", 1)
        return PassResult(model, modified=bool(products or ours))


class OrtGraph:
    """An ONNX graph, rewritten by `for_cpu`, loaded into ONNX Runtime.

    Args:
        name: of its file, for errors.

    Attributes:
        fused: see `CpuGraph`.
        inputs, outputs: names.
    """

    def __init__(self, name: str, options: ort.SessionOptions, graph: CpuGraph) -> None:
        self.fused = graph.fused
        try:
            self._session = ort.InferenceSession(graph.model, options, providers=["CPUExecutionProvider"])
        except (
            errors.Fail,
            errors.InvalidGraph,
            errors.InvalidProtobuf,
            errors.InvalidArgument,
            errors.NotImplemented,
            errors.RuntimeException,
        ) as error:
            raise UserError(
                f"ONNX Runtime {ort.__version__} cannot load {name} ({str(error).splitlines()[0][:200]})",
                "use onnxruntime 1.32 or later, or export the model again",
            ) from error
        self.inputs = [value.name for value in self._session.get_inputs()]
        self.outputs = [value.name for value in self._session.get_outputs()]

    def bind(self, feeds: Mapping[str, np.ndarray], fetches: Mapping[str, np.ndarray]) -> BoundRun:
        """Bind the arrays that a run reads and writes; names that the graph lacks are ignored."""
        binding = self._session.io_binding()
        for name in self.inputs:
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(feeds[name]))
        for name in self.outputs:
            binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(fetches[name]))
        return BoundRun(self._session, binding)


class BoundRun:
    """A graph with all buffers bound; calling it runs the graph."""

    def __init__(self, session: ort.InferenceSession, binding: ort.IOBinding) -> None:
        self._session, self._binding = session, binding

    def __call__(self) -> None:
        self._session.run_with_iobinding(self._binding)
