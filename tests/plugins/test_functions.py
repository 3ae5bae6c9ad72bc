"""The ONNX function bodies on stock ONNX Runtime against the NumPy references, on awkward sizes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from shadowllm.bundle import op_domain
from shadowllm.bundle.quantisation import Quantisation, quantise
from shadowllm.plugins import reference, schemas
from shadowllm.plugins.functions import OPSET, CopyForm, FunctionForm, function_bodies

# float32 sums of a few hundred products of numbers near 1.
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
FORM = FunctionForm(
    activation="silu",
    gated=True,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    rope=True,
    n_heads=6,
    n_kv_heads=2,
    head_dim=8,
)


def run(schema: schemas.OpSchema, form: FunctionForm, feeds: dict[str, np.ndarray], **attributes) -> np.ndarray:
    """One node of the op in a model that carries the function bodies."""
    inputs = {
        name: ir.val(name, dtype=ir.DataType.from_numpy(array.dtype), shape=array.shape)
        for name, array in feeds.items()
    }
    node = ir.node(schema.name, [inputs.get(port.name) for port in schema.inputs], attributes, domain=op_domain.DOMAIN)
    output = node.outputs[0]
    output.name, output.dtype = "output", ir.DataType.INT32 if schema is schemas.SELECT_TOPK else ir.DataType.FLOAT
    graph = ir.Graph(list(inputs.values()), [output], nodes=[node], opset_imports={"": OPSET, op_domain.DOMAIN: 1})
    model = ir.Model(graph, ir_version=11, functions=function_bodies(form))
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def padded(chosen: np.ndarray, cap: int) -> np.ndarray:
    out = np.full(cap, -1, dtype=np.int32)
    out[: len(chosen)] = np.sort(chosen)
    return out


class TestSelectTopK:
    @pytest.mark.parametrize(("n", "counts"), [(1, [1]), (41, [0, 7, 41]), (123, [1, 122, 61]), (1000, [999])])
    def test_against_reference(self, n, counts):
        scores = np.random.default_rng(n).standard_normal((len(counts), n)).astype(np.float32)
        counts = np.array(counts, dtype=np.int32)
        found = run(schemas.SELECT_TOPK, FORM, {"scores": scores, "counts": counts}, cap=n)
        np.testing.assert_array_equal(found, reference.select_topk(scores, counts, n))

    def test_ties_go_to_the_lower_index(self):
        scores = np.array([[1, 2, 2, 1, 2, 1]], dtype=np.float32)
        found = run(schemas.SELECT_TOPK, FORM, {"scores": scores, "counts": np.array([4], dtype=np.int32)}, cap=6)
        assert found.tolist() == [[0, 1, 2, 4, -1, -1]]

    def test_cap_below_the_row(self):
        scores = np.arange(10, dtype=np.float32)[None]
        found = run(schemas.SELECT_TOPK, FORM, {"scores": scores, "counts": np.array([2], dtype=np.int32)}, cap=3)
        assert found.tolist() == [[8, 9, -1]]


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("batch", "seqlen", "hidden", "width", "count"), [(1, 1, 41, 7, 7), (2, 3, 24, 123, 0), (3, 17, 5, 88, 41)]
)
def test_sparse_mlp(activation, gated, bias, batch, seqlen, hidden, width, count):
    rng = np.random.default_rng(width)
    form = FunctionForm(activation, gated, False, False, bias, True, 6, 2, 8)
    present = {"w_up": (width, hidden), "w_down": (width, hidden)} | ({"w_gate": (width, hidden)} if gated else {})
    if bias:
        present |= {"b_up": (width,), "b_down": (hidden,)} | ({"b_gate": (width,)} if gated else {})
    tensors = {name: 0.3 * rng.standard_normal(shape).astype(np.float32) for name, shape in present.items()}
    x = rng.standard_normal((batch, seqlen, hidden)).astype(np.float32)
    indices = padded(rng.choice(width, count, replace=False), width)
    feeds = {"x": x, "indices": indices, "count": np.array(count, dtype=np.int32)} | tensors
    expected = reference.sparse_mlp(
        x,
        indices,
        count,
        *(tensors.get(name) for name in ("w_gate", "b_gate", "w_up", "b_up", "w_down", "b_down")),
        activation=activation,
    )
    found = run(schemas.SPARSE_MLP, form, feeds, activation=activation, layer=0)
    np.testing.assert_allclose(found, expected, **TOLERANCE)


@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (6, 2), (5, 1), (9, 3)])
@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("batch", "seqlen", "length", "count"), [(1, 1, 1, 1), (2, 1, 11, 3), (3, 5, 7, 4)])
def test_sparse_attention(heads, kv, rope, bias, batch, seqlen, length, count):
    hidden, dim, capacity = 41, 8, 13
    rng = np.random.default_rng(heads * length)

    def random(*shape):
        return 0.5 * rng.standard_normal(shape).astype(np.float32)

    form = FunctionForm("silu", True, bias, bias, False, rope, heads, kv, dim)
    tensors = {
        "key": random(batch, kv, capacity, dim),
        "value": random(batch, kv, capacity, dim),
        "w_q": random(heads * dim, hidden),
        "w_o": random(heads * dim, hidden),
    }
    if bias:
        tensors |= {"b_q": random(heads * dim), "b_o": random(hidden)}
    if rope:
        angles = random(batch, seqlen, dim // 2)
        tensors |= {"cos": np.cos(angles), "sin": np.sin(angles)}
    x = random(batch, seqlen, hidden)
    lengths = np.arange(length, length + batch, dtype=np.int32)  # a different one for each sequence
    indices = padded(rng.choice(heads, count, replace=False), heads)
    feeds = {"x": x, "lengths": lengths, "indices": indices, "count": np.array(count, dtype=np.int32)} | tensors
    expected = reference.sparse_attention(
        x,
        tensors["key"],
        tensors["value"],
        lengths,
        indices,
        count,
        tensors["w_q"],
        tensors.get("b_q"),
        tensors["w_o"],
        tensors.get("b_o"),
        tensors.get("cos"),
        tensors.get("sin"),
        n_heads=heads,
    )
    found = run(schemas.SPARSE_ATTENTION, form, feeds, n_heads=heads, layer=0)
    np.testing.assert_allclose(found, expected, **TOLERANCE)


@pytest.mark.parametrize("q", [Quantisation(8), Quantisation(4), Quantisation(4, 16)], ids=str)
@pytest.mark.parametrize("count", [0, 1, 41])
def test_integer_weights(q, count):
    rng = np.random.default_rng(count)
    x = rng.standard_normal((2, 3, 64)).astype(np.float32)
    feeds = {"x": x, "indices": padded(rng.choice(41, count, replace=False), 41), "count": np.array(count, np.int32)}
    for part in ("gate", "up", "down"):
        feeds[f"w_{part}"], feeds[f"s_{part}"] = quantise(0.3 * rng.standard_normal((41, 64)).astype(np.float32), q)
    form = replace(FORM, quantisation=q)
    found = run(schemas.SPARSE_MLP, form, feeds, activation="silu", layer=0)
    expected = reference.sparse_mlp(**feeds, b_gate=None, b_up=None, b_down=None, activation="silu")
    np.testing.assert_allclose(found, expected, **TOLERANCE)

    angles, cache = rng.standard_normal((2, 3, 4)), rng.standard_normal((2, 2, 2, 9, 8)).astype(np.float32)
    feeds = {
        "x": x,
        "key": cache[0],
        "value": cache[1],
        "lengths": np.array([3, 9], np.int32),
        "indices": padded(np.array([1, 2, 5]), 6),  # the standard Attention takes no fewer than one head
        "count": np.array(3, np.int32),
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
    }
    for part in ("q", "o"):
        feeds[f"w_{part}"], feeds[f"s_{part}"] = quantise(0.3 * rng.standard_normal((48, 64)).astype(np.float32), q)
    found = run(schemas.SPARSE_ATTENTION, form, feeds, n_heads=6, layer=0)
    expected = reference.sparse_attention(**feeds, b_q=None, b_o=None, n_heads=6)
    np.testing.assert_allclose(found, expected, **TOLERANCE)


class TestReference:
    """The references themselves: against the plain dense formula, and their bounds."""

    def test_all_active_mlp_is_the_dense_mlp(self):
        rng = np.random.default_rng(0)
        x, (up, down) = rng.standard_normal((1, 2, 5)), rng.standard_normal((2, 7, 5))
        found = reference.sparse_mlp(x, np.arange(7), 7, None, None, up, None, down, None, activation="relu")
        np.testing.assert_allclose(found, np.maximum(x @ up.T, 0) @ down, rtol=1e-5)

    @pytest.mark.parametrize(
        ("indices", "count", "words"), [([0, 9], 2, "index 9"), ([-1, 0], 1, "index -1"), ([0], 2, "count 2")]
    )
    def test_out_of_range_is_an_error(self, indices, count, words):
        with pytest.raises(IndexError, match=words):
            reference.active(np.array(indices), count, 9)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("batch", "seqlen", "hidden", "width"), [(1, 1, 41, 7), (3, 17, 130, 88)])
def test_score_neurons(activation, gated, bias, batch, seqlen, hidden, width):
    """ONNX Runtime rounds what it multiplies integers with to 8 bits where it has fast kernels for that."""
    rng, q, rows = np.random.default_rng(width), Quantisation(bits=4, block=64), (1 + gated) * width
    form = replace(FORM, activation=activation, gated=gated, mlp_bias=bias, copy=CopyForm(hidden, rows, q))
    data, scales = quantise(0.3 * rng.standard_normal((rows, hidden)).astype(np.float32), q)
    x = rng.standard_normal((batch, seqlen, hidden)).astype(np.float32)
    parts = [] if not bias else ["b_gate", "b_up"] if gated else ["b_up"]
    biases = {part: rng.standard_normal(width).astype(np.float32) for part in parts}
    inputs = {"copy": data.reshape(rows, q.blocks(hidden), -1), "scales": scales}
    lengths = rng.random(width).astype(np.float32)
    feeds = {"x": x, **inputs, "lengths": lengths, "count": np.array(3, np.int32)} | biases
    found = run(schemas.SCORE_NEURONS, form, feeds, activation=activation, layer=0)
    given = dict.fromkeys(("b_gate", "b_up")) | biases
    wanted = reference.score_neurons(x, **inputs, **given, lengths=lengths, activation=activation)
    np.testing.assert_allclose(found, wanted, rtol=0.02, atol=0.02 * wanted.max())
