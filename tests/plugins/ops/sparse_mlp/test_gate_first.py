"""``SparseMLP`` without indices and copy: the result of all neurons, from the rows of those that fired."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shadowllm.bundle.quantisation import Quantisation
from shadowllm.plugins.ops.sparse_mlp.reference import sparse_mlp
from shadowllm.plugins.ops.sparse_mlp.schema import SPARSE_MLP
from tests.plugins import function_model, native_model
from tests.plugins.native_model import INPUT_STEP, STORED, assert_as_exact_as, built, integers, restored, stored
from tests.plugins.ops.sparse_mlp.gate_first_inputs import CASES, SILENT, SIZES, gate_first_inputs
from tests.plugins.ops.sparse_mlp.native_inputs import MLP_SCALES, MLP_WEIGHTS, exact_mlp

WEIGHTS = (*MLP_WEIGHTS, *MLP_SCALES)


def native(inputs, activation, threshold, threads=2):
    return native_model.run_all(
        "SparseMLP", inputs, WEIGHTS, threads, activation=activation, threshold=threshold, layer=3
    )


def function(inputs, activation, threshold, q=None):
    form = replace(
        function_model.FORM,
        activation=activation,
        threshold=threshold,
        gated=inputs["w_gate"] is not None,
        mlp_bias=inputs["b_up"] is not None,
        quantisation=q,
        gate_first=True,
    )
    feeds = {name: value for name, value in inputs.items() if value is not None}
    return function_model.run_all(SPARSE_MLP, form, feeds, activation=activation, threshold=threshold, layer=3)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("activation", "threshold", "form"), CASES)
def test_the_reference_leaves_out_what_adds_nothing(activation, threshold, form, size):
    inputs = gate_first_inputs(form, size)
    found, chosen = sparse_mlp(**inputs, activation=activation, threshold=threshold)
    everything = np.arange(size[1], dtype=np.int32)
    dense, _ = sparse_mlp(
        **inputs | {"indices": everything, "count": size[1]}, activation=activation, threshold=threshold
    )
    np.testing.assert_allclose(found, dense, rtol=1e-5, atol=1e-5 * np.abs(dense).max())
    fired = chosen[chosen >= 0]
    assert (fired % SILENT != 0).all()
    assert (chosen[len(fired) :] == -1).all()
    assert (np.diff(fired) > 0).all()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("activation", "threshold", "form"), CASES)
def test_the_function_body(activation, threshold, form, size):
    inputs = gate_first_inputs(form, size)
    expected = sparse_mlp(**inputs, activation=activation, threshold=threshold)
    y, chosen = function(inputs, activation, threshold)
    np.testing.assert_allclose(y, expected[0], rtol=2e-5, atol=2e-5 * max(1, np.abs(expected[0]).max()))
    np.testing.assert_array_equal(chosen, expected[1])


@built
@pytest.mark.parametrize("size", [*SIZES, (576, 1536, 1, 1)], ids=str)
@pytest.mark.parametrize(("activation", "threshold", "form"), CASES)
def test_the_native_op(activation, threshold, form, size, isa):
    inputs = gate_first_inputs(form, size)
    expected = sparse_mlp(**inputs, activation=activation, threshold=threshold)
    y, chosen = native(inputs, activation, threshold)
    assert_as_exact_as(y, expected[0], exact_mlp(inputs, activation, threshold))
    np.testing.assert_array_equal(chosen, expected[1])


@built
@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize(("activation", "threshold", "form"), CASES)
def test_rows_of_two_bytes(activation, threshold, form, dtype, isa):
    inputs = stored(gate_first_inputs(form, (123, 88, 1, 1)), MLP_WEIGHTS, dtype)
    expected = sparse_mlp(**inputs, activation=activation, threshold=threshold)
    y, chosen = native(inputs, activation, threshold)
    assert_as_exact_as(y, expected[0], exact_mlp(inputs, activation, threshold))
    np.testing.assert_array_equal(chosen, expected[1])


@built
@pytest.mark.parametrize("q", [Quantisation(8), Quantisation(4)], ids=str)
@pytest.mark.parametrize("size", [(64, 88, 1, 1), (192, 87, 1, 1), (64, 88, 5, 13)], ids=str)
@pytest.mark.parametrize(("activation", "threshold", "form"), [CASES[1], CASES[6], CASES[7]])
def test_integer_rows(activation, threshold, form, size, q, isa):
    inputs = integers(gate_first_inputs(form, size), q)
    floats = restored(inputs, size[0])
    expected = sparse_mlp(**floats, activation=activation, threshold=threshold)
    y, chosen = native(inputs, activation, threshold)
    assert_as_exact_as(y, expected[0], exact_mlp(floats, activation, threshold), INPUT_STEP.get(isa, 0))
    np.testing.assert_array_equal(chosen, expected[1])
    y, chosen = function(inputs, activation, threshold, q)
    np.testing.assert_allclose(y, expected[0], atol=2e-5 * np.abs(expected[0]).max())
    np.testing.assert_array_equal(chosen, expected[1])


def poisoned(inputs):
    """The rows of up and down of silent neurons are no numbers, so a result that reads them is none."""
    found = dict(inputs)
    for name in ("w_up", "w_down") if inputs["w_gate"] is not None else ("w_down",):
        found[name] = inputs[name].copy()
        found[name][::SILENT] = np.nan
    return found


@pytest.mark.parametrize("form", ["llama-biases", "opt"])
@pytest.mark.parametrize("run", [pytest.param(native, marks=built), function])
def test_rows_of_silent_neurons_are_not_read(run, form):
    inputs = gate_first_inputs(form, (123, 88, 1, 1))
    for found, expected in zip(run(poisoned(inputs), "relu", 0.0), run(inputs, "relu", 0.0), strict=True):
        np.testing.assert_array_equal(found, expected)


@built
@pytest.mark.parametrize("first", ["gate", "up"])
def test_a_gate_that_is_no_number_is_not_hidden(first, isa):
    inputs = gate_first_inputs("llama" if first == "gate" else "opt", (123, 88, 1, 1))
    inputs[f"w_{first}"][5, 3] = np.nan
    for activation in ("relu", "relu2", "fatrelu"):
        y, chosen = native(inputs, activation, 0.0)
        assert np.isnan(y).all()
        assert 5 in chosen


@built
def test_no_neuron_fires(isa):
    inputs = gate_first_inputs("opt", (41, 7, 1, 2))
    inputs["b_up"][:] = -1e9
    y, chosen = native(inputs, "relu", 0.0)
    np.testing.assert_array_equal(y, np.broadcast_to(inputs["b_down"], y.shape))
    np.testing.assert_array_equal(chosen, np.full(7, -1))


@built
def test_the_result_does_not_depend_on_threads():
    inputs = gate_first_inputs("llama", (576, 1536, 1, 1))
    one, three = (native(inputs, "relu", 0.0, threads) for threads in (1, 3))
    np.testing.assert_array_equal(one[0], three[0])


@built
def test_activations_that_are_never_zero_are_refused():
    inputs = gate_first_inputs("llama", (41, 7, 1, 1))
    with pytest.raises(native_model.REFUSED, match="without indices, the neurons are chosen with a low-bit copy"):
        native(inputs, "silu", 0.0)
    with pytest.raises(ValueError, match="copy is absent"):
        sparse_mlp(**inputs, activation="silu")
