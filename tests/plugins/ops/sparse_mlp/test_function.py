"""Compares the function body on ONNX Runtime with the NumPy reference, at awkward sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from shadowllm.bundle.quantisation import LOW_BIT_COPY, NESTED, Quantisation, quantise, quantise_nested
from shadowllm.models.activations import Activation
from shadowllm.plugins.function_body import FunctionForm
from shadowllm.plugins.ops.sparse_mlp.reference import sparse_mlp
from shadowllm.plugins.ops.sparse_mlp.schema import SPARSE_MLP
from tests.plugins.function_model import FORM, TOLERANCE, padded, run, run_all


@pytest.mark.parametrize("activation", get_args(Activation))
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("batch", "seqlen", "hidden", "width", "count"), [(1, 1, 41, 7, 7), (2, 3, 24, 123, 0), (3, 17, 5, 88, 41)]
)
def test_sparse_mlp(activation, gated, bias, batch, seqlen, hidden, width, count):
    rng = np.random.default_rng(width)
    form = FunctionForm(activation, gated, False, False, bias, True, 6, 2, 8, threshold=0.25)
    present = {"w_up": (width, hidden), "w_down": (width, hidden)} | ({"w_gate": (width, hidden)} if gated else {})
    if bias:
        present |= {"b_up": (width,), "b_down": (hidden,)} | ({"b_gate": (width,)} if gated else {})
    tensors = {name: 0.3 * rng.standard_normal(shape).astype(np.float32) for name, shape in present.items()}
    x = rng.standard_normal((batch, seqlen, hidden)).astype(np.float32)
    indices = padded(rng.choice(width, count, replace=False), width)
    feeds = {"x": x, "indices": indices, "count": np.array(count, dtype=np.int32)} | tensors
    expected = sparse_mlp(
        x,
        indices,
        count,
        *(tensors.get(name) for name in ("w_gate", "b_gate", "w_up", "b_up", "w_down", "b_down")),
        activation=activation,
        threshold=0.25,
    )[0]
    found = run(SPARSE_MLP, form, feeds, activation=activation, layer=0)
    np.testing.assert_allclose(found, expected, **TOLERANCE)


@pytest.mark.parametrize("q", [Quantisation(8), Quantisation(4), Quantisation(4, 16)], ids=str)
@pytest.mark.parametrize("count", [0, 1, 41])
def test_integer_weights(q, count):
    rng = np.random.default_rng(count)
    x = rng.standard_normal((2, 3, 64)).astype(np.float32)
    feeds = {"x": x, "indices": padded(rng.choice(41, count, replace=False), 41), "count": np.array(count, np.int32)}
    for part in ("gate", "up", "down"):
        feeds[f"w_{part}"], feeds[f"s_{part}"] = quantise(0.3 * rng.standard_normal((41, 64)).astype(np.float32), q)
    form = replace(FORM, quantisation=q)
    found = run(SPARSE_MLP, form, feeds, activation="silu", layer=0)
    expected = sparse_mlp(**feeds, b_gate=None, b_up=None, b_down=None, activation="silu")[0]
    np.testing.assert_allclose(found, expected, **TOLERANCE)


@pytest.mark.parametrize("chooses", [True, False])
@pytest.mark.parametrize("rest", [0, 1])
@pytest.mark.parametrize(("gated", "bias"), [(True, False), (False, True)])
@pytest.mark.parametrize(("hidden", "width", "count"), [(41, 7, 7), (72, 123, 0), (64, 88, 41)])
def test_low_bit_copy(chooses, rest, gated, bias, hidden, width, count):
    rng = np.random.default_rng(width)
    form = replace(FORM, gated=gated, mlp_bias=bias, rest=LOW_BIT_COPY, chooses_neurons=chooses)
    feeds = {"x": rng.standard_normal((2, 3, hidden)).astype(np.float32)}
    feeds |= {"count": np.array(count, np.int32), "rest": np.array(rest, np.int32)}
    if chooses:
        feeds["down_norms"] = rng.random(width).astype(np.float32)
    else:
        feeds["indices"] = padded(rng.choice(width, count, replace=False), width)
    for part in ("gate", "up", "down") if gated else ("up", "down"):
        weight = feeds[f"w_{part}"] = 0.3 * rng.standard_normal((width, hidden)).astype(np.float32)
        blocks = LOW_BIT_COPY.blocks(hidden)
        data, feeds[f"cs_{part}"] = quantise(np.pad(weight, ((0, 0), (0, blocks * 64 - hidden))), LOW_BIT_COPY)
        feeds[f"c_{part}"] = data.reshape(width, blocks, 32)
        if bias:
            feeds[f"b_{part}"] = rng.standard_normal(hidden if part == "down" else width).astype(np.float32)
    absent = dict.fromkeys(("indices", "w_gate", "b_gate", "b_up", "b_down"))
    expected = sparse_mlp(**(absent | feeds), activation="silu")
    outputs = run_all(SPARSE_MLP, form, feeds, 2 if chooses else 1, activation="silu", layer=0)
    for found, wanted in zip(outputs, expected, strict=False):
        np.testing.assert_allclose(found, wanted, **TOLERANCE)


@pytest.mark.parametrize("q", NESTED.values(), ids=NESTED)
@pytest.mark.parametrize("rest", [0, 1])
@pytest.mark.parametrize(("hidden", "width", "count"), [(41, 7, 7), (72, 123, 0), (64, 88, 41)])
def test_nested_weights(q, rest, hidden, width, count):
    rng = np.random.default_rng(width)
    form = replace(FORM, quantisation=q, rest=LOW_BIT_COPY, chooses_neurons=True)
    feeds = {"x": rng.standard_normal((2, 3, hidden)).astype(np.float32)}
    feeds |= {"count": np.array(count, np.int32), "rest": np.array(rest, np.int32)}
    feeds["down_norms"] = rng.random(width).astype(np.float32)
    for part in ("gate", "up", "down"):
        weight = 0.2 * rng.standard_normal((width, hidden)).astype(np.float32)
        data, scales, feeds[f"w_{part}"] = quantise_nested(weight, q)
        feeds |= {f"c_{part}": data.reshape(*scales.shape, -1), f"cs_{part}": scales}
    expected = sparse_mlp(**dict.fromkeys(("indices", "b_gate", "b_up", "b_down")), **feeds, activation="silu")
    for found, wanted in zip(run_all(SPARSE_MLP, form, feeds, activation="silu", layer=0), expected, strict=True):
        np.testing.assert_allclose(found, wanted, **TOLERANCE)
