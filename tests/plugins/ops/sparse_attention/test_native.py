"""Compares the native op with float64 arithmetic; see `native_model`."""

from __future__ import annotations

import numpy as np
import pytest

from shadowllm.plugins.ops.sparse_attention.reference import sparse_attention
from tests.plugins.native_model import (
    INPUT_STEP,
    QUANTISATIONS,
    STORED,
    assert_as_exact_as,
    built,
    integers,
    restored,
    run,
    stored,
)
from tests.plugins.ops.sparse_attention.native_inputs import (
    ATTENTION_FORMS,
    ATTENTION_WEIGHTS,
    attention_inputs,
    exact_attention,
)

pytestmark = built


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


@pytest.mark.parametrize(
    ("form", "size"),
    [("llama-biases", size) for size in ATTENTION_SIZES]
    + [(form, size) for form in ("llama", "opt") for size in ATTENTION_SIZES[2:5:2]],
    ids=str,
)
def test_attention(form, size, isa):
    inputs = attention_inputs(form, size)
    exact, float32 = exact_attention(inputs, size[1]), sparse_attention(**inputs, n_heads=size[1])[0]
    for batch, length in enumerate(size[7]):  # cache entries after the end of the sequence must not be read
        inputs["key"][batch, :, length:] = inputs["value"][batch, :, length:] = np.nan
    found = run("SparseAttention", inputs, ATTENTION_WEIGHTS, threads=2, n_heads=size[1], layer=3)
    assert_as_exact_as(found, float32, exact)


@pytest.mark.parametrize("window", [1, 4, 31, 100])
@pytest.mark.parametrize("size", [ATTENTION_SIZES[2], ATTENTION_SIZES[3], ATTENTION_SIZES[5]], ids=str)
def test_attention_with_a_window(size, window, isa):
    inputs = attention_inputs("llama-biases", size)
    exact = exact_attention(inputs, size[1], window)
    float32 = sparse_attention(**inputs, n_heads=size[1], window=window)[0]
    for batch, length in enumerate(size[7]):  # what no query sees must not be read
        first = max(0, length - size[6] + 1 - window)
        for name in ("key", "value"):
            inputs[name][batch, :, :first] = inputs[name][batch, :, length:] = np.nan
    found = run("SparseAttention", inputs, ATTENTION_WEIGHTS, threads=2, n_heads=size[1], layer=3, window=window)
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
    assert_as_exact_as(found, sparse_attention(**inputs, n_heads=size[1])[0], exact_attention(inputs, size[1]))


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
    exact, float32 = exact_attention(floats, size[1]), sparse_attention(**floats, n_heads=size[1])[0]
    weights = (*ATTENTION_WEIGHTS, "s_q", "s_o")
    found = run("SparseAttention", inputs, weights, threads=2, n_heads=size[1], layer=3)
    assert_as_exact_as(found, float32, exact, INPUT_STEP.get(isa, 0))


def test_scores_without_a_finite_one_are_not_hidden(isa):
    inputs = attention_inputs("opt", (41, 3, 3, 6, 9, 1, 1, (9,), 3))
    inputs["x"][:], inputs["b_q"][:], inputs["key"][..., 0] = 0, 1, -np.inf
    found = run("SparseAttention", inputs, ATTENTION_WEIGHTS, n_heads=3, layer=0)
    assert np.isnan(found).all()
