"""The native op with a norm: it norms the hidden states, and adds them to its result."""

from __future__ import annotations

import numpy as np
import pytest

from shadowllm.bundle.quantisation import NESTED
from tests.plugins.native_model import REFUSED, built, ints, run, run_all
from tests.plugins.norms import EPSILON, norm_inputs, without_norm
from tests.plugins.ops.sparse_mlp.gate_first_inputs import gate_first_inputs
from tests.plugins.ops.sparse_mlp.mixed_inputs import MIXED_WEIGHTS, mixed_inputs
from tests.plugins.ops.sparse_mlp.native_inputs import MLP_WEIGHTS, mlp_inputs

pytestmark = built
SIZES = [(41, 7, 1, 1, 3), (123, 88, 3, 50, 20), (576, 400, 2, 1, 40), (1, 1, 1, 1, 0)]  # D, F, B, S, count


def check(inputs, weights, **attributes):
    """The result is that of the op without a norm on normed hidden states, plus the hidden states."""
    attributes = {"activation": "silu", "layer": 0, **attributes}
    plain, *chosen = run_all("SparseMLP", without_norm(inputs), weights, 2, **attributes)
    found, *same = run_all(
        "SparseMLP", inputs, (*weights, "norm_weight", "norm_bias"), 2, epsilon=EPSILON, **attributes
    )
    for one, other in zip(same, chosen, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(found, inputs["x"] + plain, atol=2e-5 * np.abs(plain).max(initial=1), rtol=1e-5)


@pytest.mark.parametrize("layernorm", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_given_neurons(size, layernorm, isa):
    check(mlp_inputs("llama-biases", size) | norm_inputs(size[0], layernorm), MLP_WEIGHTS)


@pytest.mark.parametrize("q", [None, *NESTED.values()], ids=["float32", *NESTED])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_neurons_chosen_from_a_copy(size, q, isa):
    inputs = mixed_inputs("llama", size, rest=1, choosing=True, **({} if q is None else {"q": q}))
    check(inputs | norm_inputs(size[0], False), MIXED_WEIGHTS, exact_copies=1)


def test_gates_first(isa):
    inputs = gate_first_inputs("relu-gated", (123, 88, 3, 5))
    check(inputs | norm_inputs(123, False), MLP_WEIGHTS, activation="relu")


def test_each_sequence_has_its_own_selection(isa):
    inputs = mixed_inputs("llama", (576, 88, 3, 1, 20), rest=1, choosing=True)
    check(inputs | norm_inputs(576, True) | {"count": ints(20, 0, 88), "rest": ints(1, 0, 1)}, MIXED_WEIGHTS)


def test_a_norm_of_another_width_is_refused():
    inputs = mlp_inputs("llama", SIZES[0]) | norm_inputs(41, True)
    for changes, words in (
        ({"norm_weight": np.ones(40, np.float32)}, r"norm_weight has shape \(40\), not \(41\)"),
        ({"norm_weight": None}, "norm_bias stands without norm_weight"),
    ):
        with pytest.raises(REFUSED, match=words):
            run("SparseMLP", inputs | changes, activation="silu", layer=0)
