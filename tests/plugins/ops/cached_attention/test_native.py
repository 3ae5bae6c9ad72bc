"""Compares the native op with float64 arithmetic; see `native_model`."""

from __future__ import annotations

import numpy as np
import pytest

from shadowllm.limits import LONGEST_DRAFT
from shadowllm.plugins.ops.cached_attention.reference import cached_attention
from tests.plugins.native_model import assert_as_exact_as, built, make_session, ort, run_all
from tests.plugins.ops.cached_attention.native_inputs import cached_inputs

pytestmark = built

SIZES = [  # H, n_kv, d, capacity, S, last
    (1, 1, 2, 1, 1, (0,)),
    (3, 3, 6, 9, 1, (8,)),
    (6, 3, 20, 40, 5, (4, 30)),
    (9, 3, 8, 33, 17, (16, 17, 32)),
    (9, 3, 64, 300, 1, (256,)),
    (9, 3, 64, 64, 1, (63, 0, 6, 39)),
    (12, 4, 12, 90, 40, (39, 89)),
    (32, 4, 64, 130, 1, (128,)),
]
LONG = [(3, 1, 6, 1300, 1, (1290, 511, 512, 3)), (6, 3, 20, 800, 3, (799, 30))]  # their positions are divided


def wide(inputs):
    return {k: v.astype(np.float64) if v is not None and v.dtype == np.float32 else v for k, v in inputs.items()}


@pytest.mark.parametrize(
    ("size", "rope", "window"),
    [(size, rope, 0) for size in SIZES for rope in (True, False)]
    + [(size, True, window) for size in SIZES[2:7] for window in (1, 4, 33, 400)]
    + [(size, True, window) for size in LONG for window in (0, 515, 600)],
    ids=str,
)
def test_cached_attention(size, rope, window, isa):
    inputs = cached_inputs(size, rope)
    exact, float32 = (cached_attention(**of, n_heads=size[0], window=window) for of in (wide(inputs), inputs))
    for row, last in enumerate(size[5]):
        past = last + 1 - size[4]
        for name in ("past_key", "past_value"):  # neither what follows the past nor what no query sees is read
            inputs[name][row, :, past:] = np.nan
            inputs[name][row, :, : max(0, past + 1 - window) if window else 0] = np.nan
    found = run_all("CachedAttention", inputs, threads=2, n_heads=size[0], window=window)
    assert_as_exact_as(found[0], float32[0], exact[0])
    for ours, theirs in zip(found[1:], exact[1:], strict=True):
        for row, last in enumerate(size[5]):
            seen = np.s_[row, :, max(0, last + 2 - size[4] - window) if window else 0 : last + 1]
            np.testing.assert_allclose(ours[seen], theirs[seen], rtol=0, atol=1e-6)


@pytest.mark.parametrize("hidden", [300, 600])
def test_scores_that_overflow_weigh_nothing(hidden, isa):
    """Also if they are all scores of a part of the positions."""
    inputs = cached_inputs((1, 1, 2, 1300, 1, (1290,)), rope=False)
    inputs["projected"][:] = np.abs(inputs["projected"]) + 2
    inputs["past_key"][:, :, :hidden] = -3e38
    with np.errstate(over="ignore"):
        expected = cached_attention(**inputs, n_heads=1)[0]
    assert np.isfinite(expected).all()
    (found, *_) = run_all("CachedAttention", inputs, threads=2, n_heads=1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_no_sequence():
    found = run_all("CachedAttention", cached_inputs((6, 3, 4, 5, 1, ())), n_heads=6)
    assert [array.shape for array in found] == [(0, 24), (0, 3, 5, 4), (0, 3, 5, 4)]


def test_a_bound_cache_is_written_in_place():
    inputs = cached_inputs((6, 3, 8, 12, 2, (5, 9)))
    expected = run_all("CachedAttention", inputs, n_heads=6)
    session = make_session("CachedAttention", inputs, outputs=None, n_heads=6)
    binding = session.io_binding()
    for name in ("projected", "last", "cos", "sin"):
        binding.bind_cpu_input(name, inputs[name])
    caches = {name: ort.OrtValue.ortvalue_from_numpy(inputs[f"past_{name}"]) for name in ("key", "value")}
    for name, cache in caches.items():
        binding.bind_ortvalue_input(f"past_{name}", cache)
        binding.bind_ortvalue_output(name, cache)
    binding.bind_output("y")
    session.run_with_iobinding(binding)
    for name, wanted in zip(("key", "value"), expected[1:], strict=True):
        np.testing.assert_array_equal(caches[name].numpy(), wanted)


def test_without_outputs_the_cache_is_written_to_its_inputs():
    inputs = cached_inputs((6, 3, 8, 12, 2, (5, 9)))
    expected = run_all("CachedAttention", inputs, n_heads=6)
    session = make_session("CachedAttention", inputs, outputs=1, n_heads=6)
    binding = session.io_binding()
    caches = {}
    for name, array in inputs.items():
        caches[name] = ort.OrtValue.ortvalue_from_numpy(array.copy())
        binding.bind_ortvalue_input(name, caches[name])
    binding.bind_output("y")
    session.run_with_iobinding(binding)
    np.testing.assert_array_equal(binding.copy_outputs_to_cpu()[0], expected[0])
    for name, wanted in zip(("past_key", "past_value"), expected[1:], strict=True):
        np.testing.assert_array_equal(caches[name].numpy(), wanted)


@pytest.mark.parametrize("size", [SIZES[3], SIZES[5], *LONG], ids=str)
def test_a_sequence_has_the_same_bits_alone(size, isa):
    inputs, seqlen = cached_inputs(size), size[4]
    together = run_all("CachedAttention", inputs, threads=2, n_heads=size[0])
    for row in range(len(size[5])):
        own = {name: inputs[name][row : row + 1] for name in ("past_key", "past_value", "last")}
        own["projected"] = inputs["projected"][row * seqlen : (row + 1) * seqlen]
        alone = run_all("CachedAttention", inputs | own, n_heads=size[0])
        np.testing.assert_array_equal(together[0][row * seqlen : (row + 1) * seqlen], alone[0])
        for several, one in zip(together[1:], alone[1:], strict=True):
            np.testing.assert_array_equal(several[row : row + 1], one)


@pytest.mark.parametrize("window", [0, 300])
@pytest.mark.parametrize("kv_heads", [1, 3, 6])
@pytest.mark.parametrize(("seqlen", "last"), [(9, (15, 40)), (LONGEST_DRAFT + 1, (530, 1290)), (16, (1037, 16))])
def test_a_token_of_a_short_step_has_the_bits_of_a_step_of_its_own(seqlen, last, kv_heads, window, isa):
    """Also where the step passes a length from which the positions are divided differently."""
    heads = 6
    inputs = cached_inputs((heads, kv_heads, 20, 1300, seqlen, last))
    together = run_all("CachedAttention", inputs, threads=2, n_heads=heads, window=window)[0]
    projected = inputs["projected"].reshape(len(last), seqlen, -1)
    caches = {name: inputs[name] for name in ("past_key", "past_value")}
    for s in range(seqlen):
        one = caches | {"projected": projected[:, s], "last": inputs["last"] - (seqlen - 1 - s)}
        y, *now = run_all("CachedAttention", inputs | one, n_heads=heads, window=window)
        np.testing.assert_array_equal(together.reshape(len(last), seqlen, -1)[:, s], y)
        caches = dict(zip(caches, now, strict=True))
