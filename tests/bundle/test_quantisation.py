"""Integer weights: the rounding error, and that ONNX Runtime reads the same numbers."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from shadowllm.bundle.quantisation import (
    LOW_BIT_COPY,
    NESTED,
    ROUNDED,
    Quantisation,
    bundle_format,
    dense_rows,
    dequantise,
    dequantise_nested,
    nested_format,
    quantise,
    quantise_nested,
    residual_of,
    rounded,
    rounded_copy,
    unpacked,
)
from shadowllm.errors import UserError

QUANTISATIONS = [Quantisation(8), Quantisation(4), Quantisation(4, 16), Quantisation(8, 64)]
SIZES = [(1, 32), (7, 64), (41, 96), (5, 40)]  # the last is padded to whole blocks


def matrix(rows, width, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


@pytest.mark.parametrize("q", QUANTISATIONS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_no_element_moves_further_than_a_step(size, q):
    wide = matrix(*size)
    data, scales = quantise(wide, q)
    assert data.shape == (size[0], q.bytes(size[1]))
    assert scales.shape == (size[0], q.blocks(size[1]))
    steps = np.repeat(np.abs(scales), q.block, axis=1)[:, : size[1]]
    errors = np.abs(dequantise(data, scales, size[1], q) - wide)
    # The end of the range on the other side lies half a step short of the farthest element's mirror image.
    assert (errors <= steps * 1.0001).all()
    assert (errors <= steps * 0.5001).mean() > 0.97


@pytest.mark.parametrize("q", QUANTISATIONS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rounded_is_what_packing_and_unpacking_leaves(size, q):
    wide = matrix(*size)
    np.testing.assert_array_equal(rounded(wide, q), dequantise(*quantise(wide, q), size[1], q))


@pytest.mark.parametrize("size", [(1, 64), (7, 128), (41, 100)], ids=str)
def test_a_residual_completes_a_copy_that_was_made_alone(size):
    wide = matrix(*size)
    wide[0] = 0
    copy, scales = quantise(wide, LOW_BIT_COPY)
    residual = residual_of(wide, copy, scales, ROUNDED)
    assert residual.shape == (size[0], ROUNDED.residual.bytes(size[1]))
    steps = np.repeat(np.abs(scales), LOW_BIT_COPY.block, axis=1)[:, : size[1]] * ROUNDED.residual_step
    errors = np.abs(dequantise_nested(copy, scales, residual, size[1], ROUNDED) - wide)
    # The copy's range ends early above zero. There the residual brings an element only half a step of the copy nearer.
    near = errors <= steps * 0.51
    assert near.mean() > 0.9
    assert (errors[~near] <= (8 + 0.51) * steps[~near]).all()


def test_a_residual_of_nested_integers_is_their_own():
    wide = matrix(9, 128)
    copy, scales, residual = quantise_nested(wide, ROUNDED)
    assert (residual_of(wide, copy, scales, ROUNDED) == residual).mean() > 0.99


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_few_bits_are_few_values(bits):
    found = rounded(matrix(3, 64), Quantisation(bits, 64))
    assert all(len(np.unique(row)) <= 2**bits for row in found)


def test_the_farthest_element_of_a_block_is_as_exact_as_a_scale():
    wide = matrix(3, 64)
    data, scales = quantise(wide, Quantisation(4))
    found = dequantise(data, scales, 64, Quantisation(4)).reshape(3, 2, 32)
    farthest = np.abs(wide.reshape(3, 2, 32)).argmax(axis=2)[..., None]
    np.testing.assert_allclose(
        np.take_along_axis(found, farthest, 2), np.take_along_axis(wide.reshape(3, 2, 32), farthest, 2), rtol=2**-8
    )


@pytest.mark.parametrize("q", [*QUANTISATIONS, *NESTED.values()], ids=str)
@pytest.mark.parametrize("factor", [1e-30, 1, 1e30])
def test_scales_are_bfloat16_numbers_and_rounding_again_changes_nothing(q, factor):
    wide = matrix(40, 200) * np.float32(factor)
    once = rounded(wide, q)
    np.testing.assert_array_equal(rounded(once, q), once)
    scales = quantise_nested(wide, q)[1] if q.residual_bits else quantise(wide, q)[1]
    assert not (scales.view(np.uint32) & 0xFFFF).any()


def test_zeros_stay_zeros():
    for q in QUANTISATIONS:
        data, scales = quantise(np.zeros((2, 64), dtype=np.float32), q)
        assert not dequantise(data, scales, 64, q).any()
        assert np.isfinite(scales).all()


def test_large_matrices_are_quantised_in_parts(monkeypatch):
    wide = matrix(50, 64)
    whole = quantise(wide, Quantisation(4))
    monkeypatch.setattr("shadowllm.bundle.quantisation.CHUNK", 200)
    for found, expected in zip(quantise(wide, Quantisation(4)), whole, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("q", QUANTISATIONS[:3], ids=str)
def test_the_ops_infer_bits_and_block_from_shapes(q):
    data, scales = quantise(matrix(9, 64), q)
    np.testing.assert_array_equal(dense_rows(data, scales, 64), dequantise(data, scales, 64, q))


def run(node, feeds, initializers, out_type=TensorProto.FLOAT):
    inputs = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in feeds.items()
    ]
    constants = [
        helper.make_tensor(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape, a.tobytes(), raw=True)
        for n, a in initializers.items()
    ]
    output = helper.make_tensor_value_info("y", out_type, None)
    graph = helper.make_graph([node], "one", inputs, [output], constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, ir_version=10, opset_imports=opsets)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)[0]


@pytest.mark.parametrize("q", QUANTISATIONS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_onnx_runtime_multiplies_by_the_same_numbers(size, q):
    (rows, width), x = size, matrix(3, size[1], seed=1)
    data, scales = quantise(matrix(rows, width), q)
    attributes = {"K": width, "N": rows, "bits": q.bits, "block_size": q.block, "accuracy_level": 1}
    node = helper.make_node("MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft", **attributes)
    blocks = data.reshape(rows, q.blocks(width), -1)
    found = run(node, {"x": x}, {"b": blocks, "s": scales})
    exact = x.astype(np.float64) @ dequantise(data, scales, width, q).T
    assert np.abs(found - exact).max() < 1e-5 * np.abs(exact).max()


@pytest.mark.parametrize("q", QUANTISATIONS[:2], ids=str)
def test_onnx_runtime_gathers_the_same_numbers(q):
    data, scales = quantise(matrix(41, 64), q)
    attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": q.block, "bits": q.bits}
    node = helper.make_node("GatherBlockQuantized", ["d", "i", "s"], ["y"], domain="com.microsoft", **attributes)
    ids = np.array([40, 0, 7, 7])
    found = run(node, {"i": ids}, {"d": data, "s": scales})
    np.testing.assert_array_equal(found, dequantise(data, scales, 64, q)[ids])


@pytest.mark.parametrize("q", NESTED.values(), ids=NESTED)
@pytest.mark.parametrize("size", SIZES, ids=str)
class TestNested:
    def test_the_parts_are_the_copy_and_what_it_lacks(self, q, size):
        wide = matrix(*size)
        copy, scales, residual = quantise_nested(wide, q)
        high, low = unpacked(copy, 4).astype(int) - 8, unpacked(residual, q.residual_bits).astype(int)
        step, half = 2**q.residual_bits, 2 ** (q.residual_bits - 1)
        whole = step * high + low - half
        assert high.min() >= -8
        assert high.max() <= 7
        np.testing.assert_array_equal(high, (whole + half) // step)
        assert whole.min() >= -8 * step
        assert whole.max() <= 7 * step + half - 1
        values = whole[:, : size[1]] * (scales / step).repeat(64, axis=1)[:, : size[1]]
        np.testing.assert_allclose(values, rounded(wide, q), rtol=1e-6)
        # Nothing is clipped: every error is that of rounding, or half a step more for the farthest element of a block.
        assert (np.abs(values - wide) <= np.abs(scales / step).repeat(64, axis=1)[:, : size[1]] * 1.0001).all()

    def test_the_copy_is_as_good_as_one_beside_floats(self, q, size):
        """At 4 + 4 bits. At 4 + 2, the copy is rounded from 6 bits, whose ties all go up."""
        wide = matrix(*size)
        mean = [np.square(found - wide).mean() for found in (rounded_copy(wide, q), rounded(wide, LOW_BIT_COPY))]
        assert mean[0] <= (1.1 if q.residual_bits == 4 else 1.35) * mean[1]

    def test_rounding_again_changes_no_integer(self, q, size):
        copy, scales, residual = quantise_nested(matrix(*size), q)
        again = quantise_nested(dequantise_nested(copy, scales, residual, size[1], q), q)
        np.testing.assert_array_equal(again[0], copy)
        np.testing.assert_array_equal(again[2], residual)
        np.testing.assert_allclose(again[1], scales, rtol=1e-6)

    def test_packing_and_unpacking(self, q, size):
        wide = matrix(*size)
        copy, scales, residual = quantise_nested(wide, q)
        whole = dequantise_nested(copy, scales, residual, size[1], q)
        np.testing.assert_allclose(whole, rounded(wide, q), atol=1e-6)
        np.testing.assert_array_equal(dequantise(copy, scales, size[1], q.copy), rounded_copy(wide, q))
        assert nested_format(copy.reshape(*scales.shape, -1), residual) == q


@pytest.mark.parametrize(
    ("weight_dtype", "rest", "words"),
    [
        ("int6", "drop", "int6 weights contain a low-bit copy.* use --weight-dtype int8, or --rest shadow"),
        ("int4", "shadow", "as many bits as they have.* --rest drop"),
        ("int3", "shadow", "'int3' is not supported"),
        ("int3", "drop", "'int3' is not supported"),
    ],
)
def test_types_that_no_bundle_has(weight_dtype, rest, words):
    with pytest.raises(UserError, match=words):
        bundle_format(weight_dtype, rest)
