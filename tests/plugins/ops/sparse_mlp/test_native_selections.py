"""The native op with a selection for each sequence. What one sequence computes is tested in the other files."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from shadowllm.bundle.quantisation import NESTED, Quantisation
from shadowllm.plugins.ops.sparse_mlp.reference import sparse_mlp
from tests.plugins.native_model import REFUSED, built, integers, ints, run, run_all, stored
from tests.plugins.ops.sparse_mlp.gate_first_inputs import gate_first_inputs
from tests.plugins.ops.sparse_mlp.mixed_inputs import MIXED_WEIGHTS, mixed_inputs
from tests.plugins.ops.sparse_mlp.native_inputs import MLP_SCALES, MLP_WEIGHTS, mlp_inputs
from tests.plugins.selections import assert_same_alone, each_selects

pytestmark = built
WEIGHTS = (*MIXED_WEIGHTS[:-1], *MLP_SCALES)  # all but rest
COUNTS, RESTS = (300, 1000, 0, 41), (1, 0, 1, 1)
ONES, RESTS_OF_11 = (1,) * 5, (1, 1, 0, 1, 1, 0, 1, 1, 1, 1, 0)
SIZE = (192, 1000, 4, 1, 0)  # enough rows for several chunks
BIASED = mlp_inputs("llama-biases", SIZE)
CASES = {
    "float32": each_selects(BIASED, COUNTS, 1000),
    "bfloat16": each_selects(stored(BIASED, MLP_WEIGHTS, "bfloat16"), COUNTS, 1000),
    "int8": each_selects(integers(BIASED, Quantisation(8)), COUNTS, 1000),
    "given": each_selects(mixed_inputs("opt", SIZE, choosing=False), COUNTS, 1000, RESTS),
    "chosen": each_selects(mixed_inputs("llama", SIZE), COUNTS, 1000, RESTS),
    "chosen, prompts": each_selects(mixed_inputs("llama", (123, 88, 4, 70, 0)), (3, 88, 0, 41), 88, RESTS),
    "nested": each_selects(mixed_inputs("llama-biases", SIZE, q=NESTED["int6"]), COUNTS, 1000, RESTS),
    # Rows of the copy are read once for sequences with the same count and rest, at most eight of them.
    "alike": each_selects(
        mixed_inputs("llama-biases", (192, 1000, 11, 1, 0)), (300,) * 9 + (41, 41), 1000, RESTS_OF_11
    ),
    "alike, nested": each_selects(
        mixed_inputs("llama", (192, 1000, 5, 1, 0), q=NESTED["int6"]), (300,) * 5, 1000, ONES
    ),
    "alike, wide copy": each_selects(mixed_inputs("llama", (123, 88, 5, 1, 0)), (3,) * 5, 88, ONES),
    "alike, zeros": each_selects(mixed_inputs("opt", (192, 1000, 5, 1, 0), choosing=False), (300,) * 5, 1000, ONES),
    "gate first": each_selects(gate_first_inputs("relu-gated", SIZE[:4]), COUNTS, 1000),
}


def outputs(inputs, activation, **attributes):
    return run_all("SparseMLP", inputs, WEIGHTS, 2, activation=activation, layer=0, **attributes)


@pytest.mark.parametrize("name", CASES)
def test_a_sequence_has_the_same_bits_alone(name, isa):
    activation = "relu" if name in ("given", "gate first", "alike, zeros") else "silu"
    assert_same_alone(partial(outputs, activation=activation), CASES[name], ("x", "indices", "count", "rest"))


@pytest.mark.parametrize("name", ["float32", "chosen, prompts", "gate first"])
def test_the_result_is_that_of_the_reference(name, isa):
    activation = "relu" if name == "gate first" else "silu"
    y, chosen = outputs(CASES[name], activation, exact_copies=1)
    expected, own = sparse_mlp(**CASES[name], activation=activation)
    np.testing.assert_array_equal(chosen, own)
    assert np.abs(y - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"count": ints(1, 2)}, "count has 2 elements, not 1 or 3"),
        ({"rest": ints(1, 2)}, "rest has 2 elements, not 3"),
        ({"count": ints(1, 8, 2)}, r"count 8 is outside 0\.\.7"),
        ({"indices": ints(0, 1, 2)}, "indices has 1 dimensions, not 2"),
        ({"indices": np.zeros((2, 7), np.int32)}, "indices has 2 rows, and count has 3"),
        ({"indices": np.full((3, 7), 7, np.int32)}, r"index 7 is outside 0\.\.6"),
    ],
)
def test_wrong_inputs_are_named(changes, words):
    inputs = each_selects(mixed_inputs("llama", (41, 7, 3, 1, 0), choosing=False), (1, 2, 3), 7, (1, 0, 1))
    with pytest.raises(REFUSED, match=f"SparseMLP layer 11: {words}"):
        run("SparseMLP", inputs | changes, WEIGHTS, activation="silu", layer=11)
