"""The native library: how it is found and registered, and how ONNX Runtime uses it."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import warnings

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from shadowllm.bundle import op_domain
from shadowllm.errors import UserError
from shadowllm.plugins import native_ops
from shadowllm.plugins.function_body import OPSET, FunctionForm
from shadowllm.plugins.registry import NATIVE_SCHEMAS, SCHEMAS, function_bodies
from tests.plugins.native_model import built, make_session, ort, run
from tests.plugins.ops.select_topk.native_inputs import scores_of
from tests.plugins.ops.shortlist_logits.table_inputs import table_inputs, with_counts
from tests.plugins.ops.sparse_attention.native_inputs import attention_inputs
from tests.plugins.ops.sparse_mlp.native_inputs import MLP_WEIGHTS, mlp_inputs

FORM = FunctionForm(
    activation="silu",
    gated=True,
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
    rope=True,
    n_heads=6,
    n_kv_heads=3,
    head_dim=20,
)


@built
def test_sessions_can_share_options():
    options = ort.SessionOptions()
    assert native_ops.register(options)
    assert native_ops.register(ort.SessionOptions())


def test_missing_library_warns_once_and_names_the_remedy(monkeypatch):
    native_ops._warn_once.cache_clear()
    monkeypatch.delenv(native_ops.PATH_VARIABLE, raising=False)
    monkeypatch.setattr(native_ops, "FILE_NAME", "no_such_library.so")
    with pytest.warns(
        RuntimeWarning,
        match=r"no compiled ops in .*plugins, .*: pip install --editable .",
    ):
        assert not native_ops.register(ort.SessionOptions())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not native_ops.register(ort.SessionOptions())
    assert native_ops.kernels() == ()


def test_damaged_library_warns(monkeypatch, tmp_path):
    path = tmp_path / "damaged.so"
    path.write_bytes(b"\x7fELF, but no more than that")
    monkeypatch.setenv(native_ops.PATH_VARIABLE, str(path))
    with pytest.warns(RuntimeWarning, match="damaged.so do not load"):
        assert not native_ops.register(ort.SessionOptions())
    assert native_ops.kernels() == ()
    assert not native_ops.linear_pays()


def test_path_that_is_no_file(monkeypatch, tmp_path):
    monkeypatch.setenv(native_ops.PATH_VARIABLE, str(tmp_path / "nothing.so"))
    with pytest.raises(UserError, match=r"nothing\.so, which is no file"):
        native_ops.library()


@built
def test_a_runtime_too_old_gets_an_error_not_a_crash(tmp_path):
    """A stand-in for an old runtime: it offers version 1 of the table, whose first function makes a status."""
    script = f"""
import ctypes as c
made = []
create = c.CFUNCTYPE(c.c_void_p, c.c_int, c.c_char_p)(lambda code, text: made.append(text.decode()) or 1)
table = (c.c_void_p * 1)(c.cast(create, c.c_void_p))
get = c.CFUNCTYPE(c.c_void_p, c.c_uint32)(lambda version: c.addressof(table) if version == 1 else None)
base = (c.c_void_p * 2)(c.cast(get, c.c_void_p), None)
register = c.CDLL({str(native_ops.library())!r}).RegisterCustomOps
register.restype = c.c_void_p
assert register(None, c.byref(base)) == 1
print(made)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "need ONNX Runtime 1.24 or later" in done.stdout


def model_with_bodies(op: str, inputs: dict[str, np.ndarray], **attributes) -> bytes:
    """One node and the function bodies of its domain, as in a bundle."""
    schema = SCHEMAS[op]
    types = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int32): TensorProto.INT32}
    node = helper.make_node(
        op,
        [port.name if port.name in inputs else "" for port in schema.inputs],
        [schema.outputs[0].name],
        domain=op_domain.DOMAIN,
        **attributes,
    )
    graph = helper.make_graph(
        [node],
        "test",
        [helper.make_tensor_value_info(n, types[a.dtype], a.shape) for n, a in inputs.items()],
        [helper.make_tensor_value_info(schema.outputs[0].name, TensorProto.FLOAT, None)],
    )
    bodies = [ir.serde.serialize_function(f) for f in function_bodies(FORM) if f.name == op]
    model = helper.make_model(
        graph,
        ir_version=10,
        functions=bodies,
        opset_imports=[
            helper.make_opsetid("", OPSET),
            helper.make_opsetid(op_domain.DOMAIN, op_domain.VERSION),
        ],
    )
    return model.SerializeToString()


@built
@pytest.mark.parametrize("op", ["SparseMLP", "SparseAttention"])
def test_one_file_runs_the_body_or_the_native_op(op):
    if op == "SparseMLP":
        inputs, attributes = mlp_inputs("llama-biases", (123, 88, 2, 3, 40)), {"activation": "silu", "layer": 7}
    else:
        inputs = attention_inputs("llama-biases", (123, 6, 3, 20, 40, 2, 5, (5, 31), 4))
        attributes = {"n_heads": 6, "layer": 7}
    model = model_with_bodies(op, inputs, **attributes)
    outputs = {}
    for native in (False, True):
        options = ort.SessionOptions()
        options.log_severity_level = 4
        if native:
            assert native_ops.register(options)
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        outputs[native] = session.run(None, inputs)[0]
        with pytest.raises(Exception, match=r"out of|outside") as error:
            session.run(None, inputs | {"indices": np.full_like(inputs["indices"], 10**6)})
        assert (f"{op} layer 7: index 1000000 is outside" in str(error.value)) == native  # only the op has this message
    np.testing.assert_allclose(outputs[True], outputs[False], rtol=0, atol=2e-6 * np.abs(outputs[False]).max())


@built
@pytest.mark.parametrize("size", [(576, 1536, 1, 1, 700), (123, 88, 3, 5, 80)])
def test_threads_do_not_change_a_bit(size):
    inputs = mlp_inputs("llama-biases", size)
    one, two, three = (run("SparseMLP", inputs, MLP_WEIGHTS, threads=n, activation="silu", layer=0) for n in (1, 2, 3))
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one, three)


@built
def test_threads_do_not_change_a_bit_of_attention():
    inputs = attention_inputs("llama", (576, 9, 3, 64, 300, 2, 3, (257, 30), 7))
    one, two = (run("SparseAttention", inputs, ("w_q", "w_o"), threads=n, n_heads=9, layer=0) for n in (1, 2))
    np.testing.assert_array_equal(one, two)


def test_registration_is_silent_where_it_works():
    if not native_ops.kernels():
        pytest.skip("the native ops are not built")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native_ops.register(ort.SessionOptions())


@built
def test_an_input_of_unknown_unnamed_size_loads(tmp_path):
    """A computed shape has dimensions without size or name; shape inference must not read these as sizes."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((7, 5)).astype(np.float32)
    x, shape = ir.val("x", dtype=ir.DataType.FLOAT, shape=["n", 5]), ir.val("shape", dtype=ir.DataType.INT64, shape=[3])
    indices = ir.val("indices", dtype=ir.DataType.INT32, shape=[7])
    count = ir.val("count", dtype=ir.DataType.INT32, shape=[])
    rows = ir.Value(name="rows", const_value=ir.tensor(weight, name="rows"))
    rows.dtype, rows.shape = ir.DataType.FLOAT, ir.Shape([7, 5])
    flat = ir.Value(name="flat", const_value=ir.tensor(np.array([-1, 5]), name="flat"))
    flat.dtype, flat.shape = ir.DataType.INT64, ir.Shape([2])
    wide = ir.node("Reshape", [x, shape])
    mlp = ir.node(
        "SparseMLP",
        [wide.outputs[0], indices, count, None, None, rows, None, rows],
        {"activation": "relu", "layer": 0},
        domain=op_domain.DOMAIN,
    )
    back = ir.node("Reshape", [mlp.outputs[0], flat])
    back.outputs[0].name, back.outputs[0].dtype = "y", ir.DataType.FLOAT
    graph = ir.Graph(
        [x, shape, indices, count],
        back.outputs,
        nodes=[wide, mlp, back],
        initializers=[rows, flat],
        opset_imports={"": OPSET, op_domain.DOMAIN: op_domain.VERSION},
    )
    options = ort.SessionOptions()
    assert native_ops.register(options)
    session = ort.InferenceSession(ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString(), options)
    feeds = {
        "x": rng.standard_normal((6, 5)).astype(np.float32),
        "shape": np.array([2, 3, 5]),
        "indices": np.arange(7, dtype=np.int32),
        "count": np.array(7, dtype=np.int32),
    }
    expected = np.maximum(feeds["x"] @ weight.T, 0) @ weight
    np.testing.assert_allclose(session.run(None, feeds)[0], expected, rtol=1e-5, atol=1e-5)


@built
def test_shapes_are_inferred():
    x = mlp_inputs("llama", (41, 7, 1, 1, 7))
    session = make_session("SelectTopK", {"scores": scores_of("normal", 2, 9), "counts": np.zeros(2, np.int32)}, cap=5)
    assert session.get_outputs()[0].shape[1] == 5
    session = make_session("SparseMLP", x, MLP_WEIGHTS, activation="silu", layer=0)
    assert session.get_outputs()[0].shape == ["x_0", "x_1", "x_2"]
    inputs = with_counts(table_inputs("normal", 7, 1, 41), 3, certify=False)
    session = make_session("ShortlistLogits", inputs, ("table",), outputs=None)
    assert [output.shape for output in session.get_outputs()] == [["x_0", 7], ["x_0"]]


@built
def test_unknown_kernels_refused(monkeypatch):
    monkeypatch.setenv(native_ops.ISA_VARIABLE, "mmx")
    with pytest.raises(UserError, match=r"SHADOWLLM_NATIVE_ISA is 'mmx', but this CPU runs .*portable"):
        native_ops.register(ort.SessionOptions())
    library = str(native_ops.library())  # refuses them too
    monkeypatch.setattr(native_ops, "register", lambda given: given.register_custom_ops_library(library) is None)
    with pytest.raises(Exception, match=r"SHADOWLLM_NATIVE_ISA is 'mmx', but this CPU runs .*portable"):
        run("SparseMLP", mlp_inputs("llama", (41, 7, 1, 2, 3)), MLP_WEIGHTS, activation="silu", layer=11)


@built
def test_what_is_registered_has_the_ports_of_the_schemas():
    """The tables that the library hands to ONNX Runtime, in its numbers: 0 is any of the types of weights."""
    tell = ctypes.CDLL(str(native_ops.library())).shadowllm_native_signatures
    tell.restype = ctypes.c_char_p
    told = dict(line.split(" ", 1) for line in tell().decode().splitlines())
    schemas = SCHEMAS | NATIVE_SCHEMAS
    assert set(told) == set(schemas) - {"NestedGather", "ScoreNeurons"}  # of engines only; with a body that is as fast
    types = {"T": {TensorProto.FLOAT, 0}, "float32": {TensorProto.FLOAT}, "int32": {TensorProto.INT32}}
    types["uint8"] = {TensorProto.UINT8}
    for op, line in told.items():
        inputs, outputs = line.split("-> ")
        ports = (*schemas[op].inputs, *schemas[op].outputs)
        for port, text in zip(ports, (*inputs.split(), *outputs.split()), strict=True):
            name, dtype, optional = text.split(":")
            assert (name, int(optional)) == (port.name, port.optional)
            assert int(dtype) in types[port.dtype], f"{op} {name}"
