"""Compares the native op with its linear layers, run one by one, and with the NumPy reference; see `native_model`."""

from __future__ import annotations

import numpy as np
import pytest

from shadowllm.models.activations import NAMES
from shadowllm.plugins.ops.dense_mlp.reference import dense_mlp
from tests.plugins.native_model import REFUSED, STATES, built, run, zeros
from tests.plugins.ops.dense_mlp.native_inputs import WEIGHTS, dense_mlp_inputs, mlp_in_parts

pytestmark = built

SIZES = [(1, 1, 1), (1, 576, 1536), (2, 100, 7), (5, 64, 1030), (17, 200, 33), (9, 33, 2049)]  # T, D, F


def assert_close(found, wanted, tolerance=1e-4):
    assert found.shape == wanted.shape
    assert np.linalg.norm(found - wanted) <= tolerance * np.linalg.norm(wanted)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_mlp_equals_its_linear_layers(size, gated, bias, isa):
    inputs, attributes = dense_mlp_inputs(size, gated, bias), {"activation": "silu", "gated": int(gated)}
    found = run("DenseMLP", inputs, WEIGHTS, threads=2, exact_copies=1, **attributes)
    assert_close(found, mlp_in_parts(inputs, exact_copies=1, **attributes))


@pytest.mark.parametrize("activation", sorted(set(NAMES.values())))
@pytest.mark.parametrize("gated", [True, False])
def test_reference(activation, gated, isa):
    """Both round the inputs of the linear layers to 8 bits, but the kernels do not if there is no integer product."""
    inputs = dense_mlp_inputs(SIZES[3], gated)
    attributes = {"activation": activation, "gated": int(gated), "threshold": 0.1}
    found = run("DenseMLP", inputs, WEIGHTS, threads=2, **attributes)
    assert_close(found, dense_mlp(**{"down_x": None} | inputs, **attributes), 0.02)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_row_has_the_same_bits_alone(size, isa):
    inputs, attributes = dense_mlp_inputs(size), {"activation": "gelu_tanh", "gated": 1}
    together = run("DenseMLP", inputs, WEIGHTS, threads=2, **attributes)
    for t in range(size[0]):
        alone = run("DenseMLP", inputs | {"x": inputs["x"][t : t + 1]}, WEIGHTS, **attributes)
        np.testing.assert_array_equal(together[t : t + 1], alone)


def test_nothing_to_compute():
    assert run("DenseMLP", dense_mlp_inputs((0, 64, 5)), activation="silu", gated=1).shape == (0, 64)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": zeros(2, 3, 100)}, "DenseMLP: x has 3 dimensions, not 2"),
        ({"x": zeros(2, 99)}, "DenseMLP: down_copy must have 99 rows, as many as x has columns"),
        ({"up_copy": np.zeros((13, 2, 32), np.uint8)}, "up_copy has 13 rows, which are not two for each neuron"),
        ({"up_copy": np.zeros((14, 3, 32), np.uint8)}, r"Linear: copy has shape \(14, 3, 32\), not \(14, 2, 32\)"),
        ({"down_w": np.zeros((100, 2, 64), np.uint8)}, "NestedLinear: w has 12800 bytes, not 4 or 2 bits"),
        ({"down_scales": zeros(100, 2)}, r"scales has shape \(100, 2\), not \(100, 1\)"),
        ({"up_bias": zeros(7)}, r"bias has shape \(7\), not \(14\)"),
    ],
    ids=str,
)
def test_refuses(changes, words):
    with pytest.raises(REFUSED, match=words):
        run("DenseMLP", dense_mlp_inputs(SIZES[2]) | changes, activation="silu", gated=1)


def test_an_unknown_activation_is_refused():
    with pytest.raises(STATES.RuntimeException, match="DenseMLP: activation 'swish' is not supported"):
        run("DenseMLP", dense_mlp_inputs(SIZES[2]), activation="swish", gated=1)
