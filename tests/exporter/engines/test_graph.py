"""The facts that an engine build reads from an ONNX file, and its copy for TensorRT's parser."""

from __future__ import annotations

from dataclasses import replace

import onnx
import pytest

from shadowllm.bundle.engine_record import CustomNode, ShapeProfile
from shadowllm.bundle.selection_names import SCALARS
from shadowllm.errors import UserError
from shadowllm.exporter.engines.graph import describe_onnx, prepare
from shadowllm.exporter.engines.profiles import bindings, check_profiles, largest, profiles_for
from shadowllm.plugins.kernel_program_bytes import pack
from tests.exporter.engines.samples import HEAD_DIM, HEADS, HIDDEN, NEURONS, write_sample, write_sum
from tests.plugins.kernel_programs import program

PROGRAMS = {op: program(sms=(sm,)) for op, sm in (("SelectTopK", 80), ("SparseMLP", 86), ("SparseAttention", 89))}
PLUGINS = ["layers.5.SparseAttention", "layers.5.SparseMLP", "layers.6.SparseAttention", "layers.6.SparseMLP"]


def test_description_of_a_graph(tmp_path):
    graph = describe_onnx(write_sample(tmp_path / "sample.onnx"))
    assert graph.opset == 24
    assert graph.data_files == ("sample.onnx.data",)
    assert graph.ops["shadowllm::SelectTopK"] == 4
    assert [node.name for node in graph.custom_ops if node.layer is not None] == PLUGINS
    assert CustomNode("SparseMLP", "layers.6.SparseMLP", 6) in graph.custom_ops
    assert graph.weight_bytes == 2 * 2 * HIDDEN * (2 * HEADS * HEAD_DIM + 3 * NEURONS) + 8
    assert graph.inputs[0].shape == ("batch", "seqlen", HIDDEN)
    assert (graph.outputs[0].name, graph.outputs[0].dtype) == ("y", "float16")


def test_copy_for_the_parser(tmp_path):
    path = write_sample(tmp_path / "sample.onnx")
    before = path.read_bytes()
    asked = []

    def compiler(op, inputs, attributes):
        asked.append((op, inputs, attributes))
        return PROGRAMS[op]

    prepared = prepare(path, {"capacity": 48}, compiler)
    model = onnx.load_from_string(prepared.model)
    assert path.read_bytes() == before
    assert not model.functions
    mlp = next(node for node in model.graph.node if node.name == "layers.6.SparseMLP")
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in mlp.attribute}
    assert attributes == {
        "plugin_namespace": b"shadowllm",
        "plugin_version": b"1",
        "program": pack(PROGRAMS["SparseMLP"]),
    }
    attention = next(node for node in model.graph.node if node.name == "layers.6.SparseAttention")
    assert len(attention.output) == 1  # the sample's node has two, the program one
    assert len(mlp.input) == 6
    assert all(mlp.input)
    custom = {node.name: PROGRAMS[node.op_type] for node in model.graph.node if node.domain == "shadowllm"}
    assert {node.name: made for node, made in prepared.programs.items()} == custom
    told = {(op, attributes.get("layer")): (inputs, attributes) for op, inputs, attributes in asked}
    inputs, attributes = told["SparseMLP", 6]
    assert attributes == {"activation": "silu", "layer": 6}
    assert {name: (t.dtype, t.shape) for name, t in inputs.items()} == {
        "x": ("float16", ("batch", "seqlen", HIDDEN)),
        "indices": ("int32", (NEURONS,)),
        "count": ("int32", ()),
        **{f"w_{part}": ("float16", (NEURONS, HIDDEN)) for part in ("gate", "up", "down")},
    }
    assert told["SparseAttention", 6][0]["key"].shape == ("batch", 2, 48, HEAD_DIM)
    assert told["SelectTopK", None][0]["scores"].dtype == "float32"
    dims = [d.dim_param or d.dim_value for d in model.graph.input[1].type.tensor_type.shape.dim]
    assert dims == ["batch", 2, 48, HEAD_DIM]


def test_weights_stay_outside_the_copy(tmp_path):
    prepared = prepare(write_sample(tmp_path / "sample.onnx"), {}, lambda op, _inputs, _attributes: PROGRAMS[op])
    model = onnx.load_from_string(prepared.model)
    external = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert len(external) == 10
    places = {entry.value for t in external for entry in t.external_data if entry.key == "location"}
    assert places == {"sample.onnx.data"}


@pytest.mark.parametrize(
    ("content", "words"), [(None, "no ONNX file"), (b"", "holds no graph"), (b"garbage", "damaged")]
)
def test_unusable_files_are_named(tmp_path, content, words):
    path = tmp_path / "piece.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        describe_onnx(path)


def test_inputs_of_unknown_type_are_named(tmp_path):
    path = write_sum(tmp_path / "sum.onnx", op="SelectTopK", domain="shadowllm")
    with pytest.raises(UserError, match=r"c.SelectTopK has no attribute 'cap'; export"):
        prepare(path, {}, lambda *_: PROGRAMS["SelectTopK"])
    path = write_sample(tmp_path / "sample.onnx")
    model = onnx.load(path, load_external_data=False)
    attention = next(node for node in model.graph.node if node.op_type == "SparseAttention")
    attention.input[0] = "guess"
    model.graph.node.insert(0, onnx.helper.make_node("Mystery", ["x"], ["guess"], domain="elsewhere"))
    onnx.save(model, path)
    with pytest.raises(UserError, match=r"type or shape of x of layers.5.SparseAttention cannot be told; export"):
        prepare(path, {}, lambda op, *_: PROGRAMS[op])


def test_unknown_op_of_our_domain_is_refused(tmp_path):
    with pytest.raises(UserError, match="shadowllm::SparseNorm"):
        describe_onnx(write_sum(tmp_path / "sum.onnx", op="SparseNorm", domain="shadowllm"))


def test_prefill_and_decode_profiles(tmp_path):
    graph = describe_onnx(write_sample(tmp_path / "sample.onnx"))
    prefill, decode = profiles = profiles_for(graph, capacity=64, max_seqlen=40, max_batch=3)
    assert prefill.shapes["x"] == ((1, 1, HIDDEN), (1, 20, HIDDEN), (3, 40, HIDDEN))
    assert decode.shapes["x"] == ((1, 1, HIDDEN), (1, 1, HIDDEN), (3, 1, HIDDEN))
    assert set(prefill.shapes) == {"x", "key", "value", "lengths"}
    assert bindings(graph, profiles) == {"capacity": 64}
    assert bindings(graph, [decode]) == {"capacity": 64, "seqlen": 1}
    check_profiles(graph, profiles)
    assert [largest(graph, profiles, symbol) for symbol in ("batch", "seqlen", "kept")] == [3, 40, 1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"capacity": 0, "max_seqlen": 1}, "capacity is 0"),
        ({"capacity": 8, "max_seqlen": 9}, "do not fit"),
        ({"capacity": 8, "max_seqlen": 8, "max_batch": 0}, "max_batch is 0"),
    ],
)
def test_impossible_profiles_are_refused(tmp_path, options, words):
    graph = describe_onnx(write_sample(tmp_path / "sample.onnx"))
    with pytest.raises(UserError, match=words):
        profiles_for(graph, **options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"a": None}, "lacks 'a'"),
        ({"z": ((1,), (1,), (1,))}, "'z', which is no input"),
        ({"a": ((1, 1), (1, 1), (1, 1))}, "'a' the shapes"),
        ({"a": ((3,), (2,), (4,))}, "min <= opt <= max"),
        ({"a": ((0,), (2,), (4,))}, "'a' the shapes"),
    ],
)
def test_profiles_that_do_not_fit_the_graph(tmp_path, change, words):
    graph = describe_onnx(write_sum(tmp_path / "sum.onnx"))
    shapes = dict.fromkeys("ab", ((1,), (2,), (3,))) | change
    with pytest.raises(UserError, match=words):
        check_profiles(graph, [ShapeProfile("own", {name: s for name, s in shapes.items() if s is not None})])


def test_a_dimension_without_a_range_is_named(tmp_path):
    with pytest.raises(UserError, match="'len_a' of a"):
        profiles_for(describe_onnx(write_sum(tmp_path / "sum.onnx")), capacity=4, max_seqlen=2)


def test_bytes_are_read_as_words(bundle):
    """The int32 copy uses the same bytes of the data file, because TensorRT has no uint8 weights."""
    asked = {}

    def compiler(op, inputs, attributes):
        asked[op, attributes.get("layer")] = inputs
        return program()

    folder = bundle("llama-blocks", kind="quantized-shadow")
    prepared = onnx.load_from_string(prepare(folder / "body.onnx", {"capacity": 48}, compiler).model)
    (name,) = {node.input[1] for node in prepared.graph.node if node.name == "layers.1.ScoreNeurons"}
    before, after = (
        next(t for t in model.graph.initializer if t.name == name)
        for model in (onnx.load(folder / "body.onnx", load_external_data=False), prepared)
    )
    assert (before.data_type, list(before.dims)) == (onnx.TensorProto.UINT8, [2 * 96, 1, 32])
    assert (after.data_type, list(after.dims)) == (onnx.TensorProto.INT32, [2 * 96, 1, 8])
    places = [{entry.key: entry.value for entry in t.external_data} for t in (before, after)]
    assert places[0] == places[1]
    inputs = asked["ScoreNeurons", 2]
    assert (inputs["copy"].dtype, inputs["copy"].shape) == ("int32", (2 * 96, 1, 8))
    assert (inputs["down_norms"].dtype, inputs["count"].shape) == ("float32", ())
    assert asked["SelectTopK", None]["scores"].shape == (1, 96)


@pytest.mark.parametrize("kind", ["quantized-shadow", "layerwise", "shadow"])
def test_a_rest_is_an_input_of_the_sparse_ops(bundle, kind):
    asked = {}

    def compiler(op, inputs, attributes):
        asked[op, attributes.get("layer")] = inputs
        return replace(program(), outputs=2 * program().outputs)

    path = bundle(kind=kind, rest="shadow") / "body.onnx"
    graph = describe_onnx(path)
    scalars = {tensor.name: tensor for tensor in graph.inputs if tensor.shape == ()}
    assert {name: tensor.dtype for name, tensor in scalars.items()} == dict.fromkeys(SCALARS, "int32")
    profiles = profiles_for(graph, capacity=48, max_seqlen=8)
    check_profiles(graph, profiles)  # scalars have no open shape, so no range
    assert not set(SCALARS) & set(profiles[0].shapes)
    prepare(path, {"capacity": 48}, compiler)
    attention, mlp, logits = (
        asked[key] for key in (("SparseAttention", 1), ("SparseMLP", 2), ("ShortlistLogits", None))
    )
    assert attention["rest"].shape == mlp["rest"].shape == logits["certify"].shape == ()
    assert (mlp["c_down"].dtype, mlp["c_down"].shape, mlp["cs_down"].shape) == ("int32", (88, 1, 8), (88, 1))
    assert (attention["c_o"].dtype, attention["c_o"].shape) == ("int32", (48, 1, 8))
    assert ("indices" in mlp, "down_norms" in mlp) == ((False, True) if kind == "quantized-shadow" else (True, False))
    assert ("indices" in attention, "score_weight" in attention) == (kind == "shadow", kind != "shadow")
    assert logits["copy"].shape == (97, 1, 8)
    assert logits["x"].shape[1] == 48


def test_rows_of_a_selection_are_read_in_place(bundle):
    """No Gather is left, and the indices and count of the second sparse layer begin one row later."""
    path = bundle("llama-gqa", kind="shadow") / "body.onnx"
    whole = program()
    prepared = prepare(path, {"capacity": 48}, lambda *_: whole)
    model = onnx.load_from_string(prepared.model)
    inputs = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in model.graph.input}
    gathered = {node.input[0] for node in model.graph.node if node.op_type == "Gather"}
    assert not [name for name in gathered if "indices" in name or "counts" in name]
    for layer, row in ((1, 0), (2, 1)):
        mlp = next(node for node in model.graph.node if node.name == f"layers.{layer}.SparseMLP")
        assert [inputs[name] for name in mlp.input[1:3]] == [[2, 88], [2]]
        made = next(made for named, made in prepared.programs.items() if named.name == mlp.name)
        assert made == whole.with_offsets({1: 4 * 88 * row})  # the sample's kernels read no third input
        assert pack(made) in prepared.model
