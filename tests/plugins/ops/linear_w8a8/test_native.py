"""Compares the native op with float64 arithmetic on the same integers; see `native_model`."""

from __future__ import annotations

import numpy as np
import pytest

from shadowllm.plugins.ops.linear_w8a8.reference import linear_w8a8
from tests.plugins.native_model import REFUSED, assert_as_exact_as, built, run, zeros
from tests.plugins.ops.linear_w8a8.native_inputs import linear_inputs

pytestmark = built

SIZES = [  # T, K, N, block
    (1, 1, 1, 64),
    (1, 576, 40, 64),
    (2, 100, 7, 64),
    (4, 64, 3, 64),
    (8, 576, 33, 64),
    (5, 130, 33, 32),
    (17, 200, 9, 96),
    (33, 640, 17, 64),
    (3, 1088, 9, 64),  # one block more than a vector of scales has
]
WEIGHTS = ("w", "scales", "bias")


def exactly(inputs, dtype=np.float64):
    """The product without rounding of x."""
    width = inputs["x"].shape[1]
    weights = (inputs["w"].astype(dtype) - 128) * inputs["scales"].astype(dtype)[..., None]
    y = inputs["x"].astype(dtype) @ weights.reshape(len(weights), -1)[:, :width].T
    return y if inputs["bias"] is None else y + inputs["bias"]


def wanted(inputs, isa, dtype=np.float64):
    if isa == "portable" or inputs["w"].shape[2] != 64:
        return exactly(inputs, dtype)
    return linear_w8a8(
        **{k: v.astype(dtype) if k in ("scales", "bias") and v is not None else v for k, v in inputs.items()}
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(size, bias, isa):
    inputs = linear_inputs(size, bias)
    found = run("LinearW8A8", inputs, WEIGHTS, threads=2)
    assert_as_exact_as(found, wanted(inputs, isa, np.float32), wanted(inputs, isa))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_without_rounding(size, isa):
    inputs = linear_inputs(size)
    found = run("LinearW8A8", inputs, WEIGHTS, exact_copies=1)
    step = 2 / 32639 if isa == "avx512vnni" else 0
    assert_as_exact_as(found, exactly(inputs, np.float32), exactly(inputs), step)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_scales_with_more_digits_are_used_as_they_are(size, isa):
    """Those of earlier bundles. The kernels for them do not round x to 8 bits."""
    inputs = linear_inputs(size)
    inputs["scales"] = inputs["scales"] * np.float32(1.001)
    found = run("LinearW8A8", inputs, WEIGHTS)
    step = 2 / 32639 if isa == "avx512vnni" else 0
    assert_as_exact_as(found, exactly(inputs, np.float32), exactly(inputs), step)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_row_has_the_same_bits_alone(size, isa):
    inputs = linear_inputs(size)
    together = run("LinearW8A8", inputs, WEIGHTS, threads=2)
    for t in range(size[0]):
        alone = run("LinearW8A8", inputs | {"x": inputs["x"][t : t + 1]}, WEIGHTS)
        np.testing.assert_array_equal(together[t : t + 1], alone)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_integers_do_not_overflow(sign, isa):
    inputs = linear_inputs((3, 128, 4, 64), bias=False)
    inputs["w"][:] = 0  # -128
    inputs["w"][2:] = 255
    inputs["scales"][:] = 1
    inputs["x"][:] = sign
    np.testing.assert_allclose(run("LinearW8A8", inputs), exactly(inputs), rtol=1e-6)


def test_a_nan_stays_in_its_row(isa):
    inputs = linear_inputs((4, 100, 5, 64))
    inputs["x"][2, 70] = np.nan
    found = run("LinearW8A8", inputs)
    assert np.isnan(found[2]).all()
    assert np.isfinite(found[[0, 1, 3]]).all()


def test_nothing_to_compute():
    assert run("LinearW8A8", linear_inputs((0, 64, 5, 64))).shape == (0, 5)
    assert run("LinearW8A8", linear_inputs((3, 64, 0, 64))).shape == (3, 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": zeros(2, 3, 100)}, "LinearW8A8: x has 3 dimensions, not 2"),
        ({"x": zeros(2, 129)}, r"w has shape \(7, 2, 64\), not \(7, 3, 64\)"),
        ({"w": np.zeros((7, 128), np.uint8)}, r"w has shape \(7, 128\), not \(rows, blocks, bytes\)"),
        ({"w": np.zeros((7, 2, 48), np.uint8)}, "bytes of a multiple of 32"),
        ({"scales": zeros(7, 3)}, r"scales has shape \(7, 3\), not \(7, 2\)"),
        ({"bias": zeros(6)}, r"bias has shape \(6\), not \(7\)"),
    ],
)
def test_linear_refuses(changes, words):
    with pytest.raises(REFUSED, match=words):
        run("LinearW8A8", linear_inputs((2, 100, 7, 64)) | changes)
