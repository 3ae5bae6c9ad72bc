"""Errors of the native op for wrong inputs: their messages, and no crash."""

from __future__ import annotations

import pytest

from tests.plugins.native_model import REFUSED, STATES, built, ints, run_all, zeros
from tests.plugins.ops.cached_attention.native_inputs import cached_inputs

pytestmark = built

SIZE = (6, 3, 20, 40, 5, (4, 30))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"last": ints(4, 40)}, r"CachedAttention: last of row 1 40 is outside 4\.\.39"),
        ({"last": ints(3, 30)}, r"last of row 0 3 is outside 4\.\.39"),
        ({"last": ints(4, -(2**31))}, r"last of row 1 -2147483648 is outside 4\.\.39"),
        ({"last": ints(4)}, r"last has shape \(1\), not \(2\)"),
        ({"cos": zeros(30, 10), "sin": zeros(30, 10)}, r"last of row 1 30 is outside -1\.\.29"),
        ({"sin": None}, "cos and sin come together"),
        ({"sin": zeros(40, 20)}, r"sin has shape \(40, 20\), not \(40, 10\)"),
        ({"past_value": zeros(2, 3, 41, 20)}, r"past_value has shape \(2, 3, 41, 20\), not \(2, 3, 40, 20\)"),
        ({"past_key": zeros(2, 4, 40, 20)}, "6 heads do not divide among 4"),
        ({"past_key": zeros(2, 3, 40)}, "past_key has 3 dimensions, not 4"),
        ({"projected": zeros(9, 240)}, "9 tokens do not divide among 2 sequences"),
        ({"projected": zeros(10, 200)}, r"projected has shape \(10, 200\), not \(10, 240\)"),
        ({"projected": zeros(2, 5, 240)}, "projected has 3 dimensions, not 2"),
    ],
)
def test_cached_attention_refuses(changes, words):
    with pytest.raises(REFUSED, match=words):
        run_all("CachedAttention", cached_inputs(SIZE) | changes, n_heads=6)


def test_a_negative_window_is_refused():
    with pytest.raises(STATES.RuntimeException, match=r"CachedAttention: window -1 is outside 0\.\."):
        run_all("CachedAttention", cached_inputs(SIZE), n_heads=6, window=-1)


def test_an_odd_head_cannot_be_rotated():
    inputs = cached_inputs((2, 1, 3, 4, 1, (2,))) | {"cos": zeros(4, 1), "sin": zeros(4, 1)}
    with pytest.raises(REFUSED, match="head dimension 3 is odd"):
        run_all("CachedAttention", inputs, n_heads=2)


def test_a_constant_cache_is_not_written():
    inputs = cached_inputs(SIZE)
    with pytest.raises(REFUSED, match="CachedAttention: a constant cache needs an output"):
        run_all("CachedAttention", inputs, ("past_key", "past_value"), outputs=1, n_heads=6)
    assert len(run_all("CachedAttention", inputs, ("past_key", "past_value"), n_heads=6)) == 3
