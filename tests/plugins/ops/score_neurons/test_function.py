"""Compares the function body on ONNX Runtime with the NumPy reference, at awkward sizes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shadowllm.bundle.quantisation import Quantisation, quantise
from shadowllm.plugins.function_body import CopyForm
from shadowllm.plugins.ops.score_neurons.reference import score_neurons
from shadowllm.plugins.ops.score_neurons.schema import SCORE_NEURONS
from tests.plugins.function_model import FORM, run


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("batch", "seqlen", "hidden", "width"), [(1, 1, 41, 7), (3, 17, 130, 88)])
def test_score_neurons(activation, gated, bias, batch, seqlen, hidden, width):
    """ONNX Runtime rounds the inputs of integer weights to 8 bits if it has fast kernels for that."""
    rng, q, rows = np.random.default_rng(width), Quantisation(bits=4, block=64), (1 + gated) * width
    form = replace(FORM, activation=activation, gated=gated, mlp_bias=bias, copy=CopyForm(hidden, rows, q))
    data, scales = quantise(0.3 * rng.standard_normal((rows, hidden)).astype(np.float32), q)
    x = rng.standard_normal((batch, seqlen, hidden)).astype(np.float32)
    parts = [] if not bias else ["b_gate", "b_up"] if gated else ["b_up"]
    biases = {part: rng.standard_normal(width).astype(np.float32) for part in parts}
    inputs = {"copy": data.reshape(rows, q.blocks(hidden), -1), "scales": scales}
    down_norms = rng.random(width).astype(np.float32)
    feeds = {"x": x, **inputs, "down_norms": down_norms, "count": np.array(3, np.int32)} | biases
    found = run(SCORE_NEURONS, form, feeds, activation=activation, layer=0)
    given = dict.fromkeys(("b_gate", "b_up")) | biases
    wanted = score_neurons(x, **inputs, **given, down_norms=down_norms, activation=activation)
    np.testing.assert_allclose(found, wanted, rtol=0.02, atol=0.02 * wanted.max())
    # A selection for each sequence has the scores of each.
    counts = np.full(batch, 3, np.int32)
    found = run(SCORE_NEURONS, form, feeds | {"count": counts}, activation=activation, layer=0)
    wanted = score_neurons(x, **inputs, **given, down_norms=down_norms, count=counts, activation=activation)
    assert found.shape == wanted.shape == (batch, width)
    np.testing.assert_allclose(found, wanted, rtol=0.02, atol=0.02 * wanted.max())
