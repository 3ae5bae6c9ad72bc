"""Compares the native op with its parts, run one by one, and with the NumPy reference; see `native_model`."""

from __future__ import annotations

import numpy as np
import pytest

from shadowllm.plugins.ops.dense_decoder_layer.reference import dense_decoder_layer
from tests.plugins.native_model import REFUSED, built, ints, run_all, zeros
from tests.plugins.ops.decoder_layer.native_inputs import DENSE_WEIGHTS, Size, dense_layer_inputs, in_parts

pytestmark = built

SIZES = [
    Size(1, 1, 2, 1, 1, 1, (0,), 1),
    Size(6, 3, 20, 100, 33, 5, (4, 30)),
    Size(9, 3, 64, 576, 200, 1, (39, 0, 17)),
    Size(4, 2, 16, 128, 1030, 11, (39,)),
]


def attributes(size, gated=True, **more):
    return {"n_heads": size.heads, "activation": "silu", "gated": int(gated), "epsilon": 1e-3} | more


def assert_close(found, wanted, tolerance):
    assert found.shape == wanted.shape
    assert np.linalg.norm(found - wanted) <= tolerance * np.linalg.norm(wanted)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    ("options", "window"), [({}, 0), ({"rope": False, "bias": False}, 3), ({"gated": False}, 400)], ids=str
)
def test_layer_equals_its_parts(size, options, window, isa):
    inputs = dense_layer_inputs(size, **options)
    wanted = in_parts(inputs, **attributes(size, options.get("gated", True), window=window))
    more = attributes(size, options.get("gated", True), window=window, exact_copies=1)
    found = run_all("DenseDecoderLayer", inputs, DENSE_WEIGHTS, threads=2, **more)
    assert_close(found[0], wanted[0], 1e-4)
    for ours, theirs in zip(found[1:], wanted[1:], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_reference(size, isa):
    inputs = dense_layer_inputs(size)
    found = run_all("DenseDecoderLayer", inputs, DENSE_WEIGHTS, threads=2, **attributes(size))
    for ours, theirs in zip(found, dense_decoder_layer(**inputs, **attributes(size)), strict=True):
        assert_close(ours, theirs, 0.02)


@pytest.mark.parametrize("size", [SIZES[1], SIZES[3]], ids=str)
def test_a_token_of_a_short_step_has_the_bits_of_a_step_of_its_own(size, isa):
    inputs = dense_layer_inputs(size)
    together = run_all("DenseDecoderLayer", inputs, DENSE_WEIGHTS, threads=2, **attributes(size))[0]
    x = inputs["x"].reshape(len(size.last), size.seqlen, -1)
    caches = {name: inputs[name] for name in ("attention_past_key", "attention_past_value")}
    for s in range(size.seqlen):
        one = caches | {"x": x[:, s], "attention_last": inputs["attention_last"] - (size.seqlen - 1 - s)}
        y, *now = run_all("DenseDecoderLayer", inputs | one, DENSE_WEIGHTS, **attributes(size))
        np.testing.assert_array_equal(together.reshape(x.shape)[:, s], y)
        caches = dict(zip(caches, now, strict=True))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm": zeros(99)}, r"DenseDecoderLayer: norm has shape \(99\), not \(100\)"),
        ({"out_copy": np.zeros((99, 2, 32), np.uint8)}, "DenseDecoderLayer: out_copy has 99 rows, not 100"),
        ({"attention_last": ints(4, 40)}, "CachedAttention: last of row 1 40 is outside"),
        ({"mlp_up_copy": np.zeros((65, 2, 32), np.uint8)}, "DenseMLP: up_copy has 65 rows"),
        ({"mlp_down_copy": np.zeros((99, 1, 32), np.uint8)}, "DenseMLP: down_copy must have 100 rows"),
    ],
    ids=str,
)
@pytest.mark.parametrize("threads", [1, 2])
def test_refuses(changes, words, threads):
    inputs = dense_layer_inputs(SIZES[1]) | changes
    with pytest.raises(REFUSED, match=words):
        run_all("DenseDecoderLayer", inputs, threads=threads, **attributes(SIZES[1]))
