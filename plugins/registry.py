"""The list of the custom ops, and access to the parts of an op by its name.

A folder of `ops` holds everything about one op. Its modules have the same names and contents for every op:

    schema.py      the signature: a constant with the name of the folder, in capitals
    reference.py   the NumPy reference: a function with the name of the folder
    function.py    ``function_body``: the ONNX function body for one form of model, None if that form has no such op
    kernel.py      the Triton kernels
    schedule.py    ``schedules``: how they are launched, a `triton.schedule.Planner`
    launcher.py    the op on PyTorch tensors: a function with the name of the folder
    native.cpp     the op for ONNX Runtime on CPU, if there is one; it has a line in each of ``native/CMakeLists.txt``,
                   ``op.hpp`` and ``register.cpp``

Only the schemas are imported at once. Triton may not be installed, and running an engine does not need ONNX.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from shadowllm.plugins.schema import OpSchema

if TYPE_CHECKING:
    import onnx_ir as ir

    from shadowllm.plugins.function_body import FunctionForm
    from shadowllm.plugins.triton.schedule import Planner

# A new op needs a folder and a line here.
FOLDERS = (
    "select_topk",
    "sparse_mlp",
    "sparse_attention",
    "score_neurons",
    "shortlist_logits",
)
# The exporter puts these ops into the copy of a graph that TensorRT reads. They have no function.py. Sessions put
# ``NestedLinear`` into the graphs that they load.
ENGINE_FOLDERS = ("nested_linear", "nested_gather")
# Ops of the native library only. Sessions put them into the graphs that they load, so no bundle and no engine has them.
# Such a folder has schema.py, reference.py and native.cpp.
NATIVE_FOLDERS = ("cached_attention", "dense_mlp", "decoder_layer", "dense_decoder_layer")


def _member(folder: str, module: str, name: str) -> Any:
    return getattr(import_module(f"shadowllm.plugins.ops.{folder}.{module}"), name)


def _schemas(folders: tuple[str, ...]) -> dict[str, OpSchema]:
    schemas = (_member(folder, "schema", folder.upper()) for folder in folders)
    return {schema.name: schema for schema in schemas}


SCHEMAS = _schemas(FOLDERS + ENGINE_FOLDERS)
NATIVE_SCHEMAS = _schemas(NATIVE_FOLDERS)
_FOLDERS = dict(zip((*SCHEMAS, *NATIVE_SCHEMAS), (*FOLDERS, *ENGINE_FOLDERS, *NATIVE_FOLDERS), strict=True))


def reference(op: str) -> Callable[..., Any]:
    """The NumPy reference of an op.

    Raises:
        KeyError: there is no such op. `schedules` and `launcher` raise it too.
    """
    return _member(_FOLDERS[op], "reference", _FOLDERS[op])


def function_bodies(form: FunctionForm) -> list[ir.Function]:
    """The functions of domain ``shadowllm`` for one form of model, without the ops that the form lacks."""
    bodies = (_member(folder, "function", "function_body")(form) for folder in FOLDERS)
    return [body for body in bodies if body is not None]


def schedules(op: str) -> Planner:
    """The function that plans the launches of an op's kernels. Needs Triton."""
    return _member(_FOLDERS[op], "schedule", "schedules")


def launcher(op: str) -> Callable[..., Any]:
    """The op as a function of PyTorch tensors; it returns its output, or a tuple of them. Needs Triton."""
    return _member(_FOLDERS[op], "launcher", _FOLDERS[op])
