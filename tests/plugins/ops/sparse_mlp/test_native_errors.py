"""Errors of the native op for wrong inputs: their messages, and no crash."""

from __future__ import annotations

import numpy as np
import pytest

from shadowllm.bundle.quantisation import Quantisation
from tests.plugins.native_model import REFUSED, built, integers, ints, make_session, run, scalar, zeros
from tests.plugins.ops.sparse_mlp.native_inputs import MLP_WEIGHTS, mlp_inputs

pytestmark = built


def mlp(**changes):
    inputs = mlp_inputs("llama-biases", (41, 7, 1, 2, 3)) | changes
    return run("SparseMLP", inputs, MLP_WEIGHTS, activation="silu", layer=11)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"indices": ints(0, 2, 7)}, r"SparseMLP layer 11: index 7 is outside 0\.\.6"),
        ({"indices": ints(0, -1, 5)}, r"SparseMLP layer 11: index -1 is outside 0\.\.6"),
        ({"indices": ints(0, 1, -(2**31))}, r"SparseMLP layer 11: index -2147483648 is outside 0\.\.6"),
        ({"count": scalar(8)}, r"SparseMLP layer 11: count 8 is outside 0\.\.7"),
        ({"count": scalar(-1)}, r"SparseMLP layer 11: count -1 is outside 0\.\.7"),
        ({"count": ints(1, 2)}, "layer 11: count has 2 elements"),
        ({"indices": ints(0, 1, 2).reshape(1, 3)}, "layer 11: indices has 2 dimensions"),
        ({"x": zeros(1, 2, 40)}, r"layer 11: b_down has shape \(41\), not \(40\)"),
        ({"x": zeros(41)}, "layer 11: x has 1 dimensions, not 2 or 3"),
        ({"x": zeros(1, 2, 40), "b_down": None}, r"layer 11: w_up has shape \(7, 41\), not \(7, 40\)"),
        ({"w_down": zeros(41, 7)}, r"w_down has shape \(41, 7\), not \(7, 41\)"),
        ({"b_up": zeros(41)}, r"b_up has shape \(41\), not \(7\)"),
        ({"b_down": zeros(7)}, r"b_down has shape \(7\), not \(41\)"),
        ({"w_gate": None}, "b_gate stands without w_gate"),
        ({"w_up": ints(*range(287)).reshape(7, 41)}, "w_up is of none of the types"),
    ],
)
def test_mlp_refuses(changes, words):
    with pytest.raises(REFUSED, match=words):
        mlp(**changes)


def test_mlp_refuses_integers_without_columns():
    none = {f"w_{part}": np.zeros((7, 0), np.uint8) for part in ("gate", "up", "down")}
    inputs = mlp_inputs("llama", (64, 7, 1, 1, 3)) | none | {"x": zeros(1, 1, 0)}
    inputs |= {f"s_{part}": zeros(7, 1) for part in ("gate", "up", "down")}
    with pytest.raises(REFUSED, match=r"s_up must have shape \(7, blocks\), with 0 elements"):
        run("SparseMLP", inputs, activation="silu", layer=11)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"s_up": None}, r"s_up must have shape \(7, blocks\)"),
        ({"s_up": zeros(7, 3)}, r"s_up must have shape \(7, blocks\)"),
        ({"s_up": zeros(7, 4)}, "blocks of a multiple of 32"),
        ({"s_up": zeros(7, 0)}, r"s_up must have shape \(7, blocks\)"),
        ({"s_up": zeros(7)}, r"s_up must have shape \(7, blocks\)"),
        ({"s_down": zeros(6, 2)}, r"s_down has shape \(6, 2\), not \(7, 2\)"),
        ({"w_up": np.zeros((7, 16), np.uint8)}, r"w_up has shape \(7, 16\), not \(7, 64\)"),
        ({"w_gate": zeros(7, 64)}, "s_gate stands without integer weights"),
        ({"b_up": np.zeros(7, np.uint8)}, "b_up is of none of the types"),
    ],
)
def test_mlp_refuses_integer_weights(changes, words):
    inputs = integers(mlp_inputs("llama-biases", (64, 7, 1, 2, 3)), Quantisation(4)) | changes
    with pytest.raises(REFUSED, match=words):
        run("SparseMLP", inputs, MLP_WEIGHTS, activation="silu", layer=11)


def test_indices_behind_the_count_are_never_read():
    inputs = mlp_inputs("llama", (41, 7, 1, 2, 3))
    inputs["indices"][3:] = 10**9
    spoilt = run("SparseMLP", inputs, MLP_WEIGHTS, activation="silu", layer=0)
    np.testing.assert_array_equal(
        spoilt, run("SparseMLP", mlp_inputs("llama", (41, 7, 1, 2, 3)), MLP_WEIGHTS, activation="silu", layer=0)
    )


def test_a_session_survives_an_error():
    inputs = mlp_inputs("llama", (41, 7, 1, 2, 3))
    session = make_session("SparseMLP", inputs, MLP_WEIGHTS, activation="silu", layer=0)
    feeds = {i.name: inputs[i.name] for i in session.get_inputs()}
    good = session.run(None, feeds)[0]
    with pytest.raises(REFUSED, match="index 99"):
        session.run(None, feeds | {"indices": np.full(7, 99, np.int32)})
    np.testing.assert_array_equal(session.run(None, feeds)[0], good)


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"activation": "swish", "layer": 0}, "activation 'swish' is not supported"),
        ({"layer": 0}, "activation"),
        ({"activation": "silu"}, "layer"),
    ],
)
def test_attributes_refused(attributes, words):
    with pytest.raises(Exception, match=words):
        make_session("SparseMLP", mlp_inputs("llama", (41, 7, 1, 1, 7)), MLP_WEIGHTS, **attributes)
