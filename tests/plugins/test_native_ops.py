"""The native ops against float64 arithmetic, on every kernel that this CPU can run.

An op may err by twice what the float32 NumPy reference errs, plus a floor of a few roundings of the result: both
add the same products, in another order.
"""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from shadowllm.bundle import op_domain
from shadowllm.bundle.quantisation import Quantisation, dense_rows, quantise
from shadowllm.plugins import native_ops, reference, schemas

ort = pytest.importorskip("onnxruntime")
KERNELS = native_ops.kernels()
if not KERNELS:
    pytest.skip("the native ops are not built", allow_module_level=True)
ONNX_TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.uint8): TensorProto.UINT8,
}


@pytest.mark.parametrize("isa", ["avx512vnni", "avx512", "avx2", "portable"])
def test_this_cpu_runs_the_kernels_for(isa):
    if isa not in KERNELS:
        pytest.skip(f"this CPU lacks {isa}: no test ran the native kernels for it")


@pytest.fixture(params=KERNELS)
def isa(request, monkeypatch) -> str:
    monkeypatch.setenv(native_ops.ISA_VARIABLE, request.param)
    return request.param


def make_session(
    op: str, inputs: dict[str, np.ndarray | None], weights: tuple[str, ...] = (), threads: int = 1, **attributes
):
    """A session of one node. Inputs named in ``weights`` are initializers, the others come with each run."""
    schema = schemas.SCHEMAS[op]
    given = {name: value for name, value in inputs.items() if value is not None}
    node = helper.make_node(
        op,
        [port.name if port.name in given else "" for port in schema.inputs],
        [schema.outputs[0].name],
        domain=op_domain.DOMAIN,
        **attributes,
    )
    fed = [
        helper.make_tensor_value_info(name, ONNX_TYPES[value.dtype], [f"{name}_{axis}" for axis in range(value.ndim)])
        for name, value in given.items()
        if name not in weights
    ]
    kind = TensorProto.INT32 if op == "SelectTopK" else TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "test",
        fed,
        [helper.make_tensor_value_info(schema.outputs[0].name, kind, None)],
        [onnx.numpy_helper.from_array(given[name], name) for name in weights if name in given],
    )
    model = helper.make_model(
        graph,
        ir_version=9,
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid(op_domain.DOMAIN, op_domain.VERSION)],
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # refused inputs are part of the tests
    assert native_ops.register(options)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(op: str, inputs: dict[str, np.ndarray | None], weights: tuple[str, ...] = (), threads: int = 1, **attributes):
    session = make_session(op, inputs, weights, threads, **attributes)
    feeds = {i.name: inputs[i.name] for i in session.get_inputs()}
    return session.run(None, feeds)[0]


# Of what integer rows are multiplied with: avx512vnni rounds it to 16 bits, and the errors of gate, up and down add.
INPUT_STEP = {"avx512vnni": 3 / 32639}


def assert_as_exact_as(found: np.ndarray, float32: np.ndarray, exact: np.ndarray, step: float = 0) -> None:
    assert found.shape == exact.shape
    floor = max(step, 8 * np.finfo(np.float32).eps) * np.abs(exact).max(initial=0)
    assert np.abs(found - exact).max(initial=0) <= 2 * np.abs(float32 - exact).max(initial=0) + floor


def pick(rng: np.random.Generator, bound: int, count: int, cap: int) -> np.ndarray:
    """``count`` ascending indices below ``bound``, then -1 up to ``cap``."""
    chosen = np.sort(rng.permutation(bound)[:count])
    return np.concatenate((chosen, np.full(cap - count, -1))).astype(np.int32)


# SparseMLP ---------------------------------------------------------------------------------------------------------

MLP_SCALES = ("s_gate", "s_up", "s_down")
MLP_WEIGHTS = ("w_gate", "b_gate", "w_up", "b_up", "w_down", "b_down")
MLP_FORMS = {  # activation, gated, biases
    "llama": ("silu", True, False),
    "llama-biases": ("silu", True, True),
    "opt": ("relu", False, True),
    "opt-untied": ("relu", False, False),
    "galactica": ("gelu", False, True),
    "relu-gated": ("relu", True, False),
}
MLP_SIZES = [  # D, F, B, S, count
    (41, 7, 1, 1, 7),
    (41, 7, 2, 3, 1),
    (123, 88, 1, 1, 45),
    (123, 88, 3, 5, 88),
    (123, 88, 1, 2, 0),
    (576, 1536, 1, 1, 1536),
    (576, 1536, 1, 1, 501),
    (576, 1536, 4, 17, 300),
    (64, 88, 1, 4, 3),
    (1, 1, 1, 1, 1),
]


def mlp_inputs(form: str, size: tuple[int, ...], seed: int = 0) -> dict[str, np.ndarray | None]:
    hidden, neurons, batch, seqlen, count = size
    _, gated, biases = MLP_FORMS[form]
    rng = np.random.default_rng(seed)

    def normal(*shape: int, given: bool = True) -> np.ndarray | None:
        return rng.standard_normal(shape).astype(np.float32) if given else None

    return {
        "x": normal(batch, seqlen, hidden),
        "indices": pick(rng, neurons, count, neurons),
        "count": np.asarray(count, dtype=np.int32),
        "w_gate": normal(neurons, hidden, given=gated),
        "b_gate": normal(neurons, given=gated and biases),
        "w_up": normal(neurons, hidden),
        "b_up": normal(neurons, given=biases),
        "w_down": normal(neurons, hidden),
        "b_down": normal(hidden, given=biases),
    }


def exact_mlp(inputs: dict[str, np.ndarray | None], activation: str) -> np.ndarray:
    wide = {k: v.astype(np.float64) for k, v in inputs.items() if v is not None and v.dtype != np.int32}
    rows = inputs["indices"][: int(inputs["count"])]
    up = wide["x"] @ wide["w_up"][rows].T + (wide["b_up"][rows] if "b_up" in wide else 0)
    act = reference.ACTIVATIONS[activation] if len(rows) else np.asarray  # np.vectorize refuses empty input
    hidden = (
        act(up)
        if "w_gate" not in wide
        else up * act(wide["x"] @ wide["w_gate"][rows].T + (wide["b_gate"][rows] if "b_gate" in wide else 0))
    )
    return hidden @ wide["w_down"][rows] + wide.get("b_down", 0)


@pytest.mark.parametrize("size", MLP_SIZES, ids=str)
@pytest.mark.parametrize("form", MLP_FORMS)
def test_mlp(form, size, isa):
    activation = MLP_FORMS[form][0]
    inputs = mlp_inputs(form, size)
    found = run("SparseMLP", inputs, MLP_WEIGHTS, threads=2, activation=activation, layer=3)
    exact = exact_mlp(inputs, activation)
    float32 = exact if size[-1] == 0 else reference.sparse_mlp(**inputs, activation=activation)
    assert_as_exact_as(found, float32, exact)


def test_mlp_weights_that_are_no_initializers():
    inputs = mlp_inputs("llama-biases", (123, 88, 2, 3, 50))
    attributes = {"activation": "silu", "layer": 0}
    np.testing.assert_array_equal(
        run("SparseMLP", inputs, (), **attributes), run("SparseMLP", inputs, MLP_WEIGHTS, **attributes)
    )


def test_mlp_far_from_zero(isa):
    """Activations saturate without overflow, and a NaN is not hidden."""
    inputs = mlp_inputs("llama", (64, 88, 1, 2, 88))
    inputs["x"] = inputs["x"] * np.float32(200)
    with np.errstate(over="ignore"):
        exact, float32 = exact_mlp(inputs, "silu"), reference.sparse_mlp(**inputs, activation="silu")
    assert_as_exact_as(run("SparseMLP", inputs, MLP_WEIGHTS, activation="silu", layer=0), float32, exact)
    inputs["x"][0, 1, 5] = np.nan
    for activation in ("relu", "silu", "gelu"):
        found = run("SparseMLP", inputs, MLP_WEIGHTS, activation=activation, layer=0)
        assert np.isfinite(found[0, 0]).all()
        assert np.isnan(found[0, 1]).all()


STATES = ort.capi.onnxruntime_pybind11_state
STORED = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}  # the ops widen these exactly


def stored(inputs: dict[str, np.ndarray | None], names: tuple[str, ...], dtype: str) -> dict[str, np.ndarray | None]:
    """The same inputs with their weights rounded to ``dtype``."""
    return {k: v.astype(STORED[dtype]) if k in names and v is not None else v for k, v in inputs.items()}


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("size", [(41, 7, 2, 3, 5), (576, 1536, 1, 1, 501), (123, 88, 1, 1, 88)], ids=str)
def test_mlp_with_weights_of_two_bytes(size, dtype, isa):
    inputs = stored(mlp_inputs("llama-biases", size), MLP_WEIGHTS, dtype)
    found = run("SparseMLP", inputs, MLP_WEIGHTS, threads=2, activation="silu", layer=3)
    assert_as_exact_as(found, reference.sparse_mlp(**inputs, activation="silu"), exact_mlp(inputs, "silu"))


QUANTISATIONS = [Quantisation(8), Quantisation(4), Quantisation(8, 64)]
INTEGER_SIZES = [
    (64, 7, 2, 3, 5),
    (576, 1536, 1, 1, 501),
    (192, 88, 1, 1, 88),
    (64, 88, 4, 17, 41),
    (128, 9, 1, 2, 0),
    (64, 88, 5, 13, 41),  # one token more than share a reading of the weights
    # One token: widths that end in the middle of a step, and last tiles of few rows.
    *((width, 88, 1, 1, count) for width, count in ((32, 87), (96, 85), (160, 81), (224, 86), (608, 65))),
]


def integers(inputs: dict[str, np.ndarray | None], q: Quantisation) -> dict[str, np.ndarray | None]:
    """The same inputs with their matrices as integers and scales."""
    matrices = [name for name, value in inputs.items() if name.startswith("w_") and value is not None]
    found = dict(inputs)
    for name in matrices:
        found[name], found[name.replace("w_", "s_")] = quantise(inputs[name], q)
    return found


def restored(inputs: dict[str, np.ndarray | None], width: int) -> dict[str, np.ndarray | None]:
    """Integer inputs as the floats that they stand for."""
    found = {name: value for name, value in inputs.items() if not name.startswith("s_")}
    for name, scales in inputs.items():
        if name.startswith("s_"):
            weight = name.replace("s_", "w_")
            found[weight] = dense_rows(inputs[weight], scales, width)
    return found


@pytest.mark.parametrize(
    ("size", "q"), [(size, q) for size in INTEGER_SIZES for q in QUANTISATIONS if size[0] % q.block == 0], ids=str
)
@pytest.mark.parametrize("form", ["llama-biases", "opt"])
def test_mlp_with_integer_weights(form, size, q, isa):
    activation = MLP_FORMS[form][0]
    inputs = integers(mlp_inputs(form, size), q)
    floats = restored(inputs, size[0])
    found = run("SparseMLP", inputs, (*MLP_WEIGHTS, *MLP_SCALES), threads=2, activation=activation, layer=3)
    exact = exact_mlp(floats, activation)
    float32 = exact if size[-1] == 0 else reference.sparse_mlp(**floats, activation=activation)
    assert_as_exact_as(found, float32, exact, INPUT_STEP.get(isa, 0))


def test_rows_longer_than_integer_products_take(isa):
    inputs = integers(mlp_inputs("opt", (16416, 9, 1, 1, 9)), Quantisation(4))
    exact = exact_mlp(restored(inputs, 16416), "relu")
    found = run("SparseMLP", inputs, (*MLP_WEIGHTS, *MLP_SCALES), activation="relu", layer=3)
    assert np.abs(found - exact).max() < 1e-5 * np.abs(exact).max()


def test_gate_and_up_of_different_integers(isa):
    inputs = mlp_inputs("llama", (192, 88, 1, 1, 45))
    fine, coarse = (integers(inputs, q) for q in (Quantisation(8), Quantisation(4)))
    inputs = fine | {name: coarse[name] for name in ("w_gate", "s_gate")}
    floats = restored(inputs, 192)
    found = run("SparseMLP", inputs, (*MLP_WEIGHTS, *MLP_SCALES), activation="silu", layer=3)
    exact, float32 = exact_mlp(floats, "silu"), reference.sparse_mlp(**floats, activation="silu")
    assert_as_exact_as(found, float32, exact, INPUT_STEP.get(isa, 0))


@pytest.mark.parametrize("name", MLP_SCALES)
def test_a_scale_that_is_no_number_is_not_hidden(name, isa):
    inputs = integers(mlp_inputs("llama", (128, 88, 1, 1, 45)), Quantisation(4))
    inputs[name][inputs["indices"][2], 1] = np.nan
    found = run("SparseMLP", inputs, (*MLP_WEIGHTS, *MLP_SCALES), activation="silu", layer=0)
    assert np.isnan(found).any()


@pytest.mark.parametrize("q", QUANTISATIONS, ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_integer_rows_do_not_hide_what_is_no_number(q, value, isa):
    inputs = integers(mlp_inputs("opt", (128, 88, 1, 1, 45)), q)
    inputs["x"][0, 0, 70] = value
    with np.errstate(invalid="ignore"):
        found = run("SparseMLP", inputs, (*MLP_WEIGHTS, *MLP_SCALES), activation="relu", layer=0)
    assert not np.isfinite(found).any()


@pytest.mark.parametrize("q", QUANTISATIONS, ids=str)
def test_integer_rows_are_the_same_beside_their_scales_and_apart(q, isa):
    """Initializers are packed when the kernel is made, other inputs are read where they lie."""
    inputs = integers(mlp_inputs("llama", (576, 88, 1, 1, 45)), q)
    packed = run("SparseMLP", inputs, (*MLP_WEIGHTS, *MLP_SCALES), activation="silu", layer=0)
    np.testing.assert_array_equal(run("SparseMLP", inputs, activation="silu", layer=0), packed)


def test_every_float16_is_widened_exactly(isa):
    """All finite values, subnormals included, as a bias that nothing is added to."""
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    values = values[np.isfinite(values)]
    inputs = mlp_inputs("llama", (values.size, 1, 1, 1, 0)) | {"b_down": values}
    found = run("SparseMLP", inputs, MLP_WEIGHTS, activation="silu", layer=0)
    np.testing.assert_array_equal(found[0, 0], values.astype(np.float32))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_mlp_of_no_tokens(shape):
    inputs = mlp_inputs("llama", (41, 7, *shape, 4))
    assert run("SparseMLP", inputs, MLP_WEIGHTS, activation="silu", layer=0).shape == (*shape, 41)


def test_mlp_takes_flat_hidden_states():
    inputs = mlp_inputs("opt", (123, 88, 3, 5, 45))
    expected = run("SparseMLP", inputs, MLP_WEIGHTS, activation="relu", layer=0)
    flat = inputs | {"x": inputs["x"].reshape(15, 123)}
    found = run("SparseMLP", flat, MLP_WEIGHTS, activation="relu", layer=0)
    np.testing.assert_array_equal(found, expected.reshape(15, 123))


# SparseAttention ---------------------------------------------------------------------------------------------------

ATTENTION_WEIGHTS = ("w_q", "b_q", "w_o", "b_o")
ATTENTION_SIZES = [  # D, H, n_kv, d, capacity, B, S, lengths, count
    (41, 1, 1, 2, 1, 1, 1, (1,), 1),
    (41, 3, 3, 6, 9, 1, 1, (9,), 2),
    (123, 6, 3, 20, 40, 2, 5, (5, 31), 6),
    (123, 9, 3, 8, 33, 3, 17, (17, 18, 33), 4),
    (576, 9, 3, 64, 300, 1, 1, (257,), 6),
    (576, 9, 3, 64, 64, 4, 1, (64, 1, 7, 40), 9),
    (64, 4, 2, 16, 21, 1, 2, (20,), 0),
    (96, 5, 5, 12, 20, 1, 4, (11,), 5),
    (2048, 32, 4, 64, 130, 1, 1, (129,), 16),
]
ATTENTION_FORMS = {"llama": (True, False), "llama-biases": (True, True), "opt": (False, True)}  # rope, biases


def attention_inputs(form: str, size: tuple, seed: int = 0) -> dict[str, np.ndarray | None]:
    hidden, heads, kv_heads, head_dim, capacity, batch, seqlen, lengths, count = size
    rope, biases = ATTENTION_FORMS[form]
    rng = np.random.default_rng(seed)

    def normal(*shape: int, given: bool = True) -> np.ndarray | None:
        return rng.standard_normal(shape).astype(np.float32) if given else None

    cache = (batch, kv_heads, capacity, head_dim)
    angles = rng.uniform(0, 7, (batch, seqlen, head_dim // 2))
    inputs = {
        "x": normal(batch, seqlen, hidden),
        "key": normal(*cache),
        "value": normal(*cache),
        "lengths": np.asarray(lengths, dtype=np.int32),
        "indices": pick(rng, heads, count, heads),
        "count": np.asarray(count, dtype=np.int32),
        "w_q": normal(heads * head_dim, hidden),
        "b_q": normal(heads * head_dim, given=biases),
        "w_o": normal(heads * head_dim, hidden),
        "b_o": normal(hidden, given=biases),
        "cos": np.cos(angles).astype(np.float32) if rope else None,
        "sin": np.sin(angles).astype(np.float32) if rope else None,
    }
    inputs["w_q"] /= math.sqrt(hidden)  # scores of a few units: neither uniform nor one-hot attention
    return inputs


def exact_attention(inputs: dict[str, np.ndarray | None], heads: int) -> np.ndarray:
    wide = {k: v.astype(np.float64) for k, v in inputs.items() if v is not None and v.dtype != np.int32}
    batch, seqlen, hidden = inputs["x"].shape
    d, group = inputs["key"].shape[3], heads // inputs["key"].shape[1]
    y = np.zeros((batch, seqlen, hidden)) + wide.get("b_o", 0)
    for head in inputs["indices"][: int(inputs["count"])]:
        rows = slice(head * d, (head + 1) * d)
        for b in range(batch):
            for s in range(seqlen):
                query = wide["w_q"][rows] @ wide["x"][b, s] + (wide["b_q"][rows] if "b_q" in wide else 0)
                if "cos" in wide:
                    query = reference.rotate(query, wide["cos"][b, s], wide["sin"][b, s])
                seen = inputs["lengths"][b] - seqlen + s + 1
                scores = wide["key"][b, head // group, :seen] @ query / math.sqrt(d)
                weights = np.exp(scores - scores.max())
                y[b, s] += weights / weights.sum() @ wide["value"][b, head // group, :seen] @ wide["w_o"][rows]
    return y


@pytest.mark.parametrize("size", ATTENTION_SIZES, ids=str)
@pytest.mark.parametrize("form", ATTENTION_FORMS)
def test_attention(form, size, isa):
    inputs = attention_inputs(form, size)
    exact, float32 = exact_attention(inputs, size[1]), reference.sparse_attention(**inputs, n_heads=size[1])
    for batch, length in enumerate(size[7]):  # what lies behind the sequence must not be read
        inputs["key"][batch, :, length:] = inputs["value"][batch, :, length:] = np.nan
    found = run("SparseAttention", inputs, ATTENTION_WEIGHTS, threads=2, n_heads=size[1], layer=3)
    assert_as_exact_as(found, float32, exact)


def test_attention_takes_flat_hidden_states():
    inputs = attention_inputs("llama-biases", (123, 6, 3, 20, 40, 2, 5, (5, 31), 4))
    expected = run("SparseAttention", inputs, ATTENTION_WEIGHTS, n_heads=6, layer=0)
    flat = inputs | {"x": inputs["x"].reshape(10, 123)}
    found = run("SparseAttention", flat, ATTENTION_WEIGHTS, n_heads=6, layer=0)
    np.testing.assert_array_equal(found, expected.reshape(10, 123))


@pytest.mark.parametrize("dtype", STORED)
def test_attention_with_weights_of_two_bytes(dtype, isa):
    size = ATTENTION_SIZES[3]
    inputs = stored(attention_inputs("llama-biases", size), ATTENTION_WEIGHTS, dtype)
    found = run("SparseAttention", inputs, ATTENTION_WEIGHTS, threads=2, n_heads=size[1], layer=3)
    assert_as_exact_as(found, reference.sparse_attention(**inputs, n_heads=size[1]), exact_attention(inputs, size[1]))


@pytest.mark.parametrize("q", QUANTISATIONS, ids=str)
@pytest.mark.parametrize("form", ATTENTION_FORMS)
@pytest.mark.parametrize(
    "size",
    [
        (64, 6, 3, 20, 40, 2, 5, (5, 31), 4),
        (576, 9, 3, 64, 300, 1, 1, (257,), 6),
        (192, 4, 2, 16, 21, 1, 2, (20,), 0),
        (128, 9, 3, 8, 33, 3, 17, (17, 18, 33), 9),
    ],
    ids=str,
)
def test_attention_with_integer_weights(form, size, q, isa):
    inputs = integers(attention_inputs(form, size), q)
    floats = restored(inputs, size[0])
    exact, float32 = exact_attention(floats, size[1]), reference.sparse_attention(**floats, n_heads=size[1])
    weights = (*ATTENTION_WEIGHTS, "s_q", "s_o")
    found = run("SparseAttention", inputs, weights, threads=2, n_heads=size[1], layer=3)
    assert_as_exact_as(found, float32, exact, INPUT_STEP.get(isa, 0))


# Random shapes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_random_shapes_and_damage(seed, isa):
    """Sound inputs give the reference's result; damaged ones an error or a result, never a crash."""
    rng = np.random.default_rng(seed)
    kv_heads, group, head_dim, batch, seqlen = (int(n) for n in rng.integers(1, [4, 4, 40, 4, 20]))
    neurons, hidden, capacity = int(rng.integers(1, 120)), int(rng.integers(1, 200)), seqlen + int(rng.integers(0, 60))
    heads = kv_heads * group
    mlp = mlp_inputs("llama-biases", (hidden, neurons, batch, seqlen, int(rng.integers(1, neurons + 1))), seed)
    attention = attention_inputs(
        "llama",
        (
            hidden,
            heads,
            kv_heads,
            2 * head_dim,
            capacity,
            batch,
            seqlen,
            rng.integers(seqlen, capacity + 1, batch),
            int(rng.integers(0, heads + 1)),
        ),
    )
    for op, inputs, weights, attributes, sound in (
        ("SparseMLP", mlp, MLP_WEIGHTS, {"activation": "silu"}, reference.sparse_mlp),
        ("SparseAttention", attention, ATTENTION_WEIGHTS, {"n_heads": heads}, reference.sparse_attention),
    ):
        exact = sound(**inputs, **attributes)
        found = run(op, inputs, weights, threads=2, layer=1, **attributes)
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-5 * max(1, np.abs(exact).max()))
        victim = rng.choice([name for name, value in inputs.items() if value is not None])
        damaged = inputs | {victim: damage(rng, inputs[victim])}
        try:
            run(op, damaged, weights, layer=1, **attributes)
        except (STATES.InvalidArgument, STATES.RuntimeException) as error:  # of a run, of the session's creation
            assert f"{op} layer 1: " in str(error)  # noqa: PT017 - a harmless damage raises nothing


def damage(rng: np.random.Generator, array: np.ndarray) -> np.ndarray:
    """Integers out of range, or floats of another shape."""
    if array.dtype == np.int32:
        return rng.choice(np.array([-(2**31), -1, 0, 1, 5, 1000, 2**31 - 1], dtype=np.int32), array.shape)
    return np.ones(rng.integers(0, 4, int(rng.integers(0, 6))), dtype=np.float32)


# SelectTopK --------------------------------------------------------------------------------------------------------


def scores_of(kind: str, rows: int, n: int) -> np.ndarray:
    rng = np.random.default_rng(n)
    if kind == "normal":
        return rng.standard_normal((rows, n)).astype(np.float32)
    if kind == "ties":
        return rng.integers(-2, 3, (rows, n)).astype(np.float32) * np.float32(-0.0 if n % 2 else 1)
    if kind == "close":  # neighbouring floats: differ in the last digit of the radix only
        return (1 + rng.integers(0, 9, (rows, n)) * np.finfo(np.float32).eps).astype(np.float32)
    special = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-45, -1e-45, 3e38], dtype=np.float32)
    return rng.choice(special, (rows, n))


@pytest.mark.parametrize("kind", ["normal", "ties", "close", "special"])
@pytest.mark.parametrize(("rows", "n", "cap"), [(1, 1, 1), (3, 7, 7), (5, 41, 60), (29, 1536, 768), (13, 123, 100)])
def test_select_topk(kind, rows, n, cap):
    scores = scores_of(kind, rows, n)
    counts = np.random.default_rng(1).integers(0, min(cap, n) + 1, rows).astype(np.int32)
    counts[-1], counts[0] = 0, min(cap, n)
    found = run("SelectTopK", {"scores": scores, "counts": counts}, threads=2, cap=cap)
    np.testing.assert_array_equal(found, reference.select_topk(scores, counts, cap))


def test_shapes_are_inferred():
    x = mlp_inputs("llama", (41, 7, 1, 1, 7))
    session = make_session("SelectTopK", {"scores": scores_of("normal", 2, 9), "counts": np.zeros(2, np.int32)}, cap=5)
    assert session.get_outputs()[0].shape[1] == 5
    if tuple(map(int, ort.__version__.split(".")[:2])) >= (1, 24):  # earlier ones cannot where inputs are absent
        session = make_session("SparseMLP", x, MLP_WEIGHTS, activation="silu", layer=0)
        assert session.get_outputs()[0].shape == ["x_0", "x_1", "x_2"]
