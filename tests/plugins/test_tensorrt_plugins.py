"""The plugins' state without TensorRT, and the plugin classes with it."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from types import SimpleNamespace

import pytest

from shadowllm.errors import UserError
from shadowllm.plugins.schemas import SCHEMAS, SELECT_TOPK, SPARSE_MLP
from shadowllm.plugins.tensorrt import creators, flavour
from shadowllm.plugins.tensorrt.state import PluginState, input_mask

MLP = {"activation": "silu", "layer": 3}
FULL = {"SelectTopK": {"cap": 7}, "SparseMLP": MLP, "SparseAttention": {"n_heads": 9, "layer": 3}}
REQUIRED = {name: input_mask(not port.optional for port in schema.inputs) for name, schema in SCHEMAS.items()}


@pytest.fixture(scope="module")
def trt():
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (pip install 'shadowllm[tensorrt-rtx]')")
    return flavour.load("tensorrt_rtx")


def state(name, mask=None):
    schema = SCHEMAS[name]
    return PluginState(schema, FULL[name], (1 << len(schema.inputs)) - 1 if mask is None else mask)


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("full", [False, True])
def test_state_survives_its_fields(name, full):
    before = state(name, None if full else REQUIRED[name])
    after = PluginState.from_fields(SCHEMAS[name], dict(reversed(before.fields.items())) | {"plugin_version": "1"})
    assert after == before


def test_absent_inputs_are_closed_up():
    mlp = state("SparseMLP", REQUIRED["SparseMLP"] | 1 << 8)
    assert [port.name for port in mlp.inputs] == ["x", "indices", "count", "w_up", "w_down", "b_down"]
    assert [port.name for port in mlp.ports] == ["x", "indices", "count", "w_up", "w_down", "b_down", "y"]


@pytest.mark.parametrize(
    ("schema", "attributes", "mask", "words"),
    [
        (SPARSE_MLP, MLP, 0b1, "mask 0b1"),
        (SPARSE_MLP, MLP, (1 << 13) - 1, "mask 0b1111111111111"),
        (SPARSE_MLP, {"activation": "silu"}, 511, "attributes"),
        (SPARSE_MLP, MLP | {"layer": "3"}, 511, "attributes"),
        (SELECT_TOPK, {"cap": 7, "layer": 3}, 3, "attributes"),
    ],
)
def test_impossible_states_are_refused(schema, attributes, mask, words):
    with pytest.raises(ValueError, match=words):
        PluginState(schema, attributes, mask)


def test_a_node_that_was_not_prepared_is_refused():
    with pytest.raises(ValueError, match="no input_mask"):
        PluginState.from_fields(SPARSE_MLP, MLP)


def test_output_shapes_follow_the_inputs():
    assert state("SelectTopK").output_shapes([("rows", "width"), ("rows",)]) == [["rows", 7]]
    mlp = state("SparseMLP", REQUIRED["SparseMLP"])
    assert mlp.output_shapes([("b", "s", "d"), ("c",), (), ("f", "d"), ("f", "d")]) == [["b", "s", "d"]]
    attention = state("SparseAttention", REQUIRED["SparseAttention"])
    cache = ("b", "kv", "c", "h")
    shapes = [("b", "s", "d"), cache, cache, ("b",), ("i",), (), ("w", "d"), ("w", "d")]
    assert attention.output_shapes(shapes) == [["b", "s", "d"]]


def test_wrong_inputs_are_named():
    with pytest.raises(ValueError, match="1 inputs, expected 2"):
        state("SelectTopK").output_shapes([("r", "n")])
    with pytest.raises(ValueError, match=r"counts of SelectTopK has 0 dimensions, expected \['R'\]"):
        state("SelectTopK").output_shapes([("r", "n"), ()])


def test_creators_are_in_the_registry(trt):
    kept = creators.register(trt)
    for name in SCHEMAS:
        assert trt.get_plugin_registry().get_creator(name, "1", "shadowllm") is not None
    assert {creator.name for creator in kept} == set(SCHEMAS)


@pytest.mark.parametrize("name", SCHEMAS)
def test_creator_makes_the_plugin_it_serialised(trt, name):
    plugin, schema = creators.plugin_class(trt), SCHEMAS[name]
    creator = creators.creator_class(trt)(schema, plugin)
    before = plugin(state(name))
    after = creator.create_plugin("node", before.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME)
    assert [field.name for field in creator.field_names] == [*FULL[name], "input_mask"]
    assert after.state == before.state
    assert (after.plugin_name, after.plugin_version, after.plugin_namespace) == (name, "1", "shadowllm")
    assert after.num_outputs == len(schema.outputs)
    assert after.clone() is not after
    assert after.clone().state == after.attach_to_context(None).state == before.state


def describe(trt, plugin, type_t, **changes):
    """Descriptors of all inputs and outputs with T as ``type_t``, some changed by name."""
    types = {"T": type_t, "float32": trt.float32, "int32": trt.int32}
    return [
        SimpleNamespace(
            desc=SimpleNamespace(
                type=changes.get(port.name, types[port.dtype]), format=changes.get("format", trt.TensorFormat.LINEAR)
            )
        )
        for port in plugin.state.ports
    ]


@pytest.mark.parametrize("name", SCHEMAS)
def test_formats_and_types(trt, name):
    plugin = creators.plugin_class(trt)(state(name))
    count, n_inputs = len(plugin.state.ports), len(plugin.state.inputs)

    def supported(type_t, **changes):
        tensors = describe(trt, plugin, type_t, **changes)
        return [plugin.supports_format_combination(i, tensors, n_inputs) for i in range(count)]

    for type_t in (trt.float32, trt.float16, trt.bfloat16):
        assert all(supported(type_t))
    assert not any(supported(trt.float16, format=trt.TensorFormat.CHW4))
    last = plugin.state.ports[-1].name
    assert supported(trt.float16, **{last: trt.int64}) == [True] * (count - 1) + [False]
    if plugin.state.typed_input >= 0:
        assert not supported(trt.int8)[plugin.state.typed_input]
        assert supported(trt.float16, w_down=trt.float32, w_o=trt.float32).count(False) == 1


def test_output_types(trt):
    plugin = creators.plugin_class(trt)
    assert plugin(state("SelectTopK")).get_output_data_types([trt.float32, trt.int32]) == [trt.int32]
    inputs = [trt.bfloat16, trt.int32, trt.int32, *[trt.bfloat16] * 6]
    assert plugin(state("SparseMLP")).get_output_data_types(inputs) == [trt.bfloat16]


def test_running_says_that_there_are_no_kernels(trt):
    with pytest.raises(NotImplementedError, match=r"SparseAttention: .* no TensorRT kernels yet"):
        creators.plugin_class(trt)(state("SparseAttention")).enqueue(*[None] * 6)


def test_unknown_flavour_and_missing_package():
    with pytest.raises(UserError, match="no engine flavour 'onnx'; choose one of tensorrt_rtx, tensorrt"):
        flavour.load("onnx")
    if importlib.util.find_spec("tensorrt") is None:
        with pytest.raises(UserError, match=r"tensorrt is not installed.*pip install 'shadowllm\[tensorrt\]'"):
            flavour.load("tensorrt")
    assert "tensorrt" not in sys.modules


@pytest.mark.usefixtures("trt")
def test_child_finds_the_library_by_its_plain_name():
    with flavour.child_environment("tensorrt_rtx") as environment:
        folder = environment["LD_LIBRARY_PATH"].split(os.pathsep)[0]
        assert ctypes.CDLL(f"{folder}/libtensorrt_rtx.so").getInferLibVersion() > 0
    assert not os.path.exists(folder)
