"""The plugin classes (programs, shapes, types, formats) and TensorRT's flavours."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from shadowllm.errors import UserError
from shadowllm.plugins.kernel_program import DTYPES, PROGRAM
from shadowllm.plugins.kernel_program_bytes import pack, unpack
from shadowllm.plugins.registry import SCHEMAS
from shadowllm.plugins.tensorrt import creators, load_tensorrt
from shadowllm.plugins.tensorrt.launcher import Launcher
from tests.plugins.kernel_programs import program

HERE = Path(__file__).parent
CPP = HERE.parents[1] / "plugins" / "tensorrt" / "cpp"
CXX = os.environ.get("CXX", "c++")


@pytest.fixture(scope="module")
def trt():
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (pip install 'shadowllm[tensorrt-rtx]')")
    return load_tensorrt.load("tensorrt_rtx")


@pytest.fixture
def creator(trt):
    return creators.creator_class(trt)("SparseMLP", creators.plugin_class(trt))


@pytest.fixture
def plugin(trt):
    return creators.plugin_class(trt)("SparseMLP", Launcher(program()))


def fields(trt, **values):
    """A collection of fields, and the objects that must live as long as it."""
    kept = [trt.PluginField(name, value, trt.PluginFieldType.CHAR) for name, value in values.items()]
    return trt.PluginFieldCollection(kept), kept


def test_creators_are_in_the_registry(trt):
    kept = creators.register(trt)
    for name in SCHEMAS:
        assert trt.get_plugin_registry().get_creator(name, "1", "shadowllm") is not None
    assert {creator.name for creator in kept} == set(SCHEMAS)


def test_creator_makes_the_plugin_it_serialised(trt, creator, plugin):
    after = creator.create_plugin("node", plugin.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME)
    assert [field.name for field in creator.field_names] == [PROGRAM]
    assert after.program == plugin.program
    assert (after.plugin_name, after.plugin_version, after.plugin_namespace) == ("SparseMLP", "1", "shadowllm")
    assert after.num_outputs == 1
    assert after.clone() is not after
    assert after.clone().launcher is after.launcher


def test_a_node_without_a_program_is_refused(trt, creator):
    for given in ({}, {"activation": np.frombuffer(b"silu", np.int8)}, {PROGRAM: np.empty(0, np.int8)}):
        collection, _kept = fields(trt, **given)
        with pytest.raises(ValueError, match=r"SparseMLP node carries no program: build .* `shadowllm build`"):
            creator.create_plugin("node", collection, trt.TensorRTPhase.BUILD)


def test_a_damaged_program_is_refused(trt, creator):
    collection, _kept = fields(trt, **{PROGRAM: np.frombuffer(pack(program())[:-9], np.int8)})
    with pytest.raises(ValueError, match="SparseMLP layer 3: the program is damaged"):
        creator.create_plugin("layer 3", collection, trt.TensorRTPhase.BUILD)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_formats_and_types_are_the_program_s(trt, dtype):
    plugin = creators.plugin_class(trt)("SparseMLP", Launcher(program(dtype)))
    types = [DTYPES[name] for name in (dtype, "int32", "float32", dtype)]

    def supported(layout, *wrong):
        given = [trt.int8 if i in wrong else trt.DataType(number) for i, number in enumerate(types)]
        tensors = [SimpleNamespace(desc=SimpleNamespace(type=one, format=layout)) for one in given]
        return [plugin.supports_format_combination(i, tensors, 3) for i in range(4)]

    assert all(supported(trt.TensorFormat.LINEAR))
    assert not any(supported(trt.TensorFormat.CHW4))
    assert supported(trt.TensorFormat.LINEAR, 1, 3) == [True, False, True, False]
    assert plugin.get_output_data_types([]) == [trt.DataType(types[3])]


def test_calls_that_no_plan_covers_are_refused_by_the_builder(plugin):
    def inputs(*largest):
        return [SimpleNamespace(max=largest), SimpleNamespace(max=(7,)), SimpleNamespace(max=())]

    plugin.configure_plugin(inputs(4, 128, 576), [])
    assert plugin.get_workspace_size([], []) == 65536
    with pytest.raises(ValueError, match="no plan serves batch 4, seqlen 129"):
        plugin.configure_plugin(inputs(4, 129, 576), [])
    with pytest.raises(ValueError, match="SparseMLP has 1 inputs, expected 3"):
        plugin.configure_plugin(inputs(4, 128, 576)[:1], [])


def test_a_packed_program_is_one_field(trt, plugin):
    (field,) = plugin.get_fields_to_serialize()
    assert (field.name, field.type) == (PROGRAM, trt.PluginFieldType.CHAR)
    assert unpack(np.asarray(field.data).tobytes()) == plugin.program


def test_unknown_flavour_and_missing_package():
    with pytest.raises(UserError, match="no engine flavour 'onnx'; choose one of tensorrt_rtx, tensorrt"):
        load_tensorrt.load("onnx")
    if importlib.util.find_spec("tensorrt") is None:
        with pytest.raises(UserError, match=r"tensorrt is not installed.*pip install 'shadowllm\[tensorrt\]'"):
            load_tensorrt.load("tensorrt")
    assert "tensorrt" not in sys.modules


@pytest.mark.usefixtures("trt")
def test_child_finds_the_library_by_its_plain_name():
    with load_tensorrt.child_environment("tensorrt_rtx") as environment:
        folder = environment["LD_LIBRARY_PATH"].split(os.pathsep)[0]
        assert ctypes.CDLL(f"{folder}/libtensorrt_rtx.so").getInferLibVersion() > 0
    assert not os.path.exists(folder)


@pytest.mark.skipif(shutil.which(CXX) is None, reason="no C++ compiler")
@pytest.mark.parametrize("source", ["plugin", "register"])
def test_the_library_overrides_the_virtuals_of_10_15_and_11(source):
    """`make plugin` compiles against the headers of 10.14, because no package has later ones."""
    include = [f"-I{CPP / 'cuda'}", "-isystem", str(HERE / "tensorrt_virtuals")]
    command = [CXX, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", *include, str(CPP / f"{source}.cpp")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
