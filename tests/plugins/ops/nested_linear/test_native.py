"""Compares the native op with float64 arithmetic on the same integers; see `native_model`."""

from __future__ import annotations

import numpy as np
import pytest

from shadowllm.plugins.ops.nested_linear.reference import nested_linear
from tests.plugins.native_model import REFUSED, assert_as_exact_as, built, run, zeros
from tests.plugins.ops.nested_linear.native_inputs import exactly, least, linear_inputs, parts_of, rounded

pytestmark = built

SIZES = [  # T, K, N, block
    (1, 1, 1, 64),
    (1, 576, 40, 64),
    (2, 100, 7, 64),
    (4, 64, 3, 64),
    (6, 128, 9, 64),
    (8, 576, 33, 64),
    (5, 130, 33, 32),
    (17, 200, 9, 96),
    (33, 640, 17, 64),
    (23, 1100, 130, 64),  # one strip of rows for each task
    (9, 8000, 140, 64),  # several strips
    (9, 33000, 3, 64),  # rows that are longer than a strip
    (3, 1088, 9, 64),  # one block more than a vector of scales has
]
BITS = pytest.mark.parametrize("bits", [4, 2])  # of a residual
WEIGHTS = ("w", "copy", "scales", "bias")


def wanted(inputs, isa, dtype=np.float64):
    floats = isa == "portable" or inputs["copy"].shape[2] != 32
    return exactly(inputs, dtype) if floats else rounded(inputs, dtype)


@BITS
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(size, bias, bits, isa):
    inputs = linear_inputs(size, bias, residual_bits=bits)
    found = run("NestedLinear", inputs, WEIGHTS, threads=2)
    assert_as_exact_as(found, wanted(inputs, isa, np.float32), wanted(inputs, isa))


@BITS
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_reference(size, bits):
    inputs = linear_inputs(size, residual_bits=bits)
    np.testing.assert_allclose(nested_linear(**inputs), exactly(inputs), rtol=1e-4, atol=1e-4)


@BITS
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_without_rounding(size, bits, isa):
    inputs = linear_inputs(size, residual_bits=bits)
    found = run("NestedLinear", inputs, WEIGHTS, exact_copies=1)
    assert_as_exact_as(found, exactly(inputs, np.float32), exactly(inputs))


@BITS
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_scales_with_more_digits_are_used_as_they_are(size, bits, isa):
    """Those of earlier bundles. The kernels for them do not round x."""
    inputs = linear_inputs(size, residual_bits=bits)
    inputs["scales"] = inputs["scales"] * np.float32(1.001)
    found = run("NestedLinear", inputs, WEIGHTS)
    assert_as_exact_as(found, exactly(inputs, np.float32), exactly(inputs))


@BITS
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_row_has_the_same_bits_alone(size, bits, isa):
    inputs = linear_inputs(size, residual_bits=bits)
    together = run("NestedLinear", inputs, WEIGHTS, threads=2)
    for t in range(size[0]):
        alone = run("NestedLinear", inputs | {"x": inputs["x"][t : t + 1]}, WEIGHTS)
        np.testing.assert_array_equal(together[t : t + 1], alone)


@BITS
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_integers_do_not_overflow(sign, bits, isa):
    inputs = linear_inputs((3, 128, 4, 64), bias=False, residual_bits=bits)
    integers = np.full((4, 128), least(bits))
    integers[2:] = (16 << bits) - 1
    copy, inputs["w"] = parts_of(integers, bits)
    inputs["copy"] = copy.reshape(inputs["copy"].shape)
    inputs["scales"][:] = 1
    inputs["x"][:] = sign
    np.testing.assert_allclose(run("NestedLinear", inputs, WEIGHTS), exactly(inputs), rtol=1e-6)


def test_a_nan_stays_in_its_row(isa):
    inputs = linear_inputs((4, 100, 5, 64))
    inputs["x"][2, 70] = np.nan
    found = run("NestedLinear", inputs, WEIGHTS)
    assert np.isnan(found[2]).all()
    assert np.isfinite(found[[0, 1, 3]]).all()


def test_residuals_may_have_blocks():
    inputs = linear_inputs((2, 100, 7, 64))
    blocks = inputs | {"w": inputs["w"].reshape(inputs["copy"].shape)}
    np.testing.assert_array_equal(run("NestedLinear", blocks, WEIGHTS), run("NestedLinear", inputs, WEIGHTS))


def test_nothing_to_compute():
    assert run("NestedLinear", linear_inputs((0, 64, 5, 64))).shape == (0, 5)
    assert run("NestedLinear", linear_inputs((3, 64, 0, 64))).shape == (3, 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": zeros(2, 3, 100)}, "NestedLinear: x has 3 dimensions, not 2"),
        ({"x": zeros(2, 129)}, r"copy has shape \(7, 2, 32\), not \(7, 3, 32\)"),
        ({"copy": np.zeros((7, 64), np.uint8)}, r"copy has shape \(7, 64\), not \(rows, blocks, bytes\)"),
        ({"copy": np.zeros((7, 2, 24), np.uint8)}, "bytes of a multiple of 16"),
        ({"w": np.zeros((7, 63), np.uint8)}, "w has 441 bytes, not 4 or 2 bits for each of 896 elements"),
        ({"scales": zeros(7, 3)}, r"scales has shape \(7, 3\), not \(7, 2\)"),
        ({"bias": zeros(6)}, r"bias has shape \(6\), not \(7\)"),
    ],
)
def test_linear_refuses(changes, words):
    with pytest.raises(REFUSED, match=words):
        run("NestedLinear", linear_inputs((2, 100, 7, 64)) | changes)
