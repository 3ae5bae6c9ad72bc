"""The native op with a norm, and with the projection of keys and values, which it writes to the cache."""

from __future__ import annotations

import numpy as np
import pytest

from shadowllm.bundle.quantisation import NESTED, quantise_nested
from shadowllm.plugins.ops.sparse_attention.reference import rotate
from shadowllm.plugins.reference import full_rows
from tests.plugins.native_model import QUANTISATIONS, REFUSED, STORED, built, integers, restored, run, run_all
from tests.plugins.norms import EPSILON, norm_inputs, without_norm
from tests.plugins.ops.sparse_attention.mixed_inputs import MIXED_WEIGHTS, mixed_inputs
from tests.plugins.ops.sparse_attention.native_inputs import ATTENTION_WEIGHTS, attention_inputs

pytestmark = built
SIZES = [  # D, H, n_kv, d, capacity, B, S, lengths, count
    (41, 1, 1, 2, 1, 1, 1, (1,), 1),
    (64, 4, 2, 16, 21, 1, 2, (20,), 2),
    (96, 9, 3, 8, 33, 3, 17, (17, 18, 33), 3),
    (576, 9, 3, 64, 300, 2, 1, (257, 1), 9),
]
KV = ("w_kv", "b_kv", "s_kv", "c_kv", "cs_kv")


def kv_weights(size: tuple, biases: bool) -> dict[str, np.ndarray | None]:
    rng = np.random.default_rng(5)
    rows = 2 * size[2] * size[3]
    weights = rng.standard_normal((rows, size[0])) / np.sqrt(size[0])
    bias = rng.standard_normal(rows).astype(np.float32) if biases else None
    return {"w_kv": weights.astype(np.float32), "b_kv": bias}


def caches(inputs, w_kv: np.ndarray) -> dict[str, np.ndarray]:
    """The caches with the keys and values of this step's tokens; x is normed."""
    x = inputs["x"].astype(np.float64)
    batch, seqlen, _ = x.shape
    products = x @ w_kv.T.astype(np.float64) + (0 if inputs["b_kv"] is None else inputs["b_kv"])
    kv_heads, d = inputs["key"].shape[1], inputs["key"].shape[3]
    products = products.reshape(batch, seqlen, 2, kv_heads, d)
    key, value = inputs["key"].copy(), inputs["value"].copy()
    for b in range(batch):
        for s in range(seqlen):
            place = inputs["lengths"][b] - seqlen + s
            for head in range(kv_heads):
                row = products[b, s, 0, head]
                key[b, head, place] = (
                    row if inputs["cos"] is None else rotate(row, inputs["cos"][b, s], inputs["sin"][b, s])
                )
            value[b, :, place] = products[b, s, 1]
    return {"key": key, "value": value}


def check(inputs, heads: int, weights: tuple[str, ...], w_kv: np.ndarray, atol: float = 2e-5, **attributes):
    """The result is that of the op without norm and w_kv, on normed hidden states and a cache with this step."""
    attributes |= {"n_heads": heads, "layer": 0}
    names = (*weights, *KV, "norm_weight", "norm_bias")
    found, chosen, *new = run_all("SparseAttention", inputs, names, 2, epsilon=EPSILON, **attributes)
    plain = without_norm(inputs) | dict.fromkeys(KV)
    wanted = caches(without_norm(inputs), w_kv)
    for one, other in zip(new, wanted.values(), strict=True):
        np.testing.assert_allclose(one, other, atol=atol * 4, rtol=1e-5)
    y, same = run_all("SparseAttention", plain | wanted, weights, 2, **attributes)
    np.testing.assert_array_equal(chosen, same)
    np.testing.assert_allclose(found, inputs["x"] + y, atol=atol * np.abs(y).max(initial=1), rtol=1e-5)


@pytest.mark.parametrize("form", ["llama", "llama-biases", "opt"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_float_weights(size, form, isa):
    kv = kv_weights(size, biases=form != "llama")
    inputs = attention_inputs(form, size) | norm_inputs(size[0], form == "opt") | kv
    check(inputs, size[1], ATTENTION_WEIGHTS, kv["w_kv"])


@pytest.mark.parametrize("dtype", STORED)
def test_16_bit_weights(dtype, isa):
    kv = kv_weights(SIZES[2], biases=True)
    rounded = {name: value.astype(STORED[dtype]) for name, value in kv.items()}
    inputs = attention_inputs("llama", SIZES[2]) | norm_inputs(96, False) | rounded
    wide = rounded["b_kv"].astype(np.float32)
    plain = {name: value if value is None or name != "b_kv" else wide for name, value in inputs.items()}
    found = run_all("SparseAttention", inputs, (*KV, "norm_weight"), epsilon=EPSILON, n_heads=9, layer=0)
    wanted = caches(without_norm(plain), rounded["w_kv"].astype(np.float32))
    for one, other in zip(found[2:], wanted.values(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("q", QUANTISATIONS, ids=str)
def test_integer_weights(q, isa):
    size = SIZES[1]
    inputs = integers(attention_inputs("llama", size) | kv_weights(size, biases=True), q)
    w_kv = restored({name: inputs[name] for name in ("w_kv", "s_kv")}, size[0])["w_kv"]
    blocks = inputs["s_kv"].shape[1]
    inputs["w_kv"] = inputs["w_kv"].reshape(len(w_kv), blocks, -1)  # as a product of ONNX Runtime has it
    loose = 2e-3 if isa == "avx512vnni" else 2e-5  # its products round the hidden states to 16 bits
    weights = (*ATTENTION_WEIGHTS, "s_q", "s_o")
    check(inputs | norm_inputs(size[0], False), size[1], weights, w_kv, loose)


@pytest.mark.parametrize("q", NESTED.values(), ids=NESTED)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_nested_integers(size, q, isa):
    kv = kv_weights(size, biases=True)
    copy, factors, residual = quantise_nested(kv["w_kv"], q)
    copy = copy.reshape(*factors.shape, -1)
    w_kv = full_rows(residual, None, copy, factors, size[0])
    inputs = mixed_inputs("llama", size, rest=1, groups=size[1], q=q)
    inputs |= norm_inputs(size[0], False) | {"w_kv": residual, "c_kv": copy, "cs_kv": factors, "b_kv": kv["b_kv"]}
    check(inputs, size[1], MIXED_WEIGHTS, w_kv, exact_copies=1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"w_kv": np.zeros((63, 64), np.float32)}, r"w_kv has shape \(63, 64\), not \(64, 64\)"),
        ({"b_kv": np.zeros(63, np.float32)}, r"b_kv has shape \(63\), not \(64\)"),
        ({"c_kv": np.zeros((64, 1, 32), np.uint8)}, "c_kv and cs_kv must be there if w_q and w_kv are residuals"),
        ({"norm_weight": None, "norm_bias": np.ones(64, np.float32)}, "norm_bias stands without norm_weight"),
    ],
)
def test_other_shapes_are_refused(changes, words):
    inputs = attention_inputs("llama", SIZES[1]) | norm_inputs(64, False) | kv_weights(SIZES[1], True)
    with pytest.raises(REFUSED, match=words):
        run_all("SparseAttention", inputs | changes, n_heads=4, layer=0)


def test_keys_without_an_output_for_them_are_refused():
    inputs = attention_inputs("llama", SIZES[1]) | kv_weights(SIZES[1], True)
    with pytest.raises(REFUSED, match="w_kv stands without the outputs new_key and new_value"):
        run("SparseAttention", inputs, n_heads=4, layer=0)
