"""Compares the function body on ONNX Runtime with the NumPy reference, at awkward sizes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shadowllm.bundle.quantisation import LOW_BIT_COPY, NESTED, Quantisation, quantise, quantise_nested
from shadowllm.plugins.function_body import FunctionForm
from shadowllm.plugins.ops.sparse_attention.reference import sparse_attention
from shadowllm.plugins.ops.sparse_attention.schema import SPARSE_ATTENTION
from tests.plugins.function_model import FORM, TOLERANCE, padded, run, run_all


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
    expected = sparse_attention(
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
    )[0]
    found = run(SPARSE_ATTENTION, form, feeds, n_heads=heads, layer=0)
    np.testing.assert_allclose(found, expected, **TOLERANCE)


@pytest.mark.parametrize("window", [0, 1, 3, 9, 40])
@pytest.mark.parametrize("seqlen", [1, 3])
def test_a_window(seqlen, window):
    rng = np.random.default_rng(window)
    angles, cache = rng.standard_normal((2, seqlen, 4)), rng.standard_normal((2, 2, 2, 9, 8)).astype(np.float32)
    feeds = {
        "x": rng.standard_normal((2, seqlen, 41)).astype(np.float32),
        "key": cache[0],
        "value": cache[1],
        "lengths": np.array([3, 9], np.int32),
        "indices": padded(np.array([1, 2, 5]), 6),
        "count": np.array(3, np.int32),
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
        **{f"w_{part}": 0.3 * rng.standard_normal((48, 41)).astype(np.float32) for part in ("q", "o")},
    }
    found = run(SPARSE_ATTENTION, replace(FORM, windows=True), feeds, n_heads=6, layer=0, window=window)
    expected = sparse_attention(**feeds, b_q=None, b_o=None, n_heads=6, window=window)[0]
    np.testing.assert_allclose(found, expected, **TOLERANCE)


@pytest.mark.parametrize("q", [Quantisation(8), Quantisation(4), Quantisation(4, 16)], ids=str)
@pytest.mark.parametrize("seed", [0, 1, 41])
def test_integer_weights(q, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 3, 64)).astype(np.float32)
    angles, cache = rng.standard_normal((2, 3, 4)), rng.standard_normal((2, 2, 2, 9, 8)).astype(np.float32)
    feeds = {
        "x": x,
        "key": cache[0],
        "value": cache[1],
        "lengths": np.array([3, 9], np.int32),
        "indices": padded(np.array([1, 2, 5]), 6),  # the standard Attention needs at least one head
        "count": np.array(3, np.int32),
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
    }
    for part in ("q", "o"):
        feeds[f"w_{part}"], feeds[f"s_{part}"] = quantise(0.3 * rng.standard_normal((48, 64)).astype(np.float32), q)
    found = run(SPARSE_ATTENTION, replace(FORM, quantisation=q), feeds, n_heads=6, layer=0)
    expected = sparse_attention(**feeds, b_q=None, b_o=None, n_heads=6)[0]
    np.testing.assert_allclose(found, expected, **TOLERANCE)


@pytest.mark.parametrize("rest", [0, 1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("hidden", [41, 72])
@pytest.mark.parametrize(("groups", "count"), [(0, 3), (6, 0), (6, 5), (2, 3), (2, 6)])
def test_low_bit_copy(groups, count, rest, bias, hidden):
    """Without groups, the indices are given."""
    rng = np.random.default_rng(hidden)

    def random(*shape):
        return 0.5 * rng.standard_normal(shape).astype(np.float32)

    form = replace(FORM, qkv_bias=bias, o_bias=bias, rest=LOW_BIT_COPY, head_groups=groups)
    angles = random(2, 3, 4)
    feeds = {"x": random(2, 3, hidden), "key": random(2, 2, 9, 8), "value": random(2, 2, 9, 8)}
    feeds |= {"lengths": np.array([3, 9], np.int32), "cos": np.cos(angles), "sin": np.sin(angles)}
    feeds |= {"count": np.array(count, np.int32), "rest": np.array(rest, np.int32)}
    if groups:
        feeds |= {"score_weight": random(groups, hidden), "score_bias": random(groups)}
    else:
        feeds["indices"] = padded(rng.choice(6, count, replace=False), 6)
    for part in ("q", "o"):
        weight = feeds[f"w_{part}"] = random(48, hidden)
        blocks = LOW_BIT_COPY.blocks(hidden)
        data, feeds[f"cs_{part}"] = quantise(np.pad(weight, ((0, 0), (0, blocks * 64 - hidden))), LOW_BIT_COPY)
        feeds[f"c_{part}"] = data.reshape(48, blocks, 32)
        if bias:
            feeds[f"b_{part}"] = random(48 if part == "q" else hidden)
    expected = sparse_attention(**(dict.fromkeys(("indices", "b_q", "b_o")) | feeds), n_heads=6)
    outputs = run_all(SPARSE_ATTENTION, form, feeds, 2 if groups else 1, n_heads=6, layer=0)
    for found, wanted in zip(outputs, expected, strict=False):
        np.testing.assert_allclose(found, wanted, **TOLERANCE)


@pytest.mark.parametrize("q", NESTED.values(), ids=NESTED)
@pytest.mark.parametrize("rest", [0, 1])
@pytest.mark.parametrize(("hidden", "count"), [(41, 0), (72, 5), (64, 6)])
def test_nested_weights(q, rest, hidden, count):
    rng = np.random.default_rng(hidden)

    def random(*shape):
        return 0.5 * rng.standard_normal(shape).astype(np.float32)

    form, angles = replace(FORM, quantisation=q, rest=LOW_BIT_COPY, head_groups=6), random(2, 3, 4)
    feeds = {"x": random(2, 3, hidden), "key": random(2, 2, 9, 8), "value": random(2, 2, 9, 8)}
    feeds |= {"lengths": np.array([3, 9], np.int32), "cos": np.cos(angles), "sin": np.sin(angles)}
    feeds |= {"count": np.array(count, np.int32), "rest": np.array(rest, np.int32)}
    feeds |= {"score_weight": random(6, hidden), "score_bias": random(6)}
    for part in ("q", "o"):
        data, scales, feeds[f"w_{part}"] = quantise_nested(random(48, hidden), q)
        feeds |= {f"c_{part}": data.reshape(*scales.shape, -1), f"cs_{part}": scales}
    expected = sparse_attention(**dict.fromkeys(("indices", "b_q", "b_o")), **feeds, n_heads=6)
    for found, wanted in zip(run_all(SPARSE_ATTENTION, form, feeds, n_heads=6, layer=0), expected, strict=True):
        np.testing.assert_allclose(found, wanted, **TOLERANCE)
