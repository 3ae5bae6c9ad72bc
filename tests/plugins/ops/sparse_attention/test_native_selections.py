"""The native op with a selection for each sequence. What one sequence computes is tested in the other files."""

from __future__ import annotations

import numpy as np
import pytest

from shadowllm.bundle.quantisation import NESTED
from shadowllm.plugins.ops.sparse_attention.reference import sparse_attention
from tests.plugins.native_model import built, run_all
from tests.plugins.ops.sparse_attention.mixed_inputs import MIXED_WEIGHTS, mixed_inputs
from tests.plugins.ops.sparse_attention.native_inputs import attention_inputs
from tests.plugins.selections import assert_same_alone, each_selects

pytestmark = built
WEIGHTS = MIXED_WEIGHTS[:-1]  # all but rest
APART = ("x", "indices", "count", "rest", "key", "value", "lengths", "cos", "sin")
COUNTS, RESTS = (2, 6, 0, 4), (1, 0, 1, 1)


def size(seqlen):
    return (192, 6, 3, 20, 40, 4, seqlen, (5, 31, 7, 40), 0)


CASES = {
    "floats": each_selects(attention_inputs("llama-biases", size(1)), COUNTS, 6),
    "given": each_selects(mixed_inputs("opt", size(1)), COUNTS, 6, RESTS),
    "chosen": each_selects(mixed_inputs("llama", size(1), groups=3), COUNTS, 6, RESTS),
    "chosen, prompts": each_selects(mixed_inputs("llama", size(3), groups=3), COUNTS, 6, RESTS),
    "nested": each_selects(mixed_inputs("llama", size(1), groups=3, q=NESTED["int8"]), COUNTS, 6, RESTS),
}


def outputs(inputs, **attributes):
    return run_all("SparseAttention", inputs, WEIGHTS, 2, n_heads=6, layer=0, **attributes)


@pytest.mark.parametrize("name", CASES)
def test_a_sequence_has_the_same_bits_alone(name, isa):
    assert_same_alone(outputs, CASES[name], APART)


@pytest.mark.parametrize("name", ["floats", "chosen, prompts"])
def test_the_result_is_that_of_the_reference(name, isa):
    y, chosen = outputs(CASES[name], exact_copies=1)
    expected, own = sparse_attention(**CASES[name], n_heads=6)
    np.testing.assert_array_equal(chosen, own)
    assert np.abs(y - expected).max() < 1e-5 * np.abs(expected).max()
