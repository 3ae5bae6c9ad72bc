"""The registry; all other descriptions of an op's inputs and outputs agree with its schema."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shadowllm.bundle.quantisation import Quantisation
from shadowllm.plugins import registry
from shadowllm.plugins.function_body import CopyForm, FunctionForm, TableForm
from shadowllm.plugins.ops.decoder_layer.schema import DECODER_LAYER, stages
from shadowllm.plugins.ops.dense_decoder_layer.schema import DENSE_DECODER_LAYER
from shadowllm.plugins.ops.dense_mlp.schema import DENSE_MLP
from shadowllm.plugins.ops.sparse_mlp.schema import SPARSE_MLP
from shadowllm.plugins.registry import NATIVE_SCHEMAS, SCHEMAS

BODIES = list(SCHEMAS)[: len(registry.FOLDERS)]  # ops of graphs; the others are of engines only
FOLDERS = (*registry.FOLDERS, *registry.ENGINE_FOLDERS, *registry.NATIVE_FOLDERS)
SOURCES = Path(__file__).parents[2] / "plugins"
COPIES = {"copy": CopyForm(64, 20, Quantisation(4)), "table": TableForm(64, 20, Quantisation(4))}
FORM = FunctionForm("silu", True, True, True, True, True, 6, 2, 8, windows=True, **COPIES)
# The sparse ops choose the units themselves, with a low-bit copy.
CHOOSING = replace(FORM, rest=Quantisation(4), chooses_neurons=True, head_groups=3)
# Ports that a backend does not use: the kernels read no integer rows.
UNREAD = {
    "reference": {},
    "launcher": {
        "SparseMLP": ("s_gate", "s_up", "s_down"),
        "SparseAttention": ("s_q", "s_o"),
        "ShortlistLogits": ("table_scales",),
    },
}


def test_every_folder_is_registered():
    folders = {path.parent.name for path in (SOURCES / "ops").glob("*/schema.py")}
    assert folders == set(FOLDERS)
    assert list(SCHEMAS) == [schema.name for schema in SCHEMAS.values()]
    assert len(SCHEMAS) == len(registry.FOLDERS) + len(registry.ENGINE_FOLDERS)
    with_body = {path.parent.name for path in (SOURCES / "ops").glob("*/function.py")}
    assert with_body == set(registry.FOLDERS)


@pytest.mark.parametrize("op", SCHEMAS | NATIVE_SCHEMAS)
def test_no_name_stands_twice(op):
    schema = (SCHEMAS | NATIVE_SCHEMAS)[op]
    names = [part.name for part in (*schema.inputs, *schema.outputs, *schema.attributes)]
    assert len(set(names)) == len(names)


BLOCKS = ("SparseMLP", "SparseAttention")  # ops whose launcher can run a whole block of a layer


def arguments(function: Callable[..., Any]) -> list[tuple[str, bool]]:
    """Names of the parameters, and whether each may be None."""
    parameters = inspect.signature(function).parameters.values()
    return [(one.name, "None" in str(one.annotation)) for one in parameters]


@pytest.mark.parametrize("backend", UNREAD)
@pytest.mark.parametrize("op", SCHEMAS)
def test_functions_take_the_ports_and_attributes(op, backend):
    if backend == "launcher":
        pytest.importorskip("triton")
    schema, unread = SCHEMAS[op], UNREAD[backend].get(op, ())
    wanted = [(port.name, port.optional) for port in schema.inputs if port.name not in unread]
    wanted += [(attribute.name, False) for attribute in schema.attributes if attribute.name != "layer"]
    if backend == "launcher" and op in BLOCKS:
        wanted.append(("block", True))
    assert arguments(getattr(registry, backend)(op)) == wanted


@pytest.mark.parametrize("op", sorted(NATIVE_SCHEMAS.keys() - {DECODER_LAYER.name, DENSE_DECODER_LAYER.name}))
def test_references_of_native_ops_take_the_ports_and_attributes(op):
    parts = (*NATIVE_SCHEMAS[op].inputs, *NATIVE_SCHEMAS[op].attributes)
    assert arguments(registry.reference(op)) == [(part.name, getattr(part, "optional", False)) for part in parts]


@pytest.mark.parametrize(("layer", "mlp"), [(DECODER_LAYER, SPARSE_MLP), (DENSE_DECODER_LAYER, DENSE_MLP)])
def test_the_reference_of_a_layer_takes_the_ports_of_its_parts_by_name(layer, mlp):
    found = {name for name, _ in arguments(registry.reference(layer.name))}
    of_parts = tuple(f"{prefix}_" for prefix, _ in stages(mlp))
    names = [part.name for part in (*layer.inputs, *layer.attributes)]
    own = {name for name in names if not name.startswith(of_parts)}
    assert found == own - {"layer"} | {"inputs"}


@pytest.mark.parametrize("op", BODIES)
def test_bodies_have_the_ports_and_attributes(op):
    ports = SCHEMAS[op].outputs
    for form, outputs in ((FORM, [port for port in ports if not port.optional]), (CHOOSING, ports)):
        (body,) = [body for body in registry.function_bodies(form) if body.name == op]
        schema = SCHEMAS[op]
        assert [value.name for value in body.inputs] == [port.name for port in schema.inputs]
        assert [value.name for value in body.outputs] == [port.name for port in outputs]
        assert list(body.attributes) == [attribute.name for attribute in schema.attributes]


def test_ops_that_read_a_copy_only_have_a_body_where_there_is_one():
    plain = FunctionForm("silu", True, True, True, True, True, 6, 2, 8)
    assert {body.name for body in registry.function_bodies(plain)} == set(BODIES) - {"ScoreNeurons", "ShortlistLogits"}


@pytest.mark.parametrize("op", SCHEMAS)
def test_launches_name_the_ports(op):
    """A schedule passes only inputs and outputs to kernels, and uses everything that the launcher takes.

    Without indices, the sparse ops choose the units themselves.
    """
    pytest.importorskip("triton")
    shapes: dict[str, tuple[int, ...]] = {"scores": (1, 7), "x": (1, 41), "copy": (14, 1, 8), "down_norms": (7,)}
    shapes |= {"key": (1, 2, 9, 8), "w_q": (32, 41), "indices": (4,), "score_weight": (2, 41), "table": (7, 41)}
    shapes |= {"w_up": (7, 41), "c_up": (7, 1, 8), "c_down": (7, 1, 8), "c_q": (32, 1, 8), "c_o": (32, 1, 8)}
    shapes = {port.name: shapes.get(port.name, (1,)) for port in SCHEMAS[op].inputs}
    attributes = {"cap": 7, "activation": "silu", "n_heads": 4, "width": 41}
    named = set()
    for given in (shapes, {name: shape for name, shape in shapes.items() if name != "indices"}):
        planned = registry.schedules(op)(given, attributes, itemsize=4, max_batch=2, max_seqlen=5)
        named |= {operand for one in planned for call in one.calls for operand in call.operands.values()}
    schema = SCHEMAS[op]
    read = {port.name for port in schema.inputs} - set(UNREAD["launcher"].get(op, ()))
    assert {operand for operand in named if isinstance(operand, str)} == read | {port.name for port in schema.outputs}


def test_the_cpp_plugins_are_those_of_the_schemas():
    text = (SOURCES / "tensorrt" / "cpp" / "register.cpp").read_text()
    (listed,) = re.findall(r"static shadowllm::Creator ([^;]*);", text)
    (handed,) = re.findall(r"creators\[\] = \{([^}]*)\}", text)
    creators = re.findall(r"(\w+)\(\"(\w+)\"\)", listed)
    assert {op for _, op in creators} == set(SCHEMAS)
    assert [f"&{name}" for name, _ in creators] == handed.split(", ")


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (["registry", "kernel_program_bytes"], ["numpy", "torch", "triton", "onnx", "onnx_ir"]),
        (["tensorrt.creators"], ["triton", "onnx", "onnx_ir"]),
        ([f"ops.{folder}.reference" for folder in FOLDERS], ["torch", "triton", "onnx", "onnx_ir"]),
        ([f"ops.{folder}.function" for folder in registry.FOLDERS], ["torch", "triton", "onnxruntime"]),
    ],
    ids=lambda names: names[0],
)
def test_nothing_is_imported_before_it_is_needed(modules, absent):
    if "tensorrt.creators" in modules:
        pytest.importorskip("cuda.bindings")
    code = f"import sys\nfor name in {modules}: __import__('shadowllm.plugins.' + name)\n"
    code += f"print([name for name in {absent} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
