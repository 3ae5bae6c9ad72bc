"""Compares the native op with float64 arithmetic; see `native_model`."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from shadowllm.bundle.quantisation import Quantisation
from shadowllm.models.activations import Activation
from shadowllm.plugins.ops.sparse_mlp.reference import sparse_mlp
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
from tests.plugins.ops.sparse_mlp.native_inputs import MLP_FORMS, MLP_SCALES, MLP_WEIGHTS, exact_mlp, mlp_inputs

pytestmark = built


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


@pytest.mark.parametrize(
    ("form", "size"),
    [("llama-biases", size) for size in MLP_SIZES]
    + [(form, size) for form in MLP_FORMS if form != "llama-biases" for size in MLP_SIZES[2:4]],
    ids=str,
)
def test_mlp(form, size, isa):
    activation = MLP_FORMS[form][0]
    inputs = mlp_inputs(form, size)
    found = run("SparseMLP", inputs, MLP_WEIGHTS, threads=2, activation=activation, layer=3)
    exact = exact_mlp(inputs, activation)
    float32 = exact if size[-1] == 0 else sparse_mlp(**inputs, activation=activation)[0]
    assert_as_exact_as(found, float32, exact)


@pytest.mark.parametrize("size", [(41, 7, 2, 3, 5), (123, 88, 1, 1, 45)], ids=str)
@pytest.mark.parametrize("form", ["llama-biases", "opt"])
@pytest.mark.parametrize("activation", get_args(Activation))
def test_activations(activation, form, size, isa):
    if activation == "drelu" and form == "opt":
        return  # a model without a gate has no such activation
    inputs, attributes = mlp_inputs(form, size), {"activation": activation, "threshold": 0.5}
    found = run("SparseMLP", inputs, MLP_WEIGHTS, layer=3, **attributes)
    assert_as_exact_as(found, sparse_mlp(**inputs, **attributes)[0], exact_mlp(inputs, **attributes))


def test_mlp_weights_that_are_no_initializers():
    inputs = mlp_inputs("llama-biases", (123, 88, 2, 3, 50))
    attributes = {"activation": "silu", "layer": 0}
    np.testing.assert_array_equal(
        run("SparseMLP", inputs, (), **attributes), run("SparseMLP", inputs, MLP_WEIGHTS, **attributes)
    )


def test_mlp_far_from_zero(isa):
    """Activations saturate without overflow, and NaN stays NaN."""
    inputs = mlp_inputs("llama", (64, 88, 1, 2, 88))
    inputs["x"] = inputs["x"] * np.float32(200)
    with np.errstate(over="ignore"):
        exact, float32 = exact_mlp(inputs, "silu"), sparse_mlp(**inputs, activation="silu")[0]
    assert_as_exact_as(run("SparseMLP", inputs, MLP_WEIGHTS, activation="silu", layer=0), float32, exact)
    inputs["x"][0, 1, 5] = np.nan
    for activation in get_args(Activation):
        found = run("SparseMLP", inputs, MLP_WEIGHTS, activation=activation, layer=0)
        assert np.isfinite(found[0, 0]).all()
        assert np.isnan(found[0, 1]).all()


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("size", [(41, 7, 2, 3, 5), (576, 1536, 1, 1, 501), (123, 88, 1, 1, 88)], ids=str)
def test_mlp_with_weights_of_two_bytes(size, dtype, isa):
    inputs = stored(mlp_inputs("llama-biases", size), MLP_WEIGHTS, dtype)
    found = run("SparseMLP", inputs, MLP_WEIGHTS, threads=2, activation="silu", layer=3)
    assert_as_exact_as(found, sparse_mlp(**inputs, activation="silu")[0], exact_mlp(inputs, "silu"))


INTEGER_SIZES = [
    (64, 7, 2, 3, 5),
    (576, 1536, 1, 1, 501),
    (192, 88, 1, 1, 88),
    (64, 88, 4, 17, 41),
    (128, 9, 1, 2, 0),
    (64, 88, 5, 13, 41),  # one token more than the tokens that share one read of the weights
    # One token: widths that end in the middle of a step, and last tiles of few rows.
    *((width, 88, 1, 1, count) for width, count in ((32, 87), (96, 85), (160, 81), (224, 86), (608, 65))),
]


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
    float32 = exact if size[-1] == 0 else sparse_mlp(**floats, activation=activation)[0]
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
    exact, float32 = exact_mlp(floats, "silu"), sparse_mlp(**floats, activation="silu")[0]
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
    """Initializers are packed when the kernel is created. Other inputs are read without a copy."""
    inputs = integers(mlp_inputs("llama", (576, 88, 1, 1, 45)), q)
    packed = run("SparseMLP", inputs, (*MLP_WEIGHTS, *MLP_SCALES), activation="silu", layer=0)
    for weights in ((), MLP_WEIGHTS, MLP_SCALES):
        np.testing.assert_array_equal(run("SparseMLP", inputs, weights, activation="silu", layer=0), packed)


def test_every_float16_is_widened_exactly(isa):
    """All finite values, with subnormals, as a bias of a result of zero."""
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
