"""The custom ops as TensorRT plugins: one class for all of them, driven by the op's schema.

TensorRT's classes exist only once a flavour is loaded, so they are made by functions of the module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from shadowllm.plugins.schemas import DOMAIN, SCHEMAS, VERSION, OpSchema
from shadowllm.plugins.tensorrt.state import INPUT_MASK, PluginState

NO_KERNELS = "this build of shadowllm carries no TensorRT kernels yet: the engine builds, but cannot run"


def register(trt: Any) -> list[Any]:
    """Put the creators of all custom ops into TensorRT's registry, where the ONNX parser and the runtime look.

    Returns:
        The creators. The registry does not own Python objects: keep them as long as engines live.

    Raises:
        RuntimeError: the registry refuses one.
    """
    registry, creators = trt.get_plugin_registry(), []
    plugin, creator = plugin_class(trt), creator_class(trt)
    for schema in SCHEMAS.values():
        one = creator(schema, plugin)
        if not registry.register_creator(one, DOMAIN):
            raise RuntimeError(f"TensorRT did not accept the plugin creator of {schema.name}")
        creators.append(one)
    return creators


def creator_class(trt: Any) -> Any:
    """``IPluginCreatorV3One`` for the TensorRT module ``trt``; its objects take a schema and a plugin class."""

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self, schema: OpSchema, plugin: Callable[[PluginState], Any]) -> None:
            super().__init__()
            self.schema, self.plugin = schema, plugin
            self.name, self.plugin_version, self.plugin_namespace = schema.name, str(VERSION), DOMAIN
            kinds = {attribute.name: attribute.type for attribute in schema.attributes} | {INPUT_MASK: int}
            self.fields = [trt.PluginField(name, np.empty(0), field_type(trt, kind)) for name, kind in kinds.items()]
            self.field_names = trt.PluginFieldCollection(self.fields)

        def create_plugin(self, _name: str, fields: Any, _phase: Any) -> Any:
            return self.plugin(PluginState.from_fields(self.schema, {field.name: read(trt, field) for field in fields}))

    return Creator


def plugin_class(trt: Any) -> Any:
    """``IPluginV3`` for the TensorRT module ``trt``; its objects take a `PluginState`."""
    dtypes = {"float32": trt.float32, "int32": trt.int32}
    floats = (trt.float32, trt.float16, trt.bfloat16)

    class Plugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):  # type: ignore[misc]
        def __init__(self, state: PluginState) -> None:
            for base in Plugin.__bases__:
                base.__init__(self)
            self.state = state
            self.plugin_name, self.plugin_version, self.plugin_namespace = state.schema.name, str(VERSION), DOMAIN
            self.num_outputs = len(state.schema.outputs)
            # A collection points at its fields and owns nothing: they must live as long as the plugin.
            self.fields = [write(trt, name, value) for name, value in state.fields.items()]

        def get_capability_interface(self, _kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return Plugin(self.state)  # the state is immutable, so the copies share it

        def get_output_shapes(self, inputs: Sequence[Any], _shape_inputs: Any, build: Any) -> list[Any]:
            def whole(size: Any) -> Any:
                return build.constant(size) if isinstance(size, int) else size

            return [trt.DimsExprs([whole(size) for size in shape]) for shape in self.state.output_shapes(inputs)]

        def get_output_data_types(self, inputs: Sequence[Any]) -> list[Any]:
            typed = self.state.typed_input
            return [dtypes[port.dtype] if port.dtype != "T" else inputs[typed] for port in self.state.schema.outputs]

        def supports_format_combination(self, position: int, tensors: Sequence[Any], _n_inputs: int) -> bool:
            tensor, wanted, typed = tensors[position].desc, self.state.ports[position].dtype, self.state.typed_input
            if tensor.format != trt.TensorFormat.LINEAR:
                return False
            if wanted != "T":
                return bool(tensor.type == dtypes[wanted])
            return tensor.type in floats if position == typed else bool(tensor.type == tensors[typed].desc.type)

        def configure_plugin(self, _inputs: Any, _outputs: Any) -> None:
            pass  # nothing depends on the shapes or types before there are kernels to choose

        def get_fields_to_serialize(self) -> Any:
            return trt.PluginFieldCollection(self.fields)

        def attach_to_context(self, _context: Any) -> Any:
            return self.clone()

        def set_tactic(self, _tactic: int) -> None:
            pass

        def on_shape_change(self, _inputs: Any, _outputs: Any) -> None:
            pass

        def enqueue(self, *_arguments: Any) -> None:
            raise NotImplementedError(f"{self.state.schema.name}: {NO_KERNELS}")

    return Plugin


def field_type(trt: Any, kind: type[int] | type[str]) -> Any:
    """TensorRT's type of a plugin field that holds an attribute of this kind."""
    return trt.PluginFieldType.INT32 if kind is int else trt.PluginFieldType.CHAR


def write(trt: Any, name: str, value: int | str) -> Any:
    """A plugin field that holds the value: one int32, or the characters in UTF-8."""
    data = np.array([value], np.int32) if isinstance(value, int) else np.frombuffer(value.encode(), np.uint8)
    return trt.PluginField(name, data, field_type(trt, type(value)))


def read(trt: Any, field: Any) -> int | str:
    """Inverse of `write`, for a field from the ONNX parser or from an engine."""
    if field.type == trt.PluginFieldType.INT32:
        return int(np.asarray(field.data).reshape(-1)[0])
    return bytes(np.asarray(field.data).astype(np.uint8)).rstrip(b"\0").decode()
