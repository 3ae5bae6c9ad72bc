"""The custom ops as TensorRT plugins: one class for all ops, which interprets programs.

TensorRT's classes exist only once a flavour is loaded, so functions create the classes that derive from them.
``cpp/plugin.cpp`` does the same in C++.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from shadowllm.bundle.op_domain import DOMAIN, VERSION
from shadowllm.plugins.kernel_program import DTYPES, PROGRAM, call_size
from shadowllm.plugins.kernel_program_bytes import pack, unpack
from shadowllm.plugins.registry import SCHEMAS
from shadowllm.plugins.tensorrt.launcher import Launcher


def register(trt: Any) -> list[Any]:
    """Add the creators of all custom ops to TensorRT's registry, where the ONNX parser and the runtime find them.

    Returns:
        The creators. The registry does not own Python objects: keep them as long as engines exist.

    Raises:
        RuntimeError: the registry refuses a creator.
    """
    registry, plugin, creators = trt.get_plugin_registry(), plugin_class(trt), []
    for op in SCHEMAS:
        creator = creator_class(trt)(op, plugin)
        if not registry.register_creator(creator, DOMAIN):
            raise RuntimeError(f"TensorRT did not accept the plugin creator of {op}")
        creators.append(creator)
    return creators


def creator_class(trt: Any) -> Any:
    """A class of ``IPluginCreatorV3One`` objects for the module ``trt``; they take an op's name and a plugin class."""

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self, op: str, plugin: Any) -> None:
            super().__init__()
            self.plugin = plugin
            self.name, self.plugin_version, self.plugin_namespace = op, str(VERSION), DOMAIN
            # A collection points to its fields and does not own them, so they must live as long as the creator.
            self.fields = [trt.PluginField(PROGRAM, np.empty(0, np.int8), trt.PluginFieldType.CHAR)]
            self.field_names = trt.PluginFieldCollection(self.fields)

        def create_plugin(self, name: str, fields: Any, _phase: Any) -> Any:
            found = [np.asarray(field.data).tobytes() for field in fields if field.name == PROGRAM]
            if not any(found):
                raise ValueError(f"{self.name} {name} carries no program: build engines with `shadowllm build`")
            try:
                return self.plugin(self.name, Launcher(unpack(found[0])))
            except ValueError as error:
                raise ValueError(f"{self.name} {name}: {error}") from error

    return Creator


def plugin_class(trt: Any) -> Any:
    """A class of ``IPluginV3`` objects for the module ``trt``; they take an op's name and a `Launcher`."""

    class Plugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):  # type: ignore[misc]
        def __init__(self, op: str, launcher: Launcher) -> None:
            for base in Plugin.__bases__:
                base.__init__(self)
            self.launcher, self.program = launcher, launcher.program
            self.plugin_name, self.plugin_version, self.plugin_namespace = op, str(VERSION), DOMAIN
            self.num_outputs = len(self.program.outputs)

        def get_capability_interface(self, _kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return Plugin(self.plugin_name, self.launcher)  # copies share it: it has no stream of its own

        def get_output_shapes(self, inputs: Sequence[Any], _shape_inputs: Any, build: Any) -> list[Any]:
            def size(dim: int | tuple[int, int]) -> Any:
                return build.constant(dim) if isinstance(dim, int) else inputs[dim[0]][dim[1]]

            return [trt.DimsExprs([size(dim) for dim in output.shape]) for output in self.program.outputs]

        def get_output_data_types(self, _inputs: Sequence[Any]) -> list[Any]:
            return [trt.DataType(DTYPES[output.dtype]) for output in self.program.outputs]

        def supports_format_combination(self, position: int, tensors: Sequence[Any], _n_inputs: int) -> bool:
            dtypes = (*self.program.inputs, *(output.dtype for output in self.program.outputs))
            tensor = tensors[position].desc
            return bool(tensor.format == trt.TensorFormat.LINEAR and int(tensor.type) == DTYPES[dtypes[position]])

        def configure_plugin(self, inputs: Sequence[Any], _outputs: Any) -> None:
            if len(inputs) != len(self.program.inputs):
                raise ValueError(f"{self.plugin_name} has {len(inputs)} inputs, expected {len(self.program.inputs)}")
            self.program.plan(*call_size(inputs[0].max))

        def get_workspace_size(self, _inputs: Any, _outputs: Any) -> int:
            return self.program.workspace_bytes

        def get_fields_to_serialize(self) -> Any:
            data = np.frombuffer(pack(self.program), np.int8)
            self.fields = [trt.PluginField(PROGRAM, data, trt.PluginFieldType.CHAR)]  # TensorRT reads it later
            return trt.PluginFieldCollection(self.fields)

        def attach_to_context(self, _context: Any) -> Any:
            self.launcher.load()
            return self.clone()

        def set_tactic(self, _tactic: int) -> None:
            pass

        def on_shape_change(self, _inputs: Any, _outputs: Any) -> None:
            # A builder times plugins without a context that they are attached to, and may capture the timed run.
            self.launcher.load()

        def enqueue(
            self,
            inputs: Sequence[Any],
            _outputs: Any,
            read: Sequence[int],
            written: Sequence[int],
            work: int,
            stream: int,
        ) -> None:
            self.launcher.run(tuple(inputs[0].dims), read, written, work, stream)

    return Plugin
