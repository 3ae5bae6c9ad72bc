"""Errors of the native op for wrong inputs: their messages, and no crash."""

from __future__ import annotations

import pytest

from tests.plugins.native_model import REFUSED, STATES, built, ints, run, scalar, zeros
from tests.plugins.ops.sparse_attention.native_inputs import ATTENTION_WEIGHTS, attention_inputs

pytestmark = built


ATTENTION_SIZE = (123, 6, 3, 20, 40, 2, 5, (5, 31), 4)


def attention(weights=ATTENTION_WEIGHTS, n_heads=6, window=0, **changes):
    inputs = attention_inputs("llama-biases", ATTENTION_SIZE) | changes
    return run("SparseAttention", inputs, weights, n_heads=n_heads, layer=4, window=window)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"indices": ints(0, 1, 2, 6, -1, -1)}, r"SparseAttention layer 4: index 6 is outside 0\.\.5"),
        ({"count": scalar(7)}, r"SparseAttention layer 4: count 7 is outside 0\.\.6"),
        ({"lengths": ints(5, 41)}, r"SparseAttention layer 4: length of row 1 41 is outside 5\.\.40"),
        ({"lengths": ints(4, 31)}, r"SparseAttention layer 4: length of row 0 4 is outside 5\.\.40"),
        ({"lengths": ints(5)}, r"lengths has shape \(1\), not \(2\)"),
        ({"value": zeros(2, 3, 41, 20)}, r"value has shape \(2, 3, 41, 20\), not \(2, 3, 40, 20\)"),
        ({"key": zeros(2, 4, 40, 20)}, "6 heads do not divide among 4"),
        ({"key": zeros(2, 0, 40, 20)}, "6 heads do not divide among 0"),
        ({"w_o": zeros(123, 120)}, r"w_o has shape \(123, 120\), not \(120, 123\)"),
        ({"b_q": zeros(123)}, r"b_q has shape \(123\), not \(120\)"),
        ({"b_o": zeros(120)}, r"b_o has shape \(120\), not \(123\)"),
        ({"cos": zeros(2, 5, 20)}, r"cos has shape \(2, 5, 20\), not \(2, 5, 10\)"),
        ({"sin": None}, "cos and sin come together"),
        ({"x": zeros(9, 123)}, "layer 4: x holds 9 positions, the cache 2 sequences"),
        ({"x": zeros(1, 5, 123)}, "layer 4: x holds 5 positions, the cache 2 sequences"),
        ({"x": zeros(123)}, "layer 4: x has 1 dimensions, not 2 or 3"),
    ],
)
def test_attention_refuses(changes, words):
    with pytest.raises(REFUSED, match=words):
        attention(**changes)


def test_a_negative_window_is_refused():
    with pytest.raises(STATES.RuntimeException, match=r"SparseAttention layer 4: window -1 is outside 0\.\."):
        attention(window=-1)
